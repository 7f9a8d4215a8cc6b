"""Decoding on a card: faster ways give the same frames, and tiles keep to the memory they may."""

from __future__ import annotations

import pytest
import tiny_vaes
import torch

from accvideo_core.models.vae_speed import WAYS, fast_decoder

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_every_way_shows_the_same_frames(name: str, way: str, dtype: torch.dtype) -> None:
    if way == "compiled":
        pytest.importorskip("triton", reason="compiling needs Triton")
    vae, latents = tiny_vaes.vae(name), tiny_vaes.latents(3, 8, 8)
    plain = vae.decode(latents)
    vae.module.to(DEVICE, dtype)
    with fast_decoder(vae, way):
        found = vae.decode(latents.to(DEVICE))
    assert found.device.type == "cpu"
    assert (found - plain).abs().max() < (2e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_bytes_are_those_of_the_frames(name: str) -> None:
    vae, latents = tiny_vaes.vae(name), tiny_vaes.latents(3, 8, 8).to(DEVICE)
    vae.module.to(DEVICE)
    frames, found = vae.decode(latents), vae.decode_bytes(latents)
    assert found.is_pinned() and found.dtype == torch.uint8
    assert ((frames * 255).round() - found).abs().max() <= 1


@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_what_decoding_takes_is_what_was_counted(name: str) -> None:
    vae, latents = tiny_vaes.vae(name), tiny_vaes.latents(5, 32, 32).to(DEVICE)
    vae.module.to(DEVICE)
    vae.decode(latents[:, :, :1, :8, :8])  # kernels take memory of their own the first time
    footprint = vae.footprint
    assert footprint is not None
    tiling = footprint.choose(tuple(latents.shape), 2**40)
    counted = footprint.needed(tuple(latents.shape), tiling)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vae.decode(latents, free=2**40)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.5 * counted < taken < 1.5 * counted + 2**25
