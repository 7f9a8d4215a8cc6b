"""Every figure against a case whose answer is known without it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import metrics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squares(n: int = 3, size: int = 32) -> torch.Tensor:
    """White squares on black, still, [n, 4, size, size, 3]."""
    frames = torch.zeros(n, 4, size, size, 3)
    for i in range(n):
        frames[i, :, 8 + i : 20 + i, 10:22] = 1.0
    return frames


def blurred(frames: torch.Tensor) -> torch.Tensor:
    n, t, h, w, c = frames.shape
    flat = frames.permute(0, 1, 4, 2, 3).reshape(-1, 1, h, w)
    soft = F.avg_pool2d(F.pad(flat, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return soft.reshape(n, t, c, h, w).permute(0, 1, 3, 4, 2)


def mosaic(contrast: float, n: int = 2) -> torch.Tensor:
    bits = (torch.rand(n, 8, 8, generator=generator(3)) < 0.5).float() - 0.5
    grey = 0.5 + contrast * bits.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return grey[:, None, :, :, None].expand(n, 4, 32, 32, 3)


def test_prompt_hits_count_attributes_and_all_of_them():
    wanted = torch.tensor([[0, 1], [0, 1], [2, 2]])
    predicted = torch.tensor([[0, 1], [0, 2], [1, 0]])
    hits = metrics.prompt_hits(predicted, wanted, ("shape", "colour"))
    assert hits["shape"].tolist() == [1, 1, 0]
    assert hits["colour"].tolist() == [1, 0, 0]
    assert hits["all"].tolist() == [1, 0, 0]


def test_frechet_distance_of_gaussians_in_closed_form():
    # For commuting covariances the distance is |dm|^2 + sum (s_a - s_b)^2.
    scale_a, scale_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 1.0, 0.5])
    shift = torch.tensor([0.0, 3.0, -1.0])
    x = torch.randn(200_000, 3, generator=generator())
    y = torch.randn(200_000, 3, generator=generator(1))
    found = metrics.frechet_distance(x * scale_a, y * scale_b + shift)
    assert found == pytest.approx(10.0 + 2.0, rel=0.01)


def test_frechet_distance_of_rotated_covariances_agrees_with_matrix_square_root():
    root = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    x = torch.randn(500, 4, generator=generator(1), dtype=torch.float64) @ root
    y = torch.randn(400, 4, generator=generator(2), dtype=torch.float64)
    a, b = torch.cov(x.T), torch.cov(y.T)
    # Eigenvalues of the (unsymmetric) product give the trace of its square root.
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
    assert metrics.frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_clips_than_features():
    x = torch.randn(8, 32, generator=generator())
    assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_is_invariant_to_rotation():
    x = torch.randn(64, 5, generator=generator())
    y = 2 * torch.randn(64, 5, generator=generator(1)) + 1
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator(2)))[0]
    assert metrics.frechet_distance(x @ rotation, y @ rotation) == pytest.approx(
        metrics.frechet_distance(x, y), rel=1e-4
    )


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((1, 3), (4, 3)), ((4,), (4,))])
def test_frechet_distance_refuses_features_that_do_not_match(shapes):
    with pytest.raises(AccVideoError, match=r"cannot be compared.*same width"):
        metrics.frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_patch_distance_of_a_shift_in_closed_form():
    x = torch.randn(500, 10, generator=generator())
    assert metrics.patch_distance(x, x) == 0.0
    # A shift d moves every projection by its component: E|u . d| for a random unit vector u.
    shift = torch.zeros(10)
    shift[0] = 2.0
    expected = 2 * math.gamma(5) / (math.sqrt(math.pi) * math.gamma(5.5))
    found = metrics.patch_distance(x, x + shift, directions=4096)
    assert found == pytest.approx(expected, rel=0.03)


def test_patch_distance_grows_as_a_texture_turns_grey():
    def cut(frames: torch.Tensor) -> torch.Tensor:
        return metrics.patches(frames, generator(7))

    sharp = cut(mosaic(0.5))
    distances = [metrics.patch_distance(cut(mosaic(c)), sharp) for c in (0.5, 0.4, 0.2, 0.0)]
    assert distances[0] == 0 and distances == sorted(distances)


def test_patches_are_pieces_of_their_clip():
    frames = torch.rand(2, 3, 8, 9, 3, generator=generator())
    first = metrics.patches(frames, generator(1), count=5, size=3)[0].reshape(3, 3, 3)
    windows = frames[0].unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    assert (windows == first).flatten(3).all(dim=3).any()
    assert metrics.patches(frames, generator(1), count=5, size=3).shape == (10, 27)


def test_psnr_of_a_known_error_and_of_equal_clips():
    a = torch.full((2, 3, 4, 4, 3), 0.5)
    b = a.clone()
    b[1] += 0.1
    assert metrics.psnr(a, b).tolist() == pytest.approx([100.0, 20.0], abs=1e-3)


def test_latent_mse_is_per_clip():
    a = torch.zeros(2, 4, 2, 3, 3)
    b = a.clone()
    b[1] += 0.5
    assert metrics.latent_mse(a, b).tolist() == [0.0, 0.25]


@pytest.mark.parametrize("figure", [metrics.psnr, metrics.latent_mse])
def test_distances_between_different_shapes_are_refused(figure):
    with pytest.raises(AccVideoError, match="different shapes"):
        figure(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_sharpness_of_a_step_is_its_height_and_falls_with_blur_and_contrast():
    frames = torch.zeros(1, 2, 20, 20, 3)
    frames[:, :, :, 10:] = 0.8
    step = metrics.edge_sharpness(frames, share=0.02)
    assert step.item() == pytest.approx(0.8, rel=1e-5)
    sharp, soft = squares(), blurred(squares())
    assert (metrics.edge_sharpness(soft) < 0.5 * metrics.edge_sharpness(sharp)).all()
    assert (metrics.edge_sharpness(0.5 * sharp) < metrics.edge_sharpness(sharp)).all()


def test_detail_contrast_is_proportional_to_texture_and_zero_without():
    full, half, none = (metrics.detail_contrast(mosaic(c)) for c in (0.5, 0.25, 0.0))
    assert torch.allclose(half, full / 2, rtol=1e-4)
    assert none.abs().max() < 1e-6
    assert (metrics.detail_contrast(blurred(mosaic(0.5))) < full).all()


def test_detail_contrast_overlooks_what_passes_by():
    frames = torch.zeros(1, 9, 32, 32, 3)
    for t in range(9):
        frames[0, t, 12:16, 3 * t : 3 * t + 4] = 1.0
    assert metrics.detail_contrast(frames).item() < 0.01


def test_motion_energy_of_a_known_change_and_of_a_still():
    frames = torch.zeros(2, 3, 4, 4, 3)
    frames[1, 1] = 0.5
    assert metrics.motion_energy(frames).tolist() == [0.0, 0.5]
    assert metrics.motion_energy(frames[:, :1]).tolist() == [0.0, 0.0]


def test_diversity_is_zero_for_equal_samples_and_root_two_for_independent_ones():
    one = torch.randn(3, 1, 20_000, generator=generator())
    assert metrics.diversity(one.expand(3, 4, 20_000).reshape(12, -1), 4).tolist() == [0, 0, 0]
    apart = torch.randn(12, 20_000, generator=generator(1))
    assert metrics.diversity(apart, 4).tolist() == pytest.approx([math.sqrt(2)] * 3, rel=0.02)


def test_diversity_looks_inside_a_prompt_only():
    # Two prompts far apart, both with collapsed samples.
    samples = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    assert metrics.diversity(samples, 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_diversity_needs_pairs(per_prompt):
    with pytest.raises(AccVideoError, match="at least 2 samples of every prompt"):
        metrics.diversity(torch.zeros(4, 2), per_prompt)


def test_bootstrap_of_a_mean_has_the_textbook_error():
    x = torch.randn(400, generator=generator())
    interval = metrics.bootstrap(lambda i: float(x[i].mean()), 400, generator(1), draws=2000)
    assert interval.value == pytest.approx(float(x.mean()))
    assert interval.error == pytest.approx(float(x.std()) / 20, rel=0.06)
    assert interval.low < interval.value < interval.high


def test_bootstrap_resamples_whole_units():
    # Clips of a unit are equal, so the error is that of 100 units, not of 400 clips.
    x = torch.randn(100, generator=generator())
    clips = x.repeat_interleave(4)
    interval = metrics.bootstrap(
        lambda i: float(clips[i].mean()), 100, generator(1), per_unit=4, draws=2000
    )
    assert interval.error == pytest.approx(float(x.std()) / 10, rel=0.06)


def test_paired_difference_is_tighter_than_its_parts_and_seeded():
    x = torch.randn(100, generator=generator())
    y = x + 0.1

    def both(seed: int) -> metrics.Interval:
        return metrics.bootstrap(lambda i: float((y[i] - x[i]).mean()), 100, generator(seed))

    assert both(1).value == pytest.approx(0.1, rel=1e-4) and both(1).error < 1e-6
    alone = metrics.bootstrap(lambda i: float(x[i].mean()), 100, generator(1))
    assert alone == metrics.bootstrap(lambda i: float(x[i].mean()), 100, generator(1))


def test_bootstrap_needs_two_units():
    with pytest.raises(AccVideoError, match="at least 2 prompts"):
        metrics.bootstrap(lambda i: 0.0, 1, generator())


def test_gap_closed():
    assert metrics.gap_closed(30.0, few=40.0, full=20.0) == 0.5
    assert metrics.gap_closed(40.0, few=40.0, full=20.0) == 0.0
    assert metrics.gap_closed(20.0, few=20.0, full=20.0) is None
