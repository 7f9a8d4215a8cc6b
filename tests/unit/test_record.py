"""The recorder: checked against closed forms, and the same bytes however the work is cut up."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.flow import key_indices
from accvideo_core.latents import seeded_noise
from accvideo_core.models.video_model import VideoModel
from accvideo_core.monitor import Cancelled, Progress, silent
from accvideo_core.trajectories import (
    RecordSpec,
    TrajectoryDataset,
    record,
    record_id,
)
from accvideo_core.trajectories.record import (
    dataset_info,
    rounding_error,
)
from tests.analytic import (
    ANALYTIC,
    GaussianFlow,
    analytic_model,
    condition,
    exact_gaussian_state,
    exact_mixture_state,
    gaussian_model,
    mixture_model,
    prompts,
)


def spec(**changes: object) -> RecordSpec:
    settings = {"frames": 5, "height": 16, "width": 16, "steps": 4, "kept": 2, "batch_size": 2}
    return RecordSpec(**{**settings, **changes})  # type: ignore[arg-type]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder).items() if name.startswith("records")}


def expected_states(
    times: tuple[float, ...], noise: Tensor, mean: float, std: float
) -> list[Tensor]:
    """The Euler recursion of the Gaussian flow, by its own scalar formula in float64.

    Every state is affine in the noise, x_i = a_i + b_i x_1, and so is a step.
    """
    a, b = 0.0, 1.0
    states = [noise.double()]
    for t, t_next in zip(times, times[1:], strict=False):
        rate = (t - (1 - t) * std**2) / (((1 - t) * std) ** 2 + t**2)
        h = t_next - t
        a, b = a + h * (rate * (a - (1 - t) * mean) - mean), b * (1 + h * rate)
        states.append(a + b * noise.double())
    return states


def test_states_are_the_exact_euler_recursion_of_every_prompt(tmp_path: Path) -> None:
    given = prompts(3, offsets=True)
    settings = spec(steps=10, kept=(0, 1, 4, 10), dtype="float32", seed=5, samples_per_prompt=2)
    dataset = record(gaussian_model(0.5, 0.25), given, settings, tmp_path / "d")
    assert len(dataset) == 6
    for i, prompt in enumerate(given):
        for sample in range(2):
            found = dataset.read(record_id(5, prompt.id, sample))
            noise = seeded_noise((2, 2, 2, 2), 5, prompt.id, sample)
            states = expected_states(dataset.info.time_grid, noise, 0.5 + i, 0.25)
            assert torch.equal(found.latents[0], noise)
            for state, index in zip(found.latents, dataset.info.kept, strict=True):
                torch.testing.assert_close(state.double(), states[index], rtol=0, atol=2e-6)


@pytest.mark.parametrize("flow", ["gaussian", "mixture"])
def test_states_converge_to_the_exact_solution_at_first_order(tmp_path: Path, flow: str) -> None:
    model, exact = {
        "gaussian": (gaussian_model(), exact_gaussian_state),
        "mixture": (mixture_model(), exact_mixture_state),
    }[flow]
    errors = []
    for steps in (32, 64, 128):
        settings = spec(steps=steps, kept=4, dtype="float32")
        dataset = record(model, prompts(1), settings, tmp_path / str(steps))
        found = dataset.read(dataset.ids()[0])
        noise = found.latents[0].double()
        truth = torch.stack([exact(noise, t) for t in found.times])
        errors.append((found.latents.double() - truth)[1:].abs().amax().item())
    assert errors[0] < 0.1
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.6 < coarse / fine < 2.5


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_narrow_storage_rounds_once(tmp_path: Path, dtype: str, bits: int) -> None:
    wide = record(gaussian_model(), prompts(1), spec(dtype="float32"), tmp_path / "wide")
    narrow = record(gaussian_model(), prompts(1), spec(dtype=dtype), tmp_path / "narrow")
    a, b = (d.read(d.ids()[0]).latents for d in (wide, narrow))
    assert torch.equal(b, a.to(b.dtype))
    assert ((b.float() - a).abs() <= a.abs() * 2.0 ** -(bits + 1) + 1e-7).all()


def test_kept_states_by_number_and_by_index(tmp_path: Path) -> None:
    info = dataset_info(gaussian_model(), prompts(1), spec(steps=None, kept=5))
    assert info.kept == key_indices(20, 5) and info.time_grid == ANALYTIC.time_grid()
    assert info.times[0] == 1.0 and info.times[-1] == 0.0 and len(info.times) == 6
    with pytest.raises(AccVideoError, match="3 student steps do not divide the 4 teacher steps"):
        record(gaussian_model(), prompts(1), spec(kept=3), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_more_samples_and_more_prompts_leave_earlier_bytes_alone(tmp_path: Path) -> None:
    model, folder = gaussian_model(), tmp_path / "d"
    record(model, prompts(3), spec(), folder)
    first = snapshot(folder)
    record(model, prompts(3), spec(samples_per_prompt=2), folder)
    second = snapshot(folder)
    dataset = record(model, prompts(5), spec(samples_per_prompt=2), folder)
    third = snapshot(folder)
    assert len(dataset) == 10 and len(records(folder)) == 10
    for earlier, later in ((first, second), (second, third)):
        changed = [name for name in earlier if earlier[name] != later[name]]
        assert set(changed) <= {"prompts.jsonl", "plan.json"}
        assert later["prompts.jsonl"].startswith(earlier["prompts.jsonl"])
    # Lost records come back alike: the batches of earlier additions are as before.
    for path in (folder / "records").rglob("*.safetensors"):
        path.unlink()
    record(model, prompts(5), spec(samples_per_prompt=2), folder)
    assert snapshot(folder) == third


def test_a_batch_with_one_missing_record_writes_only_that(tmp_path: Path) -> None:
    model, folder = gaussian_model(), tmp_path / "d"
    dataset = record(model, prompts(4), spec(), folder)
    whole = snapshot(folder)
    paths = sorted((folder / "records").rglob("*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    paths[1].unlink()
    calls: list[Progress] = []
    record(model, prompts(4), spec(), folder, calls.append)
    assert snapshot(folder) == whole and dataset.verify() == []
    assert all(p.stat().st_mtime_ns == times[p] for p in paths if p != paths[1])
    assert len({p.step for p in calls} - {8}) <= 4  # one batch of four steps


def test_prompts_may_repeat_and_be_a_part_of_the_dataset(tmp_path: Path) -> None:
    model, folder = gaussian_model(), tmp_path / "d"
    assert len(record(model, [*prompts(3), *prompts(2)], spec(), folder)) == 3
    dataset = record(model, prompts(1), spec(samples_per_prompt=2), folder)
    new = {record_id(0, p.id, 1) for p in prompts(2)}  # the batch of prompts 0 and 1
    assert new <= set(dataset.ids()) and len(dataset) == 5


def test_the_monitor_hears_every_step_and_sees_the_clean_sample(tmp_path: Path) -> None:
    calls: list[Progress] = []
    model = gaussian_model()
    dataset = record(model, prompts(3), spec(), tmp_path / "d", calls.append)
    assert [p.step for p in calls] == list(range(1, 9)) and {p.total for p in calls} == {8}
    assert [p.metrics["records_done"] for p in calls] == [0, 0, 0, 2, 2, 2, 2, 3]
    for call in calls:
        assert call.stage == "record" and call.metrics["records_total"] == 3
        assert call.metrics["seconds_per_record"] > 0 and call.preview is not None
    # The first step's preview is x_1 - v(x_1, 1) = E[x_0] = 0.5, whatever the noise.
    preview = calls[0].preview
    assert preview is not None
    assert (preview() - 0.5).abs().max() < 1e-6
    last = calls[-1].preview
    assert last is not None
    final = dataset.read(record_id(0, prompts(3)[2].id, 0)).latents[-1:]
    assert torch.equal(last().to(final.dtype), final)
    calls.clear()
    record(model, prompts(3), spec(), tmp_path / "d", calls.append)
    assert [(p.step, p.metrics["records_done"]) for p in calls] == [(8, 3)]


def test_cancel_at_every_step_keeps_what_was_done(tmp_path: Path) -> None:
    model, given = gaussian_model(), prompts(3)
    whole = snapshot(record(model, given, spec(), tmp_path / "whole").folder)
    for stop in range(1, 9):
        folder = tmp_path / str(stop)

        def cancel(progress: Progress, stop: int = stop) -> None:
            if progress.step == stop:
                raise Cancelled

        with pytest.raises(Cancelled):
            record(model, given, spec(), folder, cancel)
        assert len(records(folder)) == (0 if stop < 4 else 2 if stop < 8 else 3)
        assert TrajectoryDataset.open(folder).verify() == []
        record(model, given, spec(), folder)
        assert snapshot(folder) == whole


def test_inference_mode_changes_nothing(tmp_path: Path) -> None:
    model = gaussian_model()
    outside = snapshot(record(model, prompts(2), spec(), tmp_path / "a").folder)
    with torch.inference_mode():
        inside = snapshot(record(model, prompts(2), spec(), tmp_path / "b").folder)
    with torch.enable_grad():
        model.module.requires_grad_(True)
        grad = snapshot(record(model, prompts(2), spec(), tmp_path / "c").folder)
    assert outside == inside == grad


def test_only_one_state_at_a_time_is_held(tmp_path: Path) -> None:
    """Of 20 states the recorder holds the kept ones and what one step needs, not all."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watching(GaussianFlow):
        def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            v = super().flow(x, t, cond)
            alive.append(weakref.ref(v))
            return v

    record(analytic_model(Watching(0.5, 0.25)), prompts(1), spec(steps=20), tmp_path / "d")
    assert len(alive) == 20 and most <= 2


class Breaks(GaussianFlow):
    """NaN for the prompt whose offset is 1, from t = 0.75 on (the third of four steps)."""

    def flow(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        v = super().flow(x, t, cond)
        assert cond.pooled is not None
        bad = (cond.pooled[:, 0] == 1) & (t.flatten() < 0.8)
        return torch.where(bad.reshape(-1, 1, 1, 1, 1), v * math.nan, v)


def test_what_is_not_finite_is_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, calls = prompts(3, offsets=True), []
    whole = record(gaussian_model(), given, spec(batch_size=3), tmp_path / "whole")
    model, folder = analytic_model(Breaks(0.5, 0.25)), tmp_path / "d"
    dataset = record(model, given, spec(batch_size=3), folder, calls.append)
    bad = record_id(0, given[1].id, 0)
    assert set(dataset.ids()) == set(whole.ids()) - {bad} and dataset.verify() == []
    for id in dataset.ids():  # the neighbour's NaN changes no number
        assert torch.equal(dataset.read(id).latents, whole.read(id).latents)
    assert calls[-1].metrics["records_skipped"] == 1 and calls[-1].metrics["records_done"] == 2
    assert len(caplog.messages) == 1
    for words in ("1 of 3", "after step 3 holds NaN", "prompt 'clip 1'", "lower the guidance"):
        assert words in caplog.messages[0]
    record(model, given, spec(batch_size=3), folder)
    assert len(dataset) == 2 and len(caplog.messages) == 2  # it is tried, and named, again


def test_an_error_when_nothing_is_finite_after_the_steps_that_were_needed(tmp_path: Path) -> None:
    model, folder = analytic_model(Breaks(0.5, 0.25)), tmp_path / "d"
    steps: list[int] = []
    with pytest.raises(AccVideoError, match="1 of 1 .*after step 3 holds NaN .*prompt 'clip 1'"):
        given = prompts(2, offsets=True)[1:]
        record(model, given, spec(), folder, lambda progress: steps.append(progress.step))
    assert records(folder) == {} and TrajectoryDataset.open(folder).verify() == []
    assert steps == [1, 2, 3, 4]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccVideoError, match="store in bfloat16 instead of float16"):
        record(gaussian_model(mean=1e6), prompts(1), spec(dtype="float16"), tmp_path / "d")
    assert records(tmp_path / "d") == {}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed 1 instead of 0"),
        ({"steps": 8}, "time_grid"),
        ({"kept": 4}, "kept"),
        ({"batch_size": 3}, "batch_size 3 instead of 2"),
        ({"dtype": "float32"}, "dtype float32 instead of bfloat16"),
        ({"frames": 9}, "frames 9 instead of 5"),
        ({"width": 32}, "width 32 instead of 16"),
        ({"guidance": 4.0}, "guidance 4.0 instead of None"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    tmp_path: Path, change: dict, difference: str
) -> None:
    folder = tmp_path / "d"
    record(gaussian_model(), prompts(1), spec(), folder)
    before = snapshot(folder)
    with pytest.raises(AccVideoError, match=f"{difference}.*another name"):
        record(gaussian_model(), prompts(2), spec(**change), folder)
    assert snapshot(folder) == before


def test_another_teacher_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    record(gaussian_model(std=0.25), prompts(1), spec(), folder)
    before = snapshot(folder)
    other: VideoModel = gaussian_model(std=0.26)
    with pytest.raises(AccVideoError, match=f"teacher {other.fingerprint} instead of"):
        record(other, prompts(2), spec(), folder)
    assert snapshot(folder) == before


def test_bad_input_is_one_sentence_and_makes_no_folder(tmp_path: Path) -> None:
    model = gaussian_model()
    cases = [
        ([], {}, "no prompts were given"),
        (prompts(1), {"frames": 6}, "6 frames do not fit this model, .*use 5 or 9"),
        (prompts(1), {"height": 20}, "height 20 is not a multiple of 8"),
        (prompts(1), {"dtype": "int8"}, "dtype 'int8' is unknown"),
    ]
    for given, change, match in cases:
        with pytest.raises(AccVideoError, match=match):
            record(model, given, spec(**change), tmp_path / "d")
        assert not (tmp_path / "d").exists()
    for name in ("samples_per_prompt", "steps", "batch_size"):
        with pytest.raises(AccVideoError, match=f"{name} is 0; it must be at least 1"):
            spec(**{name: 0})


def test_guidance_comes_from_the_settings_then_the_prompts(tmp_path: Path) -> None:
    given = [Prompt.of(f"p{i}", condition().with_guidance(4.0)) for i in range(2)]
    model = gaussian_model()
    assert dataset_info(model, given, spec()).guidance == 4.0
    assert dataset_info(model, given, spec(guidance=7)).guidance == 7.0
    dataset = record(model, given, spec(guidance=7), tmp_path / "d")
    for prompt in dataset.prompts():
        assert prompt.condition.guidance is not None and prompt.condition.guidance.tolist() == [7.0]
    mixed = [given[0], Prompt.of("q", condition().with_guidance(5.0))]
    with pytest.raises(AccVideoError, match=r"different guidance \[4.0, 5.0\]"):
        record(model, mixed, spec(), tmp_path / "e", silent)


def test_any_falling_grid_can_be_asked_for_and_all_states_kept(tmp_path: Path) -> None:
    times = (1.0, 0.9, 0.5, 0.45, 0.0)
    settings = spec(steps=None, times=times, kept="all", dtype="float32")
    dataset = record(gaussian_model(0.5, 0.25), prompts(1), settings, tmp_path / "d")
    assert dataset.info.time_grid == times == dataset.info.times
    found = dataset.read(dataset.ids()[0])
    assert found.times == times
    for state, exact in zip(
        found.latents, expected_states(times, found.latents[0], 0.5, 0.25), strict=True
    ):
        torch.testing.assert_close(state.double(), exact, rtol=0, atol=2e-6)
    with pytest.raises(AccVideoError, match="time_grid"):
        record(gaussian_model(), prompts(1), spec(steps=4, kept="all"), tmp_path / "d")


def test_a_grid_that_is_none_or_said_twice_is_refused() -> None:
    for changes, match in (
        ({"times": (1.0, 0.0)}, "steps is 4 beside times"),
        ({"steps": None, "shift": 3.0, "times": (1.0, 0.0)}, "shift is 3.0 beside times"),
        ({"steps": None, "times": (0.9, 0.0)}, "from 0.9 to 0"),
        ({"steps": None, "times": (1.0, 0.1)}, "from 1 to 0.1"),
        ({"steps": None, "times": (1.0, 0.5, 0.5, 0.0)}, "must fall strictly"),
    ):
        with pytest.raises(AccVideoError, match=match):
            spec(**changes)
    with pytest.raises(AccVideoError, match="kept is 'some'"):
        dataset_info(gaussian_model(), prompts(1), spec(kept="some"))


def test_rounding_error_is_the_relative_error_of_the_storage_dtype() -> None:
    states = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    states[1] *= 100
    for dtype, bits in ((torch.bfloat16, 7), (torch.float16, 10)):
        found = rounding_error(states, dtype)
        exact = (states.double() - states.to(dtype).double()).norm(dim=1) / states.double().norm(
            dim=1
        )
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)
        # Rounding to nearest is off by at most half of the last bit, evenly spread.
        assert (found < 2.0 ** -(bits + 1)).all() and (found > 2.0 ** -(bits + 3)).all()
    assert rounding_error(states, torch.float32).tolist() == [0, 0]
    assert rounding_error(torch.zeros(1, 3), torch.bfloat16).tolist() == [0]


def test_every_record_says_what_rounding_cost_it(tmp_path: Path) -> None:
    wide = record(gaussian_model(), prompts(3), spec(dtype="float32"), tmp_path / "wide")
    narrow = record(gaussian_model(), prompts(3), spec(), tmp_path / "narrow")
    assert {head.rounding for head in wide.headers()} == {0.0}
    for head in narrow.headers():
        errors = rounding_error(wide.read(head.id).latents, torch.bfloat16)
        assert head.rounding == float(f"{errors.square().mean().sqrt().item():.2e}")
        assert head.rounding == narrow.read(head.id).rounding
