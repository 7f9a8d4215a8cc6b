"""Classifier-free guidance and two experts, checked against closed forms.

The Gaussian flow's velocity is affine in the mean of its data, so guidance with scale s between
means a (prompt) and b (negative) is exactly the flow of mean b + s (a - b).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.guidance import Cfg, Guided, guided
from accvideo_core.latents import seeded_noise
from accvideo_core.models.experts import Experts
from accvideo_core.models.video_model import VideoModel
from accvideo_core.trajectories import RecordSpec, TrajectoryDataset, record
from tests import analytic, tiny
from tests.analytic import ANALYTIC, SPEC, GaussianFlow, gaussian_model

NOISE = seeded_noise((2, *SPEC.shape(5, 16, 16)), "guidance").double()
TWO = replace(ANALYTIC, name="two", experts=2, boundary=0.5)


def prompt(offset: float, text: str = "") -> Prompt:
    pooled = torch.tensor([[offset]], dtype=torch.float64)
    return Prompt.of(text, Condition(torch.zeros(1, 1, 1, dtype=torch.float64), pooled=pooled))


def experts_model() -> VideoModel:
    pair = Experts(GaussianFlow(1.0, 0.3), GaussianFlow(-2.0, 0.3)).eval().requires_grad_(False)
    return VideoModel(pair, TWO, SPEC, source="pair")


def test_guidance_is_the_flow_of_the_extrapolated_mean():
    model, cond = gaussian_model(mean=0.0), Condition.cat([prompt(1.0).condition] * 2)
    asked = Guided(model, prompt(0.25).condition, Cfg(3.0))
    expected = gaussian_model(mean=0.25 + 3.0 * (1.0 - 0.25)).velocity(
        NOISE, 0.7, analytic.condition(2)
    )
    assert torch.allclose(asked.velocity(NOISE, 0.7, cond), expected, atol=1e-12)


def test_scale_one_asks_once():
    model = gaussian_model()
    assert guided(model, None, Cfg(1.0)) is model and guided(model, None, None) is model
    negative = prompt(0.0)
    asked = guided(model, negative, Cfg(2.0))
    assert isinstance(asked, Guided) and asked.negative is negative.condition
    with pytest.raises(AccVideoError, match="cfg 2 needs a negative prompt"):
        guided(model, None, Cfg(2.0))
    with pytest.raises(AccVideoError, match="cfg is 0.5; it must be at least 1"):
        Cfg(0.5)


def test_negative_takes_over_the_images_and_the_embedded_guidance_of_the_prompt():
    seen: list[Condition] = []

    class Recorder(VideoModel):
        def answer(self, x_t, t, ready):
            seen.append(ready)
            return x_t

    model = Recorder(torch.nn.Linear(1, 1), ANALYTIC, SPEC)
    cond = Condition(torch.ones(2, 3, 4), image=torch.ones(2, 4, 1, 2, 2)).with_guidance(6.0)
    Guided(model, Condition(torch.zeros(1, 1, 4)), Cfg(2.0)).velocity(NOISE, 0.5, cond)
    negative = seen[1]
    assert negative.text.shape == (2, 1, 4) and not negative.text.any()
    assert negative.image is not None and torch.equal(negative.image, cond.image)  # type: ignore
    assert negative.guidance is not None and negative.guidance.tolist() == [6.0, 6.0]


@pytest.mark.parametrize(("t", "mean"), [(1.0, 1.0), (0.5, 1.0), (0.499, -2.0), (0.1, -2.0)])
def test_the_expert_of_the_time_answers(t: float, mean: float):
    cond = analytic.condition(2)
    expected = gaussian_model(mean=mean, std=0.3).velocity(NOISE, t, cond)
    model = experts_model()
    assert torch.allclose(model.velocity(NOISE, t, cond), expected, atol=1e-12)
    assert model.expert(t) is (model.module.high if mean == 1.0 else model.module.low)


def test_a_batch_may_lie_on_both_sides_of_the_boundary_but_its_features_may_not():
    model, cond = experts_model(), analytic.condition(2)
    t = torch.tensor([0.2, 0.8])
    mixed = model.velocity(NOISE, t, cond)
    for i in range(2):
        alone = model.velocity(NOISE[i : i + 1], float(t[i]), cond.select(i))
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-7)
    with pytest.raises(AccVideoError, match="one side of its boundary 0.5"):
        model.features(NOISE, t, cond, [0])
    assert len(model.features(NOISE, 0.2, cond, [1])) == 1


def test_experts_have_their_own_guidance():
    cfg = Cfg(4.0, low=3.0)
    assert [cfg.at(t, 0.5) for t in (0.9, 0.5, 0.4)] == [4.0, 4.0, 3.0]
    assert not Cfg(1.0, low=3.0).none and Cfg(1.0, low=1.0).none


def test_recorded_trajectories_follow_the_guided_teacher(tmp_path: Path):
    model = gaussian_model(mean=0.0, std=0.25)
    spec = RecordSpec(5, 16, 16, steps=4, kept=4, dtype="float32", cfg=Cfg(3.0), shift=2.0)
    negative = prompt(0.25, "bad")
    dataset = record(model, [prompt(1.0, "good")], spec, tmp_path / "set", negative=negative)
    assert dataset.info.cfg == Cfg(3.0) and dataset.info.negative == negative.id
    assert dataset.info.time_grid[1] == pytest.approx(2 * 0.75 / (1 + 0.75))
    assert dataset.prompt(negative.id).text == "bad" and not dataset.verify()
    assert [p.text for p in dataset.prompts()] == ["good"]
    (id,) = dataset.ids()
    plain = RecordSpec(5, 16, 16, steps=4, kept=4, dtype="float32", cfg=Cfg(1.0), shift=2.0)
    other = gaussian_model(mean=0.25 + 3.0 * 0.75, std=0.25)
    reference = record(other, [prompt(0.0, "good")], plain, tmp_path / "reference")
    assert reference.info.cfg is None
    assert torch.allclose(dataset.read(id).latents, reference.read(id).latents, atol=1e-5)


def test_a_dataset_is_not_continued_with_another_guidance_or_negative(tmp_path: Path):
    model = gaussian_model()
    spec = RecordSpec(5, 16, 16, steps=4, kept=4, cfg=Cfg(3.0))
    good, bad = prompt(1.0, "good"), prompt(0.0, "bad")
    with pytest.raises(AccVideoError, match="cfg 3 needs a negative prompt"):
        record(model, [good], spec, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    record(model, [good], spec, tmp_path / "set", negative=bad)
    for changed, negative, named in (
        (replace(spec, cfg=Cfg(4.0)), bad, "cfg"),
        (spec, prompt(0.0, "worse"), "negative"),
    ):
        with pytest.raises(AccVideoError, match=f"cannot be continued with {named}"):
            record(model, [good], changed, tmp_path / "set", negative=negative)
    again = TrajectoryDataset.open(tmp_path / "set")
    assert again.info.cfg == Cfg(3.0)


def test_an_older_dataset_without_guidance_still_opens(tmp_path: Path):
    import json

    record(gaussian_model(), [prompt(1.0)], RecordSpec(5, 16, 16, steps=4, kept=4), tmp_path / "a")
    path = tmp_path / "a" / "dataset.json"
    data = json.loads(path.read_text())
    for name in ("cfg", "negative"):
        del data[name]
    path.write_text(json.dumps(data))
    assert TrajectoryDataset.open(tmp_path / "a").info.cfg is None


def test_a_lora_student_of_two_experts_has_adapters_on_both():
    from accvideo_core.distill.student import LoraSpec, Student, StudentInfo

    pair = Experts(tiny.network(0), tiny.network(1)).requires_grad_(False)
    family = replace(tiny.video_model().family, experts=2, boundary=0.9)
    teacher = VideoModel(pair, family, tiny.SPEC, source="pair")
    info = StudentInfo(
        family=family.name,
        base=teacher.fingerprint,
        key_times=(1.0, 0.5, 0.0),
        guidance=6.0,
        lora=LoraSpec(rank=2),
        latent_spec=tiny.SPEC,
        frames=5,
        height=16,
        width=16,
    )
    student = Student.create(teacher, info)
    sides = {name.split(".")[0] for name in student.trainable()}
    assert sides == {"high", "low"}
    cond, x = tiny.condition(), tiny.latents()
    for t in (0.95, 0.5):
        assert torch.allclose(student.velocity(x, t, cond), teacher.velocity(x, t, cond))
    student.velocity(x, 0.95, cond).square().mean().backward()
    moved = {n.split(".")[0] for n, p in student.trainable().items() if p.grad is not None}
    assert moved == {"high"}
