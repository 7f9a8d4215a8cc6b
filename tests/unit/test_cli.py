"""The terminal's commands on a very small random teacher, and every sentence they may say."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from accvideo_core.cli import main
from accvideo_core.conditioning import Prompt, text_id
from accvideo_core.distill.metrics import read_metrics
from accvideo_core.distill.recipe_file import changed_recipe
from accvideo_core.distill.recipes import PRESETS
from accvideo_core.errors import AccVideoError
from accvideo_core.export import load_student, read_student_info
from accvideo_core.inspection import describe
from accvideo_core.models import VideoModel, loading
from accvideo_core.models.loading import Teacher
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.terminal import Terminal, duration, line
from accvideo_core.trajectories.store import TrajectoryDataset
from accvideo_core.video import read_video

SIZE = ["--frames", "5", "--height", "16", "--width", "16"]
TINY = ["--set", "train_steps=4", "--set", "lora.rank=2", "--set", "batch_size=2"]


class SmallVAE:
    footprint = None

    def decode_bytes(self, x: torch.Tensor, _free: int | None = None) -> torch.Tensor:
        return (self.decode(x) * 255).round().to(torch.uint8)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        big = x[:, :3].repeat_interleave(4, 3).repeat_interleave(4, 4)
        video = torch.cat([big[:, :, :1], big[:, :, 1:].repeat_interleave(4, 2)], dim=2)
        return (video / 4 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


class SmallTeacher(Teacher):
    """A teacher of width 32 that needs neither text encoders nor a folder."""

    @property
    def vae(self):
        return SmallVAE()

    def check_encoders(self):
        pass

    def encode_each(self, given, frames=1, guidance=None):
        scale = 6.0 if guidance is None else guidance
        for text, _image in given:
            seed = int(text_id(text)[:4], 16)
            yield Prompt.of(text, tiny.condition(1, seed=seed).with_guidance(scale))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which record, distill and tune have run, with what they said in `said`."""
    folder = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(loading, "load_teacher", lambda *_a, **_o: small_teacher_in(folder))
        run_line()
    (folder / "said").write_text(said.getvalue())
    return folder


@pytest.fixture(autouse=True)
def teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SmallTeacher:
    teacher = small_teacher_in(tmp_path)
    monkeypatch.setattr(loading, "load_teacher", lambda *_args, **_options: teacher)
    monkeypatch.chdir(tmp_path)
    return teacher


@pytest.fixture
def line_done(finished: Path, tmp_path: Path) -> None:
    """The finished line's files in the test's own folder, which is the current one."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


@cache
def small_model() -> VideoModel:
    return tiny.video_model()


def small_teacher_in(folder: Path) -> SmallTeacher:
    return SmallTeacher(small_model(), folder)


def record(*more: str) -> int:
    prompts = ["--prompt", "a", "--prompt", "b", "--prompt", "c"]
    return main(["record", "clips", *SIZE, *prompts, "--steps", "4", "--keep", "2", *more])


def run_line() -> None:
    assert record("--store", "float32") == 0
    two = ["--set", "student_steps=2", *TINY]
    assert main(["distill", "clips", "runs/traj", *two]) == 0
    tuned = ["tune", "clips", "runs/adv", "--student", "runs/traj/student.safetensors", *TINY]
    assert main(tuned) == 0


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_line_from_recording_to_videos(capsys, line_done):
    assert "3 trajectories are in clips" in Path("said").read_text()
    info = read_student_info(Path("runs/adv/student.safetensors"))
    assert info.steps_trained == 8 and len(info.key_times) == 3 and info.guidance == 6.0
    assert info.recipe["adversarial"] is True

    student = ["--student", "runs/adv/student.safetensors"]
    assert main(["sample", "out", *student, "--prompt", "a red dot", "--samples", "2"]) == 0
    clips = sorted(Path("out").glob("a_red_dot_*.mp4"))
    assert len(clips) == 2 and read_video(clips[0])[0].shape == (5, 128, 128, 3)
    assert torch.equal(read_video(clips[0])[0], read_video(clips[1])[0]) is False

    names = ["--student", "one=runs/traj/student.safetensors", *student]
    assert main(["compare", "report", *names, "--prompt", "x", "--curves", "runs/adv"]) == 0
    table = capsys.readouterr().out
    assert "teacher@50" in table and "teacher@2" in table and "one" in table
    rows = json.loads(Path("report/report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher@50", "teacher@2", "one", "student"]
    assert Path("report/contact_sheet.png").is_file() and Path("report/loss_curves.png").is_file()


def test_the_same_commands_again_change_nothing(line_done):
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = files()
    run_line()
    assert files() == before


def test_tensorboard_gets_what_the_metrics_hold(line_done):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ["distill", "clips", "runs/board", "--set", "student_steps=2", *TINY, "--tensorboard"]
    words += ["--set", "schedule=constant"]
    assert main(words) == 0
    assert main([*words, "--set", "train_steps=6"]) == 0  # under a constant schedule it goes on
    events = accumulator.EventAccumulator("runs/board/tensorboard").Reload()
    rows = read_metrics(Path("runs/board/metrics.jsonl"))
    assert len(rows) == 6
    for name in ("loss", "lr", "student_grad_norm"):
        shown = {event.step: event.value for event in events.Scalars(f"distill/{name}")}
        assert shown == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-6)


@pytest.mark.parametrize("run", ["runs/traj", "runs/adv"])
def test_export_gives_the_student_that_training_gave(line_done, teacher, run):
    assert main(["export", run, "again.safetensors", "--dtype", "fp32"]) == 0
    exported = load_student(Path("again.safetensors"), teacher.model)
    trained = load_student(Path(run) / "student.safetensors", teacher.model)
    assert exported.key_times == trained.key_times
    assert exported.info.steps_trained == trained.info.steps_trained
    for name, value in trained.state_dict().items():
        assert torch.equal(value, exported.state_dict()[name]), name


def test_inspect_says_what_each_thing_is(capsys, line_done):
    expected = {
        "clips": ("is a trajectory dataset", "3 (", "kept times", "5 frames of 16 x 16"),
        "runs/traj": ("is a training run", "4 of 4", "trajectory"),
        "runs/adv": ("trajectory + adversarial",),
        "runs/adv/student.safetensors": ("is a student", "LoRA of rank 2", "8 updates"),
    }
    for path, phrases in expected.items():
        assert main(["inspect", path, "--verify"]) == 0
        text = capsys.readouterr().out
        assert all(phrase in text for phrase in phrases), text


def test_inspect_says_what_things_are_not(capsys):
    Path("folder").mkdir()
    Path("note.txt").write_text("x")
    Path("foreign").mkdir()
    Path("foreign/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    Path("junk.safetensors").write_bytes(b"x" * 100)
    cases = {
        "missing": "there is nothing at missing",
        "folder": "no trajectory dataset .* no training run .* no teacher",
        "note.txt": "note.txt' .*safetensors",
        "foreign": "networks of class .* are not supported",
        "junk.safetensors": "junk.safetensors' is damaged",
    }
    for path, message in cases.items():
        assert main(["inspect", path]) == 2
        assert re.search(message, last_error(capsys))


def test_inspect_names_a_network_by_its_tensors(capsys):
    network = tiny.network()
    weights = {name: x.to(torch.bfloat16) for name, x in network.state_dict().items()}
    config = {name: x for name, x in dict(network.config).items() if name[0] != "_"}
    save_file(weights, "model.safetensors", {"config": json.dumps(config)})
    assert main(["inspect", "model.safetensors", "--verify"]) == 0
    text = capsys.readouterr().out
    for phrase in ("network of a teacher", "HunyuanVideo", "bfloat16", "diffusers'", "fingerprint"):
        assert phrase in text


def test_a_public_preset_is_sampled_as_it_wants(capsys, tmp_path):
    words = ["sample", "out", *SIZE, "--prompt", "a red circle", "--preset"]
    assert main([*words, "accvideo-hunyuan-5"]) == 0
    assert len(list(Path("out").glob("*.mp4"))) == 1
    assert main([*words, "accvideo-wan-t2v-10"]) == 2
    assert "is for wan_t2v, but the teacher is a hunyuan_video" in last_error(capsys)
    assert main([*words, "fast"]) == 2
    assert "preset 'fast' is unknown; choose one of: accvideo-hunyuan-5" in last_error(capsys)


def test_guidance_of_the_teacher_is_recorded_with_its_negative_prompt(capsys):
    words = ["--prompt", "a red circle", "--steps", "4", "--keep", "2", "--cfg", "2"]
    assert main(["record", "guided", *SIZE, *words, "--negative", "a blue square"]) == 0
    info = TrajectoryDataset.open(Path("guided")).info
    assert info.cfg is not None and info.cfg.scale == 2 and info.negative
    plain = ["record", "guided", *SIZE, *words, "--negative", "a red square"]
    assert main(plain) == 2 and "cannot be continued with negative" in last_error(capsys)


def test_any_times_and_all_states_can_be_recorded(capsys):
    words = ["record", "timed", *SIZE, "--prompt", "x", "--times", "1,0.8,0.3,0", "--keep", "all"]
    assert main(words) == 0
    info = TrajectoryDataset.open(Path("timed")).info
    assert info.times == (1.0, 0.8, 0.3, 0.0) == info.time_grid
    assert main([*words, "--steps", "3"]) == 2
    assert "steps is 3 beside times, which say it all" in last_error(capsys)
    assert main([*words[:-3], "1,x", "--keep", "all"]) == 2
    assert "'1,x' are not numbers" in last_error(capsys)


def test_inspect_verify_finds_a_flipped_byte(capsys):
    assert record() == 0
    path = next(Path("clips/records").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["inspect", "clips"]) == 0
    assert main(["inspect", "clips", "--verify"]) == 2
    assert "1 faults" in last_error(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["record", "d", *SIZE], "no prompts were given; use --prompt"),
        (["record", "d", "--prompt", "x"], "give --frames --height --width"),
        (["record", "d", *SIZE, "--world", "999"], "more than the 378 prompts"),
        (["record", "d", *SIZE, "--prompts", "none.txt"], "no prompts file none.txt"),
        (["record", "d", *SIZE, "--prompt", "x", "--keep", "two"], "'two' is not a whole number"),
        (["record", "d", *SIZE, "--prompt", "x", "--keep", "7"], "7 student steps do not divide"),
        (["record", "d", *SIZE, "--prompt", "x", "--dtype", "int8"], "dtype int8 is unknown"),
        (["distill", "none", "r"], "none is no trajectory dataset"),
        (["distill", "clips", "r", "--recipe", "best"], "no recipe 'best'; choose one of"),
        (["distill", "clips", "r", "--set", "lr"], "'lr' has no value"),
        (["distill", "clips", "r", "--set", "speed=1"], "recipe has no field 'speed'"),
        (["distill", "clips", "r", "--set", "lr.x=1"], "recipe has no field 'lr.x'"),
        (["distill", "clips", "r", "--set", "lr=fast"], "recipe.lr is 'fast'; it must be a number"),
        (["distill", "clips", "r", "--set", "lr=-1"], "recipe.lr is -1"),
        (["tune", "clips", "r", "--student", "none.safetensors"], "none.safetensors"),
        (["export", "clips", "x.safetensors"], "clips is no training run"),
        (["compare", "r", "--prompt", "x", *SIZE, "--steps", "a"], "'a' is not a whole number"),
        (["compare", "r", "--prompt", "x"], "size of the clips is not known"),
    ],
)
def test_every_error_is_one_line_and_exit_code_2(capsys, line_done, words, message):
    assert main(words) == 2
    error = last_error(capsys)
    assert re.match(f"accvideo {words[0]}: ", error) and message in error


def test_steps_and_student_exclude_each_other(capsys, line_done):
    student = ["--student", "runs/traj/student.safetensors"]
    assert main(["sample", "out", *student, "--prompt", "x", "--steps", "9"]) == 2
    assert "--steps 9 cannot be chosen with --student" in last_error(capsys)


def test_cancelling_exits_130_and_keeps_what_was_done(capsys, monkeypatch):
    def stop(self: Terminal, progress: Progress) -> None:
        if progress.step == 2:
            raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "__call__", stop)
        assert record("--batch", "1") == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert record("--batch", "1") == 0


@pytest.mark.parametrize(
    "command",
    [
        *("record", "distill", "tune", "recipe", "sample", "export", "inspect", "compare", "demo"),
        *("profile", "evaluate", "vbench", "ablation"),
    ],
)
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  accvideo {command} " in capsys.readouterr().out


def test_recipe_fields_keep_their_types():
    changes = ["lr=1e-4", "betas=[0.5,0.9]", "ema=null", "lora.rank=3", "gan_loss=hinge"]
    recipe = changed_recipe(PRESETS["adversarial"], changes)
    assert (recipe.lr, recipe.betas, recipe.ema) == (1e-4, (0.5, 0.9), None)
    assert recipe.lora is not None and recipe.lora.rank == 3 and recipe.gan_loss == "hinge"
    assert changed_recipe(recipe, ["lora=null"]).lora is None


def test_a_run_without_checkpoint_is_not_exported(line_done):
    for path in Path("runs/traj/checkpoints").iterdir():
        path.unlink()
    assert main(["export", "runs/traj", "x.safetensors"]) == 2
    with pytest.raises(AccVideoError, match="nothing at"):
        describe(Path("x.safetensors"))


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_redraws_one_line_and_leaves_the_last_of_each_stage():
    screen = Screen()
    with Terminal(screen) as terminal:
        for stage in ("record", "distill"):
            for step in range(1, 4):
                terminal(Progress(stage, step, 3, {"loss": 0.5}))
    text = screen.getvalue()
    left = [part.split("\r\033[K")[-1] for part in text.split("\n") if part]
    assert len(left) == 2
    assert left[0].startswith("record") and "3/3" in left[0] and "loss 0.5" in left[0]
    assert left[1].startswith("distill") and "#" * 24 in left[1]


def test_a_log_file_gets_one_line_a_stage_when_it_is_quick():
    log = io.StringIO()
    with Terminal(log) as terminal:
        for step in range(1, 100):
            terminal(Progress("sample", step, 99))
    assert log.getvalue().count("\n") == 1 and "\r" not in log.getvalue()


def test_a_log_file_gets_no_line_twice(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with Terminal(log) as terminal:
        for step in range(1, 4):
            terminal(Progress("sample", step, 3))
            now[0] += 11
    lines = log.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["2/3", "3/3"]


def test_remaining_time_counts_this_session_only():
    # 90 of 100 done, 10 of them in the last 20 seconds: 10 more take 20 seconds.
    assert "20s, 20s left" in line(Progress("distill", 90, 100), seconds=20, steps=10)
    assert "left" not in line(Progress("distill", 100, 100), seconds=20, steps=10)
    assert line(Progress("x", 0, 0), 0, 0).startswith("x")


def test_durations():
    assert [duration(s) for s in (0.4, 59, 61, 7260)] == ["0s", "59s", "1m01s", "2h01m"]


def test_ctrl_c_stops_at_the_next_step_and_twice_at_once():
    before = signal.getsignal(signal.SIGINT)
    screen = io.StringIO()
    with Terminal(screen) as terminal:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert "stopping after this step" in screen.getvalue()
        with pytest.raises(Cancelled):
            terminal(Progress("record", 1, 2))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
