"""Profiles: marks in order, every part told, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_wan
import torch
from torch import nn

from accvideo_core.distill.student import LoraSpec, Student, StudentInfo
from accvideo_core.evaluate.profile_chart import profile_chart
from accvideo_core.flow import time_grid
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.monitor import Cancelled
from accvideo_core.profiling import Job, Part, Peaks, Profile, profile
from accvideo_core.profiling.peaks import measure_peaks
from accvideo_core.profiling.timeline import Timeline, Watch
from accvideo_core.sampling import SamplePlan, sample
from accvideo_core.video import write_video

PLAN = SamplePlan(frames=5, height=32, width=32)
PEAKS = Peaks("a device", "bfloat16", 8192, flops=1e12, bytes=1e11)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(tiny.save_random_pipeline(tmp_path_factory.mktemp("profile") / "tiny"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("profile") / "pair"
    return load_teacher(tiny_wan.save_pipeline("wan22_t2v", folder))


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes longer than everything else here."""
    monkeypatch.setattr("accvideo_core.profiling.profiler.measure_peaks", lambda *_: PEAKS)


def job(teacher: Teacher, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "model": teacher.model,
        "times": time_grid(3, 7.0),
        "encode": lambda own: own.encode_prompts(["a red circle"])[0],
        "plan": PLAN,
    }
    return Job(**{**given, **changes})


@pytest.fixture(scope="module")
def found(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of three steps, with a file beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accvideo_core.profiling.profiler.measure_peaks", lambda *_: PEAKS)
        out = tmp_path_factory.mktemp("found") / "clip.mp4"
        result = profile(teacher, job(teacher, seed=3), out=out)
    return replace(result, notes=(*result.notes, str(out)))


# The clock ------------------------------------------------------------------------------------


def test_only_the_outer_of_nested_calls_is_noted_and_none_of_a_copy() -> None:
    inner = nn.Linear(4, 4)
    outer = nn.Sequential(inner, nn.ReLU())
    watch = Watch(Timeline(torch.device("cpu")))
    with watch.on({"outer": outer, "inner": inner}):
        outer(torch.ones(1, 4))
        inner(torch.ones(1, 4))
        deepcopy(outer)(torch.ones(1, 4))
        with pytest.raises(RuntimeError):
            outer(torch.ones(1, 3))
        outer(torch.ones(1, 4))
    outer(torch.ones(1, 4))
    assert [span.name for span in watch.spans] == ["outer", "inner", "outer", "outer"]
    assert all(a.end < b.start for a, b in zip(watch.spans, watch.spans[1:], strict=False))


def test_on_cuda_marks_are_events_and_nothing_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            told.append(f"recorded on {stream}")
            self.at = 1000.0 * len(told)  # milliseconds

        def elapsed_time(self, other: Event) -> float:
            assert told[-1] == "waited"
            return other.at - self.at

    cuda = SimpleNamespace(
        Event=Event,
        current_stream=lambda _: "its stream",
        synchronize=lambda _: told.append("waited"),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    timeline = Timeline(torch.device("cuda"))
    marks = [timeline.mark() for _ in range(3)]
    timeline.wait()
    assert told == ["recorded on its stream"] * 3 + ["waited"]
    assert timeline.seconds(marks[0], marks[2]) == 2.0


def test_peaks_are_measured_where_the_work_is() -> None:
    found = measure_peaks(torch.device("cpu"), torch.float32)
    assert found.dtype == "float32" and found.device.startswith("CPU, ")
    assert found.flops > 1e8 and found.bytes > 1e7 and found.size >= 512
    assert found.upload is None and found.download is None


# Whole clips ----------------------------------------------------------------------------------


def hooks_of(module: nn.Module) -> int:
    layers = list(module.modules())
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in layers)


def test_a_clip_is_sampled_as_ever(teacher: Teacher, found: Profile, tmp_path: Path) -> None:
    prompts = teacher.encode_prompts(["a red circle"])
    noise = PLAN.noise(teacher.model.latent_spec, prompts, seed=3)
    latents = sample(teacher.model, prompts[0].condition, noise, time_grid(3, 7.0))
    plain = write_video(tmp_path / "plain.mp4", teacher.vae.decode(latents)[0], 8)
    assert Path(found.notes[-1]).read_bytes() == plain.read_bytes()
    assert hooks_of(teacher.model.module) == hooks_of(teacher.vae.module) == 0


def test_every_part_of_a_clip_is_told(found: Profile) -> None:
    network = found.of_group("network")
    assert [(part.step, part.name) for part in network] == [(i, "network") for i in (1, 2, 3)]
    assert network[0].time == 1.0 and len({part.flops for part in network}) == 1
    text = {part.name: part.flops for part in found.of_group("text")}
    assert text["text_encoder"] and text["text_encoder_2"]
    vae = {part.name: part.flops for part in found.of_group("VAE")}
    assert vae["VAE decoder"] and found.of_group("writing")
    assert [part.name for part in found.of_group("transfers")] == ["preparation"]
    assert len(found.notes) == 1 and found.memory == 0


def test_parts_follow_one_another_and_make_up_the_whole(found: Profile) -> None:
    assert all(part.seconds > -1e-9 for part in found.parts)
    assert [part.start for part in found.parts] == sorted(part.start for part in found.parts)
    assert 0 <= found.unexplained < found.seconds / 2
    json.dumps(found.as_dict(), allow_nan=False)


def test_experts_and_halves_of_guidance_are_told_apart(experts: Teacher) -> None:
    negative = experts.encode_prompts(["a blue square"])[0]
    guided = Guided(experts.model, negative.condition, Cfg(4.0, low=1.0))
    found = profile(experts, job(experts, model=guided, times=(1.0, 0.95, 0.5, 0.0)))
    names = [(part.step, part.name) for part in found.of_group("network")]
    assert set(names) >= {(1, "high noise prompt"), (1, "high noise negative")} or set(names) >= {
        (1, "high noise both halves")
    }
    assert names[-1] == (3, "low noise") and (2, "low noise") not in names


def test_a_student_is_profiled_with_its_adapters(teacher: Teacher, found: Profile) -> None:
    info = StudentInfo(
        family="hunyuan_video",
        base=teacher.model.fingerprint,
        key_times=time_grid(2, 7.0),
        guidance=6.0,
        lora=LoraSpec(rank=4),
        latent_spec=teacher.model.latent_spec,
        frames=PLAN.frames,
        height=PLAN.height,
        width=PLAN.width,
    )
    student = Student.create(teacher.model, info)
    own = profile(teacher, job(teacher, model=student, times=student.key_times, guidance=6.0))
    (more, bare) = (x.of_group("network")[0].flops for x in (own, found))
    assert more is not None and bare is not None and bare < more < 2 * bare


def test_a_network_alone_is_not_decoded(tmp_path: Path) -> None:
    tiny.network().save_pretrained(tmp_path / "transformer")
    alone = load_teacher(tmp_path / "transformer")
    prompt = SimpleNamespace(id="x", condition=tiny.condition(batch=1))
    plan = SamplePlan(5, 16, 16)
    alone = replace(alone, model=replace(alone.model, latent_spec=tiny.SPEC))
    found = profile(alone, job(alone, encode=lambda _: prompt, plan=plan), out=tmp_path / "x.mp4")
    assert found.notes == ("there is no VAE, so nothing was decoded or written",)
    assert not found.of_group("VAE") and not (tmp_path / "x.mp4").exists()


def test_what_makes_it_faster_is_around_all_sampling(teacher: Teacher) -> None:
    told: list[str] = []

    @contextmanager
    def speed() -> Iterator[None]:
        told.append("in")
        yield
        told.append("out")

    def stop(_: object) -> None:
        told.append("step")
        if told.count("step") == 2:
            raise Cancelled

    profile(teacher, job(teacher, times=(1.0, 0.0)), speed(), monitor=lambda _: told.append("step"))
    assert told == ["in", "step", "out"]
    with pytest.raises(Cancelled):
        profile(teacher, job(teacher), monitor=stop)
    assert hooks_of(teacher.model.module) == 0


# What is told ---------------------------------------------------------------------------------


def made(steps: int = 2) -> Profile:
    """A network at half of the matrix rate and a tenth of the copy's."""
    parts = [Part("text", "text_encoder", 0.0, 1.0, 1e11, 1e9)]
    for i in range(steps):
        at = 1.0 + 2.5 * i
        parts.append(Part("network", "network", at, 2.0, 1e12, 2e10, i + 1, 1 - i / steps))
        parts.append(Part("solver", "solver", at + 2.0, 0.5, step=i + 1, time=1 - i / steps))
    end = 1.0 + 2.5 * steps
    parts.append(Part("transfers", "noise and prompt to the device", end, 0.5, 0.0, 1e8))
    parts.append(Part("VAE", "tiles", end + 0.5, 0.25))
    whole = {"what": "a model", "seconds": end + 1.0, "warm_up": 3.0, "memory": 10**9}
    return Profile(parts=tuple(parts), peaks=PEAKS, **whole)


def test_shares_are_of_the_measured_peaks() -> None:
    found = made()
    network = found.of_group("network")
    assert found.flops_share(network) == pytest.approx(0.5)
    assert found.bytes_share(network) == pytest.approx(0.1)
    assert found.flops_share(found.of_group("solver")) is None
    assert found.bytes_share(found.of_group("transfers")) is None
    assert found.seconds_of("network") == 4.0 and found.unexplained == pytest.approx(0.25)
    parts = found.as_dict()["parts"]
    assert parts[1]["flops_share"] == pytest.approx(0.5) and parts[2]["flops_share"] is None


def test_the_table_has_a_line_for_every_step_of_a_few() -> None:
    text = made().table()
    (first,) = [line for line in text.splitlines() if line.startswith("step 1 (t 1.000), network")]
    assert first.split()[-6:] == ["2.0000", "28.6%", "1", "50.0%", "20", "10.0%"]
    assert "solver (x2)" in text and "0.250 s lie between the parts" in text
    many = made(50).table()
    assert "network (x50)" in many and "step 2" not in many


def test_the_chart_draws_lanes_to_scale() -> None:
    found = made()
    picture = profile_chart(found)
    assert picture.width == 1100
    colours = [picture.getpixel((x, 75 + 32 // 2)) for x in range(170, 890)]
    dark = sum(colour == (31, 119, 180) for colour in colours)
    assert dark == pytest.approx(720 / found.seconds, abs=8)  # the first second is text
