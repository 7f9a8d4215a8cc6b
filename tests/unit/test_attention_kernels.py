"""The table of attention kernels: what is refused, in which words, and which one is the fastest."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_kernels import PACKAGES, install, let_run_on_the_cpu
from tiny_families import Case, case
from torch import Tensor

from accvideo_core.errors import AccVideoError
from accvideo_core.models import fastest
from accvideo_core.models.attention import attention
from accvideo_core.models.fastest import Shape
from accvideo_core.models.kernels import KERNELS, Kernel, Limits, Numbers

CPU = torch.device("cpu")


# Refusals -------------------------------------------------------------------------------------


def refusal(made: Case, kernel: str) -> str:
    with pytest.raises(AccVideoError) as caught, attention(made.model, kernel):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_kernel_names_those_there_are() -> None:
    said = refusal(case("wan_t2v"), "fast")
    assert said.startswith("there is no attention 'fast'; choose auto, sdpa, cudnn, flash")


@pytest.mark.parametrize("kernel", ["cudnn", "efficient", "xformers", "flash2", "flash3", "sage"])
def test_a_kernel_for_gpus_names_those_that_compute_on_this_device(kernel: str) -> None:
    assert refusal(case("cogvideox_2b"), kernel) == (
        f"attention kernel {kernel!r} does not compute heads of 16 in float32 on this cpu device; "
        "choose sdpa, flash, math or flex"
    )


def test_a_kernel_that_lacks_the_dtype_names_those_that_have_it() -> None:
    made = case("wan_t2v")
    made.model.module.double()
    assert refusal(made, "flex").endswith("float64 on this cpu device; choose sdpa, flash or math")


def test_a_kernel_that_lacks_the_head_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"cpu": Limits(multiple=8, largest_head=8)}
    monkeypatch.setitem(KERNELS, "flash2", replace(KERNELS["flash2"], limits=limits))
    assert "does not compute heads of 12 in float32" in refusal(case("wan_t2v"), "flash2")
    assert "does not compute heads of 16 in float32" in refusal(case("cogvideox_2b"), "flash2")


@pytest.mark.parametrize(
    ("kernel", "command"),
    [
        ("xformers", "pip install xformers"),
        ("flash2", "pip install flash-attn --no-build-isolation"),
        ("flash3", "from there with: pip install . --no-build-isolation"),
        ("sage", "pip install sageattention"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    kernel: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_run_on_the_cpu(monkeypatch, kernel)
    monkeypatch.setitem(sys.modules, PACKAGES[kernel][0], None)  # cannot be imported
    assert command in refusal(case("wan_t2v"), kernel)


def test_a_package_that_fails_here_is_refused_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "flash2", result=lambda out: out.missing)
    made = case("wan_t2v")
    assert refusal(made, "flash2").startswith(
        "attention kernel 'flash2' cannot compute heads of 12 in float32 on this cpu device "
        "('Tensor' object has no attribute 'missing'); choose sdpa, flash, math"
    )


def test_flex_needs_something_to_compile_it_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert "on a CPU a C++ compiler (there is no C++ compiler)" in refusal(case("wan_t2v"), "flex")


def test_fused_projections_are_refused() -> None:
    made = case("cogvideox_2b")
    made.model.module.fuse_qkv_projections()  # type: ignore[operator]
    assert "is computed by FusedCogVideoXAttnProcessor2_0" in refusal(made, "auto")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_limits_of_the_released_heads_are_met_by_every_gpu_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    for size in (64, 128):  # CogVideoX; HunyuanVideo and Wan
        numbers = Numbers(device=torch.device(device), dtype=torch.bfloat16, head_size=size)
        able = [kernel.name for kernel in KERNELS.values() if kernel.takes(numbers)]
        everywhere = ["sdpa", "flash", "math", "flex"]
        assert able == (list(KERNELS) if device == "cuda" else everywhere)


def test_capability_decides_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(device=torch.device("cuda"), dtype=torch.float16, head_size=128)
    able = {}
    for capability in ((7, 5), (8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d, c=capability: c)
        able[capability] = {kernel.name for kernel in KERNELS.values() if kernel.takes(numbers)}
    assert able[7, 5] == {"sdpa", "efficient", "math", "xformers"}
    assert able[8, 9] == set(KERNELS) - {"flash3"}
    assert able[9, 0] == set(KERNELS)
    assert able[12, 0] == set(KERNELS) - {"flash3"}


# auto -----------------------------------------------------------------------------------------

LONG = Shape(Numbers(device=CPU, dtype=torch.float32, head_size=8), 64, 512)


class Clock:
    """Time that passes only when something lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Candidates named a, b and c, whose calls take what `seconds` says."""
    monkeypatch.setattr(fastest, "_found", {})
    clock = Clock()
    state: dict[str, Any] = {"clock": clock, "calls": []}
    state["seconds"] = {name: iter(lambda: 1e-3, None) for name in "abc"}

    def rival(name: str) -> Kernel:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            state["calls"].append((name, tuple(q.shape)))
            clock.now += next(state["seconds"][name])
            return q

        limits = {"any": Limits()}
        return Kernel(name=name, load=lambda _device: run, limits=limits, tried=False)

    for name in "abc":
        monkeypatch.setitem(KERNELS, name, rival(name))
    monkeypatch.setattr(fastest, "CANDIDATES", tuple("abc"))
    yield state


def every(*seconds: float) -> Iterator[float]:
    """These in turn, for ever."""
    while True:
        yield from seconds


def test_the_fastest_kernel_is_measured_once(
    rivals: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rivals["seconds"] = {"a": every(0.02), "b": every(0.01), "c": every(0.03)}
    with caplog.at_level(logging.INFO, logger=fastest.__name__):
        assert fastest.fastest(LONG, rivals["clock"]).name == "b"
    assert "512 tokens" in caplog.text
    assert "b 10.00 ms, a 20.00 ms, c 30.00 ms" in caplog.text
    measured = len(rivals["calls"])
    assert fastest.fastest(LONG, rivals["clock"]).name == "b"
    assert len(rivals["calls"]) == measured == 3 * (1 + fastest.ROUNDS)


def test_warming_up_and_disturbances_do_not_decide(rivals: dict[str, Any]) -> None:
    rivals["seconds"] = {
        "a": every(0.02),
        "b": iter([0.5, 0.3, 0.01, 0.3, 0.01, 0.3]),  # compiles first, then is disturbed
        "c": every(0.03),
    }
    assert fastest.fastest(LONG, rivals["clock"]).name == "b"


def test_slow_measurements_are_cut_short(rivals: dict[str, Any]) -> None:
    rivals["seconds"] = {"a": every(2.0), "b": every(1.0), "c": every(3.0)}
    assert fastest.fastest(LONG, rivals["clock"]).name == "b"
    assert len(rivals["calls"]) == 6  # warm-up and one round


def test_long_sequences_are_measured_with_fewer_heads(
    rivals: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "OPERATIONS", 4 * 512**2 * 8 * 3)
    fastest.fastest(LONG, rivals["clock"])
    assert {shape for _, shape in rivals["calls"]} == {(1, 512, 3, 8)}


def test_a_kernel_that_fails_at_the_size_does_not_win(
    rivals: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    broken = {n: replace(KERNELS[n], load=lambda _device: fails) for n in "abc"}
    monkeypatch.setitem(KERNELS, "a", broken["a"])
    assert fastest.fastest(LONG, rivals["clock"]).name in "bc"
    monkeypatch.setattr(fastest, "_found", {})
    for name in "abc":
        monkeypatch.setitem(KERNELS, name, broken[name])
    assert fastest.fastest(LONG, rivals["clock"]).name == "sdpa"


def test_prompts_of_nearly_one_length_share_a_measurement() -> None:
    numbers = LONG.numbers
    assert Shape.near(numbers, 24, 33_000 + 37) == Shape.near(numbers, 24, 33_000 + 91)
    assert Shape.near(numbers, 24, 33_000) != Shape.near(numbers, 24, 40_000)
    assert Shape.near(numbers, 24, 118_800).tokens >= 118_800


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "_found", {})
    monkeypatch.setattr(fastest, "_measured", None)  # would fail if it were called
    numbers = Numbers(device=CPU, dtype=torch.float32, head_size=128)
    assert fastest.fastest(Shape(numbers, 24, 100_000)).name == "sdpa"


def test_tiny_sequences_are_not_measured(rivals: dict[str, Any]) -> None:
    assert fastest.fastest(replace(LONG, heads=1, tokens=64), rivals["clock"]).name == "sdpa"
    assert not rivals["calls"]


def test_auto_computes_with_the_winner(
    rivals: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "TINY", 0)
    rivals["seconds"] = {"a": every(0.02), "b": every(0.03), "c": every(0.01)}
    monkeypatch.setattr(fastest.fastest, "__defaults__", (rivals["clock"],))
    made = case("wan_t2v")
    with attention(made.model, "auto"):
        made.velocities(made.model)
        rivals["calls"].clear()
        made.model.velocity(made.x, 0.4, made.condition)
    # Self-attention of three blocks; what takes a bias for the text's padding is torch's own.
    assert [name for name, _ in rivals["calls"]] == ["c"] * 3


def test_auto_never_takes_a_kernel_that_is_not_exact() -> None:
    assert all(KERNELS[name].exact for name in fastest.CANDIDATES)
    assert not KERNELS["sage"].exact


def test_auto_costs_a_tiny_network_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "_candidates", None)  # would fail if it were called
    made = case("hunyuan_video")
    with attention(made.model):
        v = made.velocities(made.model)
    assert torch.isfinite(v).all()
