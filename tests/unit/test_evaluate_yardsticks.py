"""Yardsticks of real videos against closed forms, plain sums, and planted orderings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accvideo_core.errors import AccVideoError
from accvideo_core.evaluate import yardsticks
from accvideo_core.evaluate.clips import UnusableClip, clips_of_batch
from accvideo_core.evaluate.fvd import Detector, fvd
from accvideo_core.evaluate.lpips import load_lpips
from accvideo_core.evaluate.measure import Measured
from accvideo_core.evaluate.yardsticks import CLIP_YARDSTICKS, PairYardstick, pair_yardsticks
from tests import tiny_i3d

FRAMES, SIZE = 24, 40


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def panned(step: int) -> Tensor:
    """A picture that moves `step` pixels a frame, [T, H, W, 3]."""
    picture = F.interpolate(noise(1, 3, 16, 16), (SIZE, SIZE), mode="bilinear")[0].movedim(0, -1)
    return torch.stack([picture.roll(step * t, dims=1) for t in range(FRAMES)])


def figures(frames: Tensor, folder: Path) -> dict[str, float | None]:
    (clip,) = clips_of_batch(frames, 8.0)
    found = Measured(folder).clip(clip)
    return {name: found.mean(name) for name in CLIP_YARDSTICKS}


def test_figures_are_those_of_the_whole_video_however_it_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = noise(FRAMES, SIZE, SIZE, 3)
    whole = {
        name: one.measure(frames.unfold(0, one.span, 1).movedim(-1, 1))
        for name, one in CLIP_YARDSTICKS.items()
    }
    for at_once in (1, 2, 5, 16):
        monkeypatch.setattr("accvideo_core.evaluate.clips._AT_ONCE", at_once)
        (clip,) = clips_of_batch(frames, 8.0)
        found = Measured(tmp_path / str(at_once)).clip(clip)
        assert (found.frames, found.height, found.width, found.fps) == (FRAMES, SIZE, SIZE, 8.0)
        assert len(found.thumbs) == 3
        for name, values in whole.items():
            torch.testing.assert_close(found.figures[name], values)


def test_blur_lowers_sharpness_and_nothing_that_it_should_not(tmp_path: Path) -> None:
    sharp = panned(1)
    blurred = F.avg_pool2d(sharp.movedim(-1, 1), 5, 1, 2, count_include_pad=False).movedim(1, -1)
    one, other = figures(sharp, tmp_path), figures(blurred, tmp_path)
    assert other["sharpness"] < 0.8 * one["sharpness"]  # type: ignore[operator]


def test_motion_energy_is_0_for_a_still_video_and_rises_with_speed(tmp_path: Path) -> None:
    still, slow, fast = (figures(panned(step), tmp_path)["motion"] for step in (0, 1, 3))
    assert still == 0
    assert 0 < slow < 0.6 * fast  # type: ignore[operator]


def test_saturation_of_grey_is_0_and_of_a_pure_colour_1(tmp_path: Path) -> None:
    grey = noise(FRAMES, SIZE, SIZE, 1).expand(-1, -1, -1, 3)
    red = torch.tensor([1.0, 0.0, 0.0]).expand(FRAMES, SIZE, SIZE, 3)
    assert figures(grey, tmp_path)["saturation"] == pytest.approx(0, abs=1e-6)
    assert figures(red, tmp_path)["saturation"] == pytest.approx(1)


def test_flicker_is_how_far_brightness_changes_to_and_fro(tmp_path: Path) -> None:
    level = torch.full((FRAMES,), 0.5)
    level[1::2] += 0.1
    found = figures(level.reshape(-1, 1, 1, 1).expand(-1, SIZE, SIZE, 3), tmp_path)
    assert found["flicker"] == pytest.approx(0.1, rel=1e-5)


def test_a_fade_is_no_flicker(tmp_path: Path) -> None:
    level = torch.linspace(0, 1, FRAMES).reshape(-1, 1, 1, 1).expand(-1, SIZE, SIZE, 3)
    found = figures(level, tmp_path)
    assert found["flicker"] == pytest.approx(0, abs=1e-6) and found["motion"] > 0.04


def test_flicker_of_a_moving_picture_is_far_below_that_of_an_unsteady_one(tmp_path: Path) -> None:
    unsteady = panned(0) * (0.9 + 0.1 * (torch.arange(FRAMES) % 2)).reshape(-1, 1, 1, 1)
    assert figures(panned(1), tmp_path)["flicker"] < 0.5 * figures(unsteady, tmp_path)["flicker"]  # type: ignore[operator]


def test_a_video_of_one_frame_has_the_figures_that_need_no_other(tmp_path: Path) -> None:
    found = figures(noise(1, SIZE, SIZE, 3), tmp_path)
    assert found["motion"] is None and found["flicker"] is None
    assert found["sharpness"] is not None and found["saturation"] is not None


def test_psnr_of_a_known_error_is_its_closed_form_for_every_frame() -> None:
    a = noise(5, SIZE, SIZE, 3) * 0.5
    errors = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    found = pair_yardsticks()[0]["PSNR"].measure(a, a + errors.reshape(-1, 1, 1, 1))
    wanted = [20.0, *(-20 * np.log10(x) for x in (0.2, 0.3, 0.4)), 100.0]
    assert found.tolist() == pytest.approx(wanted, abs=1e-3)


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one channel by sums over every window (Wang et al. 2004, Eq. 13)."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    padded = [np.pad(x, 5, mode="reflect") for x in (a, b)]
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            one, other = (p[y : y + 11, x : x + 11] for p in padded)
            m, n = (window * one).sum(), (window * other).sum()
            v, w = (window * one**2).sum() - m * m, (window * other**2).sum() - n * n
            c = (window * one * other).sum() - m * n
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * m * n + c1) * (2 * c + c2) / ((m * m + n * n + c1) * (v + w + c2)))
    return float(np.mean(values))


def test_ssim_is_that_of_plain_sums_over_windows() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    a, b = noise(2, 14, 13, 3), noise(2, 14, 13, 3, seed=1)
    b[0] = 0.7 * a[0] + 0.3 * b[0]
    found = yardsticks.ssim_measure()(a, b)
    for frame in range(2):
        channels = [
            plain_ssim(a[frame, ..., c].double().numpy(), b[frame, ..., c].double().numpy())
            for c in range(3)
        ]
        assert float(found[frame]) == pytest.approx(np.mean(channels), abs=1e-4)
    assert yardsticks.ssim_measure()(a, a).tolist() == pytest.approx([1.0, 1.0])


def test_without_torchmetrics_there_is_no_ssim_and_a_note_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    found, notes = pair_yardsticks()
    assert list(found) == ["PSNR"]
    assert len(notes) == 1 and "pip install torchmetrics" in notes[0]


# LPIPS ----------------------------------------------------------------------------------------


def alexnet() -> nn.Sequential:
    """torchvision's `features` of AlexNet, random."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


def vgg() -> nn.Sequential:
    """torchvision's `features` of VGG-16, random."""
    layers: list[nn.Module] = []
    width = 3
    for wide in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if wide:
            layers += [nn.Conv2d(width, wide, 3, padding=1), nn.ReLU()]
            width = wide
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


BACKBONES = {
    "AlexNet": (alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "VGG-16": (vgg, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
}
"""Network, its ReLUs after which LPIPS compares, and the channels there (lpips' own slices)."""


def random_lpips(network: str) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    make, _, widths = BACKBONES[network]
    return make().requires_grad_(False), [torch.rand(1, c, 1, 1) for c in widths]


def plain_lpips(network: str, features: nn.Sequential, heads: list[Tensor]) -> Callable[..., float]:
    """The distance of two pictures [H, W, 3] by the paper's Eq. 1."""
    taps = BACKBONES[network][1]

    def unit_features(picture: Tensor) -> list[np.ndarray]:
        shift, scale = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
        x, found = ((2 * picture - 1 - shift) / scale).permute(2, 0, 1)[None], []
        for number, layer in enumerate(features[: taps[-1] + 1]):
            x = layer(x)
            if number in taps:
                y = x[0].double().numpy()
                found.append(y / (np.sqrt((y**2).sum(0)) + 1e-10))
        return found

    def distance(a: Tensor, b: Tensor) -> float:
        parts = zip(unit_features(a), unit_features(b), heads, strict=True)
        weights = ((x - y, w.flatten().double().numpy()) for x, y, w in parts)
        return float(sum(np.einsum("c,chw->hw", w, d**2).mean() for d, w in weights))

    return distance


@pytest.mark.parametrize("network", BACKBONES)
def test_lpips_is_the_papers_distance(network: str, tmp_path: Path) -> None:
    features, heads = random_lpips(network)
    backbone, linear = tmp_path / "backbone.pth", tmp_path / "heads.pth"
    state = {f"features.{name}": x for name, x in features.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.ones(2)}, backbone)
    torch.save({f"lin{i}.model.1.weight": x for i, x in enumerate(heads)}, linear)
    found = load_lpips(backbone, linear)
    a, b = noise(2, 48, 40, 3), noise(2, 48, 40, 3, seed=1)
    wanted = plain_lpips(network, features, heads)
    assert found.network == network
    torch.testing.assert_close(
        found(a, b).double(), torch.tensor([wanted(x, y) for x, y in zip(a, b, strict=True)]),
        rtol=1e-4, atol=1e-6, check_dtype=False,
    )  # fmt: skip
    assert found(a, a).tolist() == [0.0, 0.0]


def test_a_whole_model_of_the_package_lpips_is_read_from_one_file(tmp_path: Path) -> None:
    features, heads = random_lpips("AlexNet")
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    state = {
        f"net.slice{slices[int(name.split('.')[0])]}.{name}": x
        for name, x in features.state_dict().items()
    }
    both = [{f"lin{i}.model.1.weight": x, f"lins.{i}.model.1.weight": x}
            for i, x in enumerate(heads)]  # fmt: skip
    for one in both:
        state |= one
    torch.save({**state, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "whole.pth")
    a, b = noise(1, 40, 40, 3), noise(1, 40, 40, 3, seed=1)
    wanted = plain_lpips("AlexNet", features, heads)(a[0], b[0])
    assert float(load_lpips(tmp_path / "whole.pth")(a, b)) == pytest.approx(wanted, rel=1e-4)


def test_weights_that_lpips_cannot_use_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    features, _ = random_lpips("AlexNet")
    state = {f"features.{name}": x for name, x in features.state_dict().items()}
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(AccVideoError, match="lacks the linear heads of LPIPS for AlexNet; give"):
        load_lpips(tmp_path / "backbone.pth")
    torch.save({"features.0.weight": state["features.0.weight"]}, tmp_path / "part.pth")
    with pytest.raises(AccVideoError, match="holds only a part of AlexNet"):
        load_lpips(tmp_path / "part.pth")
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(AccVideoError, match="no AlexNet and no VGG-16"):
        load_lpips(tmp_path / "other.pth")
    with pytest.raises(AccVideoError, match="there is no file .*none.pth with weights of LPIPS"):
        load_lpips(tmp_path / "none.pth")


# FVD ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_i3d.save(tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt")


def test_i3d_is_asked_with_the_first_16_frames_from_0_to_255(i3d: Path) -> None:
    frames = torch.zeros(20, 6, 8, 3)
    frames[:16, ..., 0], frames[:16, ..., 1] = 1.0, 0.2
    frames[16:] = 0.9
    (clip,) = clips_of_batch(frames, 8.0)
    features = Detector(i3d).features(clip)
    assert features.tolist() == pytest.approx([255, 51, 0, 3, 16, 6, 8])


def test_a_video_that_is_too_short_for_fvd_is_named(i3d: Path) -> None:
    (clip,) = clips_of_batch(torch.zeros(15, 6, 8, 3), 8.0)
    with pytest.raises(UnusableClip, match="clip_0000 has 15 frames, but FVD looks at 16"):
        Detector(i3d).features(clip)


def test_a_file_that_is_no_i3d_is_named(tmp_path: Path) -> None:
    with pytest.raises(AccVideoError, match="there is no file .*none.pt for FVD; give the Torch"):
        Detector(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(AccVideoError, match="text.pt is no TorchScript that can be read"):
        Detector(tmp_path / "text.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "other.pt"))
    with pytest.raises(AccVideoError, match="other.pt does not take frames as I3D does"):
        Detector(tmp_path / "other.pt")(torch.zeros(16, 4, 4, 3))


def test_fvd_of_gaussian_features_is_its_closed_form() -> None:
    """|m_a - m_b|^2 + sum over axes of (s_a - s_b)^2 for Gaussians along the axes."""
    a, b = (torch.randn(20000, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    spread = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    found = fvd(a * spread, b + torch.tensor([2.0, 0.0, 1.0, 0.0, 0.0]))
    assert found == pytest.approx(5 + float((spread - 1).square().sum()), rel=0.03)
    assert fvd(a[:1], b) is None


def test_a_yardstick_is_measured_again_when_its_weights_change(tmp_path: Path) -> None:
    a, b = (clips_of_batch(noise(3, 8, 8, 3, seed=i), 8.0)[0] for i in (0, 1))
    calls: list[str] = []

    def counting(key: str) -> dict[str, PairYardstick]:
        def measure(x: Tensor, y: Tensor) -> Tensor:
            calls.append(key)
            return torch.zeros(len(x))

        return {"X": PairYardstick("x", measure, key)}

    for key in ("one", "one", "two"):
        Measured(tmp_path).pair(a, b, counting(key))
    assert calls == ["one", "two"]
