"""What is on the device when: text encoders, the network, the VAE; and what does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from accvideo_core import sampling_room
from accvideo_core.conditioning import Condition
from accvideo_core.errors import AccVideoError
from accvideo_core.guidance import Cfg, Guided
from accvideo_core.models.fitting import Sampling, Savings
from accvideo_core.models.loading import load_teacher
from accvideo_core.models.vae import VideoVAE
from accvideo_core.sampling import SamplePlan
from accvideo_core.sampling_room import Need, Room, room_to_encode
from accvideo_core.speed import Speed

PLAN = SamplePlan(frames=5, height=16, width=16)
CPU = torch.device("cpu")
LARGE = 10**12


def needed(batch: int = 1, **savings: Any) -> int:
    sampling = Sampling(tiny.video_model(), tiny.condition(1), (5, 16, 16))
    return sampling.takes(Savings(batch=batch, **savings)).peak


def weights() -> int:
    return sum(p.numel() * p.element_size() for p in tiny.network().parameters())


def test_what_is_left_beside_a_sampling_is_what_it_does_not_take() -> None:
    room = Need(tiny.video_model(), tiny.condition(1), PLAN, 1, Speed(), CPU).room(LARGE)
    buffers = sum(b.numel() * b.element_size() for b in tiny.network().buffers())
    assert room == Room(LARGE + weights() + buffers - needed(), LARGE)


def test_a_sampling_that_does_not_fit_is_refused_with_what_would() -> None:
    model, cond = tiny.video_model(), tiny.condition(1)
    free = needed(batch=3) - weights() - 1000
    with pytest.raises(AccVideoError, match="set batch to 2"):
        Need(model, cond, PLAN, 3, Speed(), CPU).room(free)
    with pytest.raises(AccVideoError, match="set weights to fp8"):
        Need(model, cond, PLAN, 3, Speed(), CPU).room(1000)
    guided = Guided(model, cond, Cfg(3.0), "batched")
    free = needed(batch=2) - weights() - 1000
    with pytest.raises(AccVideoError, match="set cfg_batch to in turn"):
        Need(guided, cond, PLAN, 1, Speed(cfg_batch="batched"), CPU).room(free)


def test_where_nothing_tells_what_is_free_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling_room, "free_memory", lambda _device: None)
    room = Need(tiny.video_model(), tiny.condition(1), PLAN, 1, Speed(), CPU).room()
    assert room == Room(None, None)
    assert room.decodes_beside(SimpleNamespace(footprint=None), PLAN)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_random_pipeline(tmp_path_factory.mktemp("models") / "teacher")


def test_clips_are_decoded_beside_the_network_only_where_that_costs_no_tiles(
    pipeline: Path,
) -> None:
    vae: VideoVAE = load_teacher(pipeline).vae
    plan = SamplePlan(frames=5, height=512, width=512)
    footprint = vae.footprint
    assert footprint is not None
    shape = (1, *vae.spec.shape(5, 512, 512))
    takes = footprint.needed(shape, footprint.choose(shape, LARGE))
    assert Room(takes, LARGE).decodes_beside(vae, plan)
    assert not Room(takes - 1, LARGE).decodes_beside(vae, plan)
    # Where there is no better place, tiles are no reason to wait.
    few = footprint.needed(shape, footprint.choose(shape, takes - 1))
    assert few < takes and Room(few, takes - 1).decodes_beside(vae, plan)
    with pytest.raises(AccVideoError, match="in the best of tiles"):
        Room(100, 100).decodes_beside(vae, plan)


def test_the_network_makes_room_for_text_encoders_that_do_not_fit_beside_it(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[Any, str]] = []
    monkeypatch.setattr(
        sampling_room, "move", lambda modules, device: moves.append((modules, str(device)))
    )
    files = [*pipeline.glob("text_encoder*/*.safetensors")]
    size = sum(path.stat().st_size for path in files)
    assert len(files) == 2
    module, far = object(), torch.device("meta")
    teacher: Any = SimpleNamespace(
        model=SimpleNamespace(module=module, device=far),
        folder=pipeline, has_text_encoders=True, device=None,
    )  # fmt: skip
    with room_to_encode(teacher, free=size):
        assert moves == []
    with pytest.raises(KeyError), room_to_encode(teacher, free=size - 1):
        assert moves == [([module], "cpu")] and teacher.device == far
        raise KeyError
    assert moves == [([module], "cpu"), ([module], "meta")]


def test_a_condition_of_more_tokens_takes_more() -> None:
    long = Condition(**{**tiny.condition(1, length=400).tensors()})
    few, many = (
        Need(tiny.video_model(), cond, PLAN, 1, Speed(), CPU).room(LARGE)
        for cond in (tiny.condition(1), long)
    )
    assert few.beside is not None and many.beside is not None and many.beside < few.beside
