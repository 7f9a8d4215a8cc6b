"""The comparison on a flow whose every Euler solution is known, and its seam to the tiny world."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from analytic import ANALYTIC, GaussianFlow, analytic_model, condition

from accvideo_core.conditioning import Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import judge, world
from accvideo_core.evaluate.classifier import Classifier
from accvideo_core.evaluate.compare import Contender, compare
from accvideo_core.evaluate.publish import publish
from accvideo_core.evaluate.report import FIGURES
from accvideo_core.flow import euler_step
from accvideo_core.latents import LatentSpec, seeded_noise
from accvideo_core.models.video_model import VideoModel
from accvideo_core.monitor import Cancelled, Progress
from accvideo_core.sampling import SamplePlan

MEAN, STD = 0.5, 0.25
PLAN = SamplePlan(5, 16, 16)
GRID = ANALYTIC.time_grid()
WORLD_SPEC = LatentSpec(channels=3, stride_t=4, stride_hw=4)


class BlockVAE:
    """Every latent is one flat block of pixels; the inverse takes block means."""

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        grey = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1, -1)
        scale = 8 if x.shape[1] == 2 else 4
        big = grey.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
        video = torch.cat([big[:, :, :1], big[:, :, 1:].repeat_interleave(4, 2)], dim=2)
        return video.float().clamp(0, 1).permute(0, 2, 3, 4, 1)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        video = frames[:, ::4].permute(0, 4, 1, 2, 3)
        return video.unflatten(3, (-1, 4)).mean(dim=4).unflatten(4, (-1, 4)).mean(dim=5)


def stub_teacher(model: VideoModel | None = None) -> SimpleNamespace:
    cpu = torch.device("cpu")
    return SimpleNamespace(model=model or flow_model(), vae=BlockVAE(), compute_device=cpu)


def flow_model() -> VideoModel:
    return analytic_model(GaussianFlow(MEAN, STD), torch.float64)


def world_teacher() -> SimpleNamespace:
    module = GaussianFlow(MEAN, STD).eval().requires_grad_(False)
    return stub_teacher(VideoModel(module, ANALYTIC, WORLD_SPEC))


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt.of(text, condition()) for text in texts or ("one", "two", "three")]


def factor(times: tuple[float, ...]) -> float:
    """Euler's x_0 = mean + factor * (x_1), from two starting points of the same scalar flow."""
    module = GaussianFlow(MEAN, STD).requires_grad_(False)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1, 1)
    for t, t_next in zip(times, times[1:], strict=False):
        v = module(x, torch.full((2,), t, dtype=torch.float64), condition(2))
        x = euler_step(x, v, t, t_next)
    return float((x[1] - x[0]).flatten())


def run(teacher=None, contenders=(), texts=(), **options):
    defaults = {"seed": 7, "batch_size": 4, "plan": PLAN, "real_clips": 16}
    return compare(
        teacher or stub_teacher(), contenders, prompts=prompts(*texts), **{**defaults, **options}
    )


@pytest.fixture
def random_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier's figures without its weights, which are trained elsewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier().eval()
    monkeypatch.setattr(judge, "load_classifier", lambda: classifier)


def test_latent_distance_to_the_reference_is_the_closed_form_one():
    teacher = stub_teacher()
    report = run(teacher, [Contender("teacher@1", teacher.model, (1.0, 0.0))])
    noise = torch.stack(
        [seeded_noise((2, 2, 2, 2), 7, p.id, s) for p in prompts() for s in range(2)]
    )
    # Both solutions start at the same noise and differ by a factor, around the same mean.
    expected = (factor((1.0, 0.0)) - factor(GRID)) ** 2 * float(noise.square().mean())
    assert report.figure("teacher@1", "latent_mse") == pytest.approx(expected, rel=1e-5)


def test_an_equal_contender_has_no_distance_and_the_reference_comes_first_once():
    teacher = stub_teacher()
    twin = Contender("twin", flow_model(), GRID)
    report = run(teacher, [twin, Contender("teacher@20", teacher.model, GRID)])
    assert list(report.measured) == ["teacher@20", "twin"] and report.reference == "teacher@20"
    assert report.figure("twin", "latent_mse") == 0
    assert report.figure("twin", "psnr") == 100
    assert report.figure("twin", "patch_distance") == 0
    assert report.figure("teacher@20", "psnr") is None


def test_the_batch_size_changes_no_figure(random_classifier):
    texts = world.all_prompts()[:3]
    teacher = world_teacher()
    few = Contender("teacher@2", teacher.model, (1.0, 0.5, 0.0))
    rows = [
        run(teacher, [few], texts, plan=None, batch_size=size).rows() for size in (1, 4, 100)
    ]
    for other in rows[1:]:
        for row, twin in zip(rows[0], other, strict=True):
            assert row["name"] == twin["name"]
            for key in (*FIGURES, "gap_closed"):
                a, b = row[key] or 0.0, twin[key] or 0.0
                assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6), key


def test_diversity_is_that_of_the_noise_and_zero_for_a_collapsed_model():
    class Collapsed(VideoModel):
        def answer(self, x_t, t, ready):
            return x_t / t  # straight to zero

    collapsed = Collapsed(flow_model().module, ANALYTIC, flow_model().latent_spec)
    report = run(contenders=[Contender("collapsed", collapsed, (1.0, 0.0))])
    assert report.figure("collapsed", "diversity") == pytest.approx(0, abs=1e-6)
    found = report.figure("teacher@20", "diversity")
    assert found == pytest.approx(factor(GRID) * math.sqrt(2), rel=0.3)
    assert run(samples_per_prompt=1).figure("teacher@20", "diversity") is None


def test_other_worlds_have_the_general_figures_and_a_note():
    report = run()
    row = report.rows()[0]
    assert row["all"] is None and row["fd_real"] is None and row["fd_teacher"] is None
    assert row["sharpness"] > 0 and row["nfe"] == 20 and row["seconds_per_clip"] > 0
    table = report.table()
    assert "note: " in table and "FD real" not in table and "sharp" in table


def test_world_prompts_at_another_size_are_another_world(random_classifier):
    report = run(texts=world.all_prompts()[:2])
    assert report.notes and report.rows()[0]["all"] is None


def test_the_tiny_world_adds_accuracy_frechet_distances_and_real_clips(random_classifier):
    teacher = world_teacher()
    few = Contender("teacher@1", teacher.model, (1.0, 0.0))
    student = Contender("student", teacher.model, (0.99, 0.0))
    texts = world.all_prompts()[::97]
    report = run(teacher, [few, student], texts, plan=None, samples_per_prompt=3)
    names = ["real clips", "real via VAE", "teacher@20", "teacher@1", "student"]
    assert list(report.measured) == names and not report.notes
    rows = {row["name"]: row for row in report.rows()}
    for row in rows.values():
        assert 0 <= row["all"] <= min(row[name] for name in world.ATTRIBUTES) <= 1
        assert row["fd_real"] > 0
    assert rows["teacher@20"]["fd_teacher"] == pytest.approx(0, abs=1e-6)
    assert rows["real clips"]["psnr"] is None and rows["real clips"]["seconds_per_clip"] is None
    # Block means of a clip cannot be sharper than the clip.
    assert rows["real via VAE"]["sharpness"] < rows["real clips"]["sharpness"]
    few_fd, full_fd = rows["teacher@1"]["fd_real"], rows["teacher@20"]["fd_real"]
    expected = (few_fd - rows["student"]["fd_real"]) / (few_fd - full_fd)
    assert rows["student"]["gap_closed"] == pytest.approx(expected)
    assert rows["teacher@1"]["gap_closed"] is None
    assert "gap closed" in report.table()
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_perfect_classifier_finds_every_prompt_shown_and_no_other():
    class Oracle(Classifier):
        """Reads the four classes out of the clip's four frames."""

        def features(self, video):
            return (video[:, 0, :, 0, 0] + 1) / 2

    oracle = Oracle()
    for i, (name, values) in enumerate(world.ATTRIBUTES.items()):
        head = torch.nn.Linear(4, len(values))
        head.weight.data.zero_()
        # -(x - c)^2 up to a constant: largest for the class c = x.
        head.weight.data[:, i] = 2.0 * torch.arange(len(values))
        head.bias.data = -torch.arange(len(values)).float() ** 2
        oracle.heads[name] = head
    specs = [world.parse(text) for text in world.all_prompts()[::50]]
    frames = world.labels(specs).float()[:, :, None, None, None].expand(-1, 4, 1, 1, 3)
    one = judge.Judge(specs, oracle, seed=0)
    hits, _ = one.judge(frames, range(len(specs)))
    assert all(bool((values == 1).all()) for values in hits.values())
    shifted, _ = one.judge(frames.roll(1, dims=0), range(len(specs)))
    assert (shifted["all"] == 0).all()


def test_intervals_and_paired_differences():
    teacher = stub_teacher()
    report = run(teacher, [Contender(name, teacher.model, (1.0, 0.0)) for name in "ab"])
    assert report.difference("a", "b", "sharpness").error == 0
    interval = report.interval("a", "latent_mse")
    assert interval.value == pytest.approx(report.figure("a", "latent_mse")) and interval.error > 0
    with pytest.raises(AccVideoError, match="a has no figure 'fd_real'"):
        report.interval("a", "fd_real")


def test_every_sampling_step_is_reported_and_may_cancel():
    seen: list[Progress] = []
    run(monitor=seen.append, batch_size=4)
    assert {p.stage for p in seen} == {"compare teacher@20"}
    assert [p.step for p in seen] == list(range(1, 41)) and {p.total for p in seen} == {40}
    assert seen[0].preview is not None and seen[0].preview().shape == (4, 2, 2, 2, 2)

    def cancel(progress: Progress) -> None:
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(monitor=cancel)


@pytest.mark.parametrize(
    ("contenders", "options", "message"),
    [
        ([], {"prompts": []}, "list of prompts is empty"),
        (["x", "x"], {}, "'x' is taken"),
        (["real clips"], {}, "'real clips' is taken"),
        ([], {"batch_size": 0}, "batch_size is 0"),
        ([], {"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ([], {"plan": None}, "give frames, height and width"),
        ([], {"plan": SamplePlan(6, 16, 16)}, "use 5 or 9"),
    ],
)
def test_what_cannot_be_compared_is_said(contenders, options, message):
    teacher = stub_teacher()
    named = [Contender(name, teacher.model, (1.0, 0.0)) for name in contenders]
    defaults = {"prompts": prompts(), "seed": 0, "batch_size": 2, "plan": PLAN}
    with pytest.raises(AccVideoError, match=message):
        compare(teacher, named, **{**defaults, **options})  # type: ignore[arg-type]


def test_a_contender_needs_falling_times():
    with pytest.raises(AccVideoError, match="fall strictly"):
        Contender("x", flow_model(), (0.0, 1.0))


def test_publishing_leaves_report_table_pictures_and_clips(tmp_path: Path):
    teacher = stub_teacher()
    report = run(teacher, [Contender("student (2 steps)", teacher.model, (1.0, 0.5, 0.0))])
    curve = tmp_path / "run" / "metrics.jsonl"
    curve.parent.mkdir()
    curve.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    paths = publish(report, tmp_path / "out", curves={"run": curve})
    names = {
        "report.json",
        "table.txt",
        "contact_sheet.png",
        "loss_curves.png",
        "teacher_20.mp4",
        "student_2_steps.mp4",
        "together.mp4",
    }
    assert {path.name for path in paths} == names == {p.name for p in (tmp_path / "out").iterdir()}
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["clips"] == 6 and stored["reference"] == "teacher@20"
    assert [row["name"] for row in stored["rows"]] == ["teacher@20", "student (2 steps)"]
