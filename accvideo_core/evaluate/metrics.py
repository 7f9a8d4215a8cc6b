"""Figures of merit: every one a plain function of tensors, with a known answer for a planted case.

What is per clip comes back per clip, so that means, intervals and paired differences are taken by
whoever asks, over the clips they ask for.

Shapes: N clips, T frames, H, W pixels, 3 colours in [0, 1]; D feature width; C, T, H, W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AccVideoError

_LUMA = (0.2126, 0.7152, 0.0722)
_Z95 = 1.959964


def prompt_hits(predicted: Tensor, wanted: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Which clips show what their prompt says: 0 or 1 for each attribute, and for "all" together.

    Args:
        predicted: class indices [N, A].
        wanted: class indices [N, A].
        names: A attribute names.

    Returns:
        float32 [N] by name; the mean is the prompt accuracy.
    """
    _same_shape(predicted, wanted, "predicted and wanted classes")
    hits = (predicted == wanted).float()
    return {**{name: hits[:, i] for i, name in enumerate(names)}, "all": hits.amin(dim=1)}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features, |m_a - m_b|^2 + tr(A + B - 2 (AB)^1/2).

    Heusel et al. 2017 (FID), Eq. 6, on whatever features are given; on the tiny world's classifier
    it is the "tiny FVD", which is not FVD (that needs I3D features). In float64; the trace of
    (AB)^1/2 is that of the symmetric (A^1/2 B A^1/2)^1/2, so two symmetric eigendecompositions are
    enough. The estimate grows as clips get fewer: compare only figures with equal N.

    Args:
        a: features [N, D], N at least 2.
        b: features [M, D], M at least 2.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise AccVideoError(
            f"features of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared; "
            "both must be [clips, width] of the same width and at least 2 clips"
        )
    mean_a, cov_a = _gaussian(a)
    mean_b, cov_b = _gaussian(b)
    root_a = _symmetric_sqrt(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    spread = cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float((mean_a - mean_b).square().sum() + spread))


def patch_distance(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """Sliced Wasserstein distance of two sets of pixel patches: fine detail, no network needed.

    Karras et al. 2018 (Progressive GAN), Sec. 5, without the pyramid: the mean over random unit
    directions of the mean distance between the sorted projections. Blur narrows the projections,
    and a texture that turned grey loses their two humps; both are far from the sharp set.

    Args:
        a, b: patches [N, P] of equal shape, see `patches`.
    """
    _same_shape(a, b, "patches")
    generator = torch.Generator().manual_seed(0)
    axes = F.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0)
    sorted_a, sorted_b = ((x.float() @ axes).sort(dim=0).values for x in (a, b))
    return float((sorted_a - sorted_b).abs().mean())


def patches(frames: Tensor, generator: torch.Generator, count: int = 32, size: int = 7) -> Tensor:
    """`count` random patches of every clip, [N * count, size * size * 3]."""
    _check_frames(frames)
    n, length, height, width, _ = frames.shape
    size = min(size, height, width)

    def draw(bound: int) -> Tensor:
        return torch.randint(bound, (n, count), generator=generator)

    t, y, x = draw(length), draw(height - size + 1), draw(width - size + 1)
    span = torch.arange(size)
    clip = torch.arange(n).reshape(n, 1, 1, 1)
    rows = y[..., None, None] + span[:, None]
    columns = x[..., None, None] + span[None, :]
    return frames[clip, t[..., None, None], rows, columns].reshape(n * count, -1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per clip in dB [N]; equal clips give 100 dB, not infinity."""
    _same_shape(a, b, "frames")
    mse = (a.float() - b.float()).square().flatten(1).mean(dim=1)
    return -10 * mse.clamp(min=1e-10).log10()


def latent_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance per clip between model-space latents [N, C, T, H, W], [N]."""
    _same_shape(a, b, "latents")
    return (a.float() - b.float()).square().flatten(1).mean(dim=1)


def luma(frames: Tensor) -> Tensor:
    """Brightness by ITU-R BT.709 of frames [N, T, H, W, 3], [N, T, H, W]."""
    _check_frames(frames)
    return frames.float() @ torch.tensor(_LUMA, device=frames.device)


def edge_sharpness(frames: Tensor, share: float = 0.05) -> Tensor:
    """Mean luma step between neighbouring pixels at the strongest `share` of edges, per clip [N].

    Neighbour differences see the finest detail there is; a blur spreads an edge over more pixels
    and so lowers it. Noise and ringing raise it: sharp enough is what the reference has.
    """
    bright = luma(frames)
    steps = torch.cat(
        [bright.diff(dim=2).abs().flatten(1), bright.diff(dim=3).abs().flatten(1)], dim=1
    )
    count = max(1, round(share * steps.shape[1]))
    return steps.topk(count, dim=1).values.mean(dim=1)


def detail_contrast(frames: Tensor, size: int = 9) -> Tensor:
    """Local contrast of the still part of a clip, per clip [N].

    RMS of the median picture over time after its local mean (`size` x `size` pixels) is taken off.
    A background texture counts in full, a texture that turned grey not at all, and what moves
    hardly.
    """
    still = luma(frames).median(dim=1).values[:, None]
    pad = size // 2
    padded = F.pad(still, (pad, pad, pad, pad), mode="replicate")
    local = F.avg_pool2d(padded, 2 * pad + 1, stride=1)
    return (still - local).square().flatten(1).mean(dim=1).sqrt()


def motion_energy(frames: Tensor) -> Tensor:
    """Mean absolute change from frame to frame, per clip [N]; 0 for a still clip."""
    _check_frames(frames)
    if frames.shape[1] < 2:
        return torch.zeros(len(frames))
    return frames.float().diff(dim=1).abs().flatten(1).mean(dim=1)


def diversity(samples: Tensor, per_prompt: int) -> Tensor:
    """Mean RMS distance between the samples of one prompt, one figure per prompt [N / per_prompt].

    0 when all samples of a prompt are equal; sqrt(2) s for independent samples of deviation s.

    Args:
        samples: [N, ...], the samples of one prompt next to one another.
        per_prompt: samples of each prompt, at least 2.
    """
    if per_prompt < 2 or len(samples) % per_prompt:
        raise AccVideoError(
            f"{len(samples)} samples at {per_prompt} per prompt have no diversity; "
            "it needs at least 2 samples of every prompt"
        )
    grouped = samples.float().reshape(len(samples) // per_prompt, per_prompt, -1)
    squares = [
        (grouped[:, i] - grouped[:, j]).square().mean(dim=1).sqrt()
        for i in range(per_prompt)
        for j in range(i)
    ]
    return torch.stack(squares).mean(dim=0)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its bootstrap standard error."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - _Z95 * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + _Z95 * self.error

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    statistic: Callable[[Tensor], float],
    units: int,
    generator: torch.Generator,
    *,
    per_unit: int = 1,
    draws: int = 500,
) -> Interval:
    """The statistic of all clips and its standard error under resampling (Efron 1979).

    A normal interval around the full sample's value, not percentiles: a Frechet distance of a
    resample is biased upwards (clips repeat), and percentiles would inherit that bias.
    For a paired difference let `statistic` take both figures of the same clips.

    Args:
        statistic: clip indices [n] -> figure.
        units: how many independent units (prompts) there are.
        generator: source of the resampling.
        per_unit: clips of one unit; clip indices of unit u are u * per_unit and the next ones.
    """
    if units < 2:
        raise AccVideoError(f"an interval over {units} prompt needs at least 2 prompts")
    inside = torch.arange(per_unit)

    def value(chosen: Tensor) -> float:
        return statistic((chosen[:, None] * per_unit + inside).flatten())

    resampled = [
        value(torch.randint(units, (units,), generator=generator)) for _ in range(draws)
    ]
    error = torch.tensor(resampled, dtype=torch.float64).std()
    return Interval(value(torch.arange(units)), float(error))


def gap_closed(student: float, few: float, full: float) -> float | None:
    """Share of the way from the teacher at few steps to the teacher at all steps; 1 is all of it.

    None where the teacher loses nothing at few steps, so that there is no gap to close.
    """
    return (few - student) / (few - full) if few != full else None


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    return mean, centred.T @ centred / (len(wide) - 1)


def _symmetric_sqrt(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check_frames(frames: Tensor) -> None:
    if frames.dim() != 5 or frames.shape[-1] != 3:
        raise AccVideoError(f"frames have shape {tuple(frames.shape)}; expected [N, T, H, W, 3]")


def _same_shape(a: Tensor, b: Tensor, what: str) -> None:
    if a.shape != b.shape:
        raise AccVideoError(
            f"{what} have different shapes, {tuple(a.shape)} and {tuple(b.shape)}; "
            "compare the same clips at the same size"
        )
