"""TinyDecoder: latents to frames by a network of a few million weights, many times faster than the
VAE and a little blurred: for previews, and for results where speed counts most.

The network is TAEHV's (github.com/madebyollin/taehv), in whose files users have it. It computes
frame by frame in two dimensions. Time enters where a block sees the frame before the one that it
works on, and where a layer makes two frames of one. A clip can therefore be decoded in pieces that
hand on the last frame of every block, and that changes nothing.

Shapes: B batch, C channels, T latent frames, H, W latent size; N = B T frames at work, D width of a
layer. Frames are [B, T, H, W, 3], and there T, H and W count frames and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AccVideoError
from ..latents import LatentSpec
from .checkpoint import open_checkpoint
from .video_model import VideoModel

PIXELS_AT_ONCE = 2**20
"""What a pass makes where the caller does not say, and at least one latent frame's."""
_STAGES = 3
"""Each doubles height and width."""
_FIRST, _LAST = "decoder.1.weight", "decoder.22.weight"
_GROWS = tuple(f"decoder.{7 + 6 * stage}.conv.weight" for stage in range(_STAGES))
_SUPER = "decoder.0.weight"
"""A tensor that only the larger variants have."""


@dataclass(frozen=True, slots=True)
class Published:
    """What a published file's name says about it and its tensors do not."""

    start: str
    """Of the name."""
    families: tuple[str, ...]
    """Starts of the names of the families whose latents it decodes."""
    vae_space: bool = False
    """Whether it takes latents as the VAE makes them, and not as the network does."""
    whole_pairs: bool = False
    """Whether all frames of an even number of latent frames are kept, as that family's VAE does."""


_WAN_21 = ("wan_", "wan22_t2v", "wan22_i2v")
PUBLISHED = (
    Published("taehv", ("hunyuan_video",)),
    Published("taew2_1", _WAN_21),
    Published("taew2_2", ("wan22_ti2v",)),
    Published("taecvx", ("cogvideox",), vae_space=True, whole_pairs=True),
    Published("lighttaew2_1", _WAN_21, vae_space=True),
    Published("lighttaew2_2", ("wan22_ti2v",), vae_space=True),
)
"""Those of the families here; lighttae* are LightX2V's, the others TAEHV's own."""


class TinyDecoder:
    """Decodes what a VideoVAE decodes, and encodes nothing."""

    def __init__(self, module: TinyNetwork, spec: LatentSpec, published: Published) -> None:
        self.module = module.eval().requires_grad_(False)
        self.spec = spec
        self.published = published

    def decode(self, x: Tensor, at_once: int | None = None) -> Tensor:
        """Model-space latents [B, C, T, H, W] -> frames [B, T, H, W, 3], float32, on the CPU.

        `at_once` is how many latent frames are decoded together, which changes the memory that it
        takes and not the result; None is as many as make a million pixels, and at least one.
        """
        self.spec.check(x)
        if at_once is not None and at_once < 1:
            raise AccVideoError(f"at_once is {at_once}; it must be at least 1")
        # Plain tensors come out even inside inference mode, as a VideoVAE's.
        with torch.inference_mode(False), torch.no_grad():
            return torch.stack([self._clip(each, at_once) for each in x])

    def _clip(self, x: Tensor, at_once: int | None) -> Tensor:
        """[C, T, H, W] -> [T, H, W, 3]."""
        weight = next(self.module.parameters())
        z = self.spec.from_model(x[None].float())[0] if self.published.vae_space else x
        z = z.to(weight.device, weight.dtype).movedim(1, 0)
        pixels = self.module.frames * x[0, 0].numel() * self.module.scale**2
        size = at_once or max(1, PIXELS_AT_ONCE // pixels)
        before: dict[int, Tensor] = {}
        parts = [self.module(part, before).movedim(1, -1).float().cpu() for part in z.split(size)]
        frames = torch.cat(parts).clamp(0, 1)
        return frames[self._surplus(len(z)) :]

    def _surplus(self, latent_frames: int) -> int:
        """Frames at the start that the first latent frame, which stands for one, has too many."""
        keeps = self.published.whole_pairs and latent_frames % 2 == 0
        return 0 if keeps else self.module.frames - 1


class TinyNetwork(nn.Module):
    """TAEHV's decoder, its layers numbered as in the published files."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes` are those of a file's tensors, by name."""
        super().__init__()
        channels = shapes[_FIRST][1]
        self.patch = math.isqrt(shapes[_LAST][0] // 3)
        """The last layer makes `patch` x `patch` pixels of each of its places."""
        grows = [shapes[name][0] // shapes[name][1] for name in _GROWS]
        self.frames = math.prod(grows)
        """Frames of a latent frame."""
        self.scale = 2**_STAGES * self.patch
        """Pixels of a latent, along H and along W."""
        width = shapes[_FIRST][0]
        layers: list[nn.Module] = [_Soft(), _conv(channels, width), nn.ReLU()]
        for stage, grow in enumerate(grows):
            after = shapes[f"decoder.{8 + 6 * stage}.weight"][0]
            layers += [_Remembering(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), _Growing(width, grow)]
            layers.append(_conv(width, after, bias=False))
            width = after
        layers += [nn.ReLU(), _conv(width, 3 * self.patch**2)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, x: Tensor, before: dict[int, Tensor]) -> Tensor:
        """The next latent frames [N, C, H, W] of one clip -> frames [N', 3, H', W'].

        `before` has each block's last frame so far, by its number, and is brought up to date.
        """
        for index, layer in enumerate(self.decoder):
            if isinstance(layer, _Remembering):
                first = before.get(index, torch.zeros_like(x[:1]))
                before[index] = x[-1:].clone()  # which does not keep the others
                x = layer(x, torch.cat([first, x[:-1]]))
            else:
                x = layer(x)
        return F.pixel_shuffle(x, self.patch)


class _Soft(nn.Module):
    """Brings outliers to between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class _Remembering(nn.Module):
    """A residual block that sees each frame beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(_conv(2 * width, width), nn.ReLU()),
            *(_conv(width, width), nn.ReLU()),
            _conv(width, width),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x and the frames before each, both [N, D, H, W]."""
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class _Growing(nn.Module):
    """Makes `count` frames of each: [N, D, H, W] -> [N * count, D, H, W]."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * count, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


def _conv(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


def load_tiny_decoder(
    path: Path,
    model: VideoModel,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TinyDecoder:
    """The tiny decoder in a published file (.pth or .safetensors) for the latents of `model`.

    Args:
        path: its tensors tell the network's shape. HunyuanVideo's, Wan 2.1's and CogVideoX's have
            one shape: the name tells them apart, where it is the published one.
        device: None is the model's.
        dtype: None is the file's.

    Raises:
        AccVideoError: the file is missing, damaged, foreign or for other latents.
    """
    path, spec = Path(path), model.latent_spec
    published = _published(path, model)
    with torch.inference_mode(False), open_checkpoint(path) as checkpoint:
        shapes = checkpoint.shapes
        if any(name not in shapes or not shapes[name] for name in (_FIRST, _LAST, *_GROWS)):
            variant = "the larger variant of one" if _SUPER in shapes else "none"
            raise AccVideoError(
                f"{path.name!r} is no tiny decoder that can be read, but {variant}; choose one of "
                f"{_names(model)}"
            )
        try:
            with torch.device("meta"):
                module = TinyNetwork(shapes)
            weights = {name: checkpoint.get(name).clone() for name in module.state_dict()}
            module.load_state_dict(weights, assign=True)
        except (KeyError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise AccVideoError(
                f"{path.name!r} lacks weights of a tiny decoder, or has some of other shapes; "
                "download it again"
            ) from error
        _check_latents(path, module, shapes[_FIRST][1], model)
        return TinyDecoder(module.to(device or model.device, dtype), spec, published)


def _published(path: Path, model: VideoModel) -> Published:
    """What is known of a file by this name; of an unknown one, what holds for the family's own."""
    name, family = path.name.lower(), model.family.name
    known = [each for each in PUBLISHED if name.startswith(each.start)]
    for each in known or [each for each in PUBLISHED if "light" not in each.start]:
        if family.startswith(each.families):
            return each
    if known:
        raise AccVideoError(
            f"{path.name!r} decodes the latents of another model than "
            f"{model.family.title or family}; choose {_names(model)}"
        )
    return Published("", ())


def _check_latents(path: Path, module: TinyNetwork, channels: int, model: VideoModel) -> None:
    spec = model.latent_spec
    here = (channels, module.frames, module.scale)
    if here != (spec.channels, spec.stride_t, spec.stride_hw):
        raise AccVideoError(
            f"{path.name!r} decodes latents of {channels} channels to {module.frames} frames of "
            f"{module.scale} x {module.scale} pixels, and {model.family.title or 'this model'} has "
            f"{spec.channels} channels for {spec.stride_t} frames of {spec.stride_hw} x "
            f"{spec.stride_hw}; choose {_names(model)}"
        )


def _names(model: VideoModel) -> str:
    """The files that go with a model, for messages."""
    names = [each.start for each in PUBLISHED if model.family.name.startswith(each.families)]
    return " or ".join(names) or "one that was made for its VAE"
