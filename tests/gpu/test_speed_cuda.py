"""Speed on a card: everything together gives what the model gives, and what waits stays away."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from tiny_families import Case, case

from accvideo_core.errors import AccVideoError
from accvideo_core.models.swapping import SLOTS
from accvideo_core.sampling import sample
from accvideo_core.speed import Speed, sped_up
from accvideo_core.video import read_video

DEVICE = torch.device("cuda")
TIMES = (1.0, 0.6, 0.0)
WAYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "math": {"attention": "math"},
    "swapped": {"swap_blocks": 3},
    "compiled": {"compile": True},
    "compiled and swapped": {"compile": True, "swap_blocks": 2},
    "graphs": {"cuda_graphs": True},
    "compiled graphs": {"compile": True, "cuda_graphs": True},
}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def sampled(made: Case) -> torch.Tensor:
    return sample(made.model, made.condition, made.x, TIMES)


def wide() -> Case:
    """A Wan of 10 blocks that hold nearly all of its weights."""
    made = case("wan_t2v")
    config = dict(made.model.module.config)  # type: ignore[arg-type]
    sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 10}
    kept = {name: x for name, x in config.items() if not name.startswith("_")}
    network = WanTransformer3DModel(**{**kept, **sizes}).eval().requires_grad_(False)
    return replace(made, model=replace(made.model, module=network))


@pytest.mark.parametrize("name", ["hunyuan_video", "wan_t2v", "wan22_i2v", "cogvideox_5b"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_exact_speed_changes_no_result(name: str, way: dict[str, Any]) -> None:
    if way.get("compile"):
        pytest.importorskip("triton", reason="compiling needs Triton")
    made = case(name)
    made.model.module.to(DEVICE)
    plain = sampled(made)
    with sped_up(made.model, Speed(**way)):
        # Twice, because graphs are replayed and blocks come back.
        found = [sampled(made), sampled(made)]
    assert all((x - plain).abs().max() < 2e-3 * plain.abs().max() for x in found)
    assert torch.equal(sampled(made), plain)
    assert all(p.device.type == DEVICE.type for p in made.model.module.parameters())


def test_a_network_in_main_memory_is_sampled_on_the_card_and_goes_back() -> None:
    made = case("hunyuan_video")
    plain = sampled(made)
    with sped_up(made.model, Speed(swap_blocks=4), DEVICE):
        assert made.model.device.type == DEVICE.type
        found = sampled(made)
    assert (found - plain).abs().max() < 2e-3 * plain.abs().max()
    assert all(p.device.type == "cpu" for p in made.model.module.parameters())
    assert torch.equal(sampled(made), plain)


def test_blocks_that_wait_take_the_memory_of_two() -> None:
    made = wide()
    block = sum(4 * p.numel() for p in made.model.module.get_submodule("blocks.0").parameters())
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    with sped_up(made.model, Speed(attention="sdpa", swap_blocks=10), DEVICE):
        sampled(made)
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    assert SLOTS * block <= peak < (SLOTS + 2) * block


def test_fp8_goes_with_compiled_code_and_graphs() -> None:
    pytest.importorskip("triton", reason="compiling needs Triton")
    made = case("hunyuan_video")
    made.model.module.to(DEVICE, torch.bfloat16)
    plain = sampled(made)
    try:
        with sped_up(made.model, Speed(fp8=True)):
            rounded = sampled(made)
    except AccVideoError as error:
        pytest.skip(str(error))
    with sped_up(made.model, Speed(fp8=True, compile=True, cuda_graphs=True)):
        found = sampled(made)
    assert (found - plain).norm() < 2 * (rounded - plain).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_divide_a_clip(tmp_path: Path, root: Path) -> None:
    teacher = tiny.save_random_pipeline(tmp_path / "teacher")
    size = ["--frames", "5", "--height", "16", "--width", "16", "--steps", "2"]
    words = ["--teacher", str(teacher), *size, "--prompt", "a red circle", "--dtype", "float32"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {
        "one": [sys.executable],
        "two": [sys.executable, *torchrun],
    }
    for name, start in ways.items():
        more = ["--sequence-parallel", "2"] if name == "two" else []
        command = [*start, "-m", "accvideo_core.cli", "sample", str(tmp_path / name), *words, *more]
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=300, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_video(*(tmp_path / name).glob("*.mp4"))[0] for name in ways)
    assert (one - two).abs().mean() < 0.5 / 255


def test_a_sampling_that_does_not_fit_names_what_would() -> None:
    from accvideo_core.sampling import SamplePlan
    from accvideo_core.sampling_room import Need

    made = case("hunyuan_video")
    made = replace(made, condition=made.condition.select(0))
    need = Need(made.model, made.condition, SamplePlan(5, 16, 16), 1, Speed(), DEVICE)
    with pytest.raises(AccVideoError, match="swap_blocks"):
        need.room(need.sampling.takes(need.savings).peak - 1)
    assert need.room().beside is not None
