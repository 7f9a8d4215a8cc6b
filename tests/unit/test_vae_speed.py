"""A VAE's decoder with channels last or compiled: the same frames, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_vaes
import torch
from torch import nn

from accvideo_core.errors import AccVideoError
from accvideo_core.latents import LatentSpec
from accvideo_core.models.vae import VideoVAE
from accvideo_core.models.vae_speed import COMPILED, fast_decoder


class Compiler:
    """A backend of torch.compile that counts what it is given, and computes it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def laid_out(vae: VideoVAE) -> set[bool]:
    """Whether weights of convolutions in the decoder lie with their channels last."""
    weights = [p for p in vae.module.decoder.parameters() if p.dim() == 5 and min(p.shape) > 1]
    return {p.is_contiguous(memory_format=torch.channels_last_3d) for p in weights}


@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_channels_last_gives_the_same_frames(name: str) -> None:
    vae, latents = tiny_vaes.vae(name), tiny_vaes.latents(3, 4, 4)
    plain = vae.decode(latents)
    with fast_decoder(vae, "channels_last"):
        assert laid_out(vae) == {True}
        assert (vae.decode(latents) - plain).abs().max() < 1e-5
    assert laid_out(vae) == {False}
    assert torch.equal(vae.decode(latents), plain)


@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_a_compiled_decoder_gives_the_same_frames(name: str) -> None:
    vae, latents, compiler = tiny_vaes.vae(name), tiny_vaes.latents(3, 4, 4), Compiler()
    plain, keys = vae.decode(latents, free=10**9), set(vars(vae.module.decoder))
    with fast_decoder(vae, "compiled", compiler):
        assert (vae.decode(latents, free=10**9) - plain).abs().max() < 1e-5
        met = compiler.graphs
        vae.decode(latents, free=10**9)
        assert compiler.graphs == met > 0  # and is compiled once
    assert set(vars(vae.module.decoder)) == keys
    assert not any("forward" in vars(module) for module in vae.module.modules())
    assert torch.equal(vae.decode(latents, free=10**9), plain)


@pytest.mark.parametrize("name", tiny_vaes.MAKERS)
def test_each_decoder_has_blocks_that_are_compiled(name: str) -> None:
    decoder = tiny_vaes.vae(name).module.decoder
    assert any(type(module).__name__ in COMPILED for module in decoder.modules())


def test_nothing_is_left_after_an_error() -> None:
    vae = tiny_vaes.vae("wan")
    with pytest.raises(KeyError), fast_decoder(vae, "channels_last"):
        raise KeyError
    assert laid_out(vae) == {False}


def test_a_plain_decoder_is_left_alone() -> None:
    vae = VideoVAE(nn.Linear(1, 1), LatentSpec(4, stride_t=4, stride_hw=8))
    with fast_decoder(vae, "plain"):
        assert isinstance(vae.module, nn.Linear)


@pytest.mark.parametrize(
    ("how", "message"),
    [("quick", "'quick' is unknown; choose plain, channels_last or compiled"),
     ("compiled", "a Linear has no decoder that can be compiled; leave it plain")],
)  # fmt: skip
def test_what_cannot_be_is_refused(how: str, message: str) -> None:
    vae = VideoVAE(nn.Linear(1, 1), LatentSpec(4, stride_t=4, stride_hw=8))
    with pytest.raises(AccVideoError, match=message), fast_decoder(vae, how):
        pass
