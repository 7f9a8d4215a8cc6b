"""Presets against the arithmetic of the official schedulers, done again here with torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from accvideo_core.errors import AccVideoError
from accvideo_core.presets import PRESETS, Preset, misfit, preset, presets_for

FAMILIES = {"hunyuan_video", "wan_t2v", "wan_i2v", "wan22_t2v", "wan22_i2v", "wan22_ti2v"}
DOCS = Path(__file__).parents[2] / "docs" / "few_step_students.md"


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * u / (1 + (shift - 1) * u)


def flow_match_discrete() -> torch.Tensor:
    """aejion/AccVideo, FlowMatchDiscreteScheduler.set_timesteps(5), shift 7."""
    return shifted(torch.linspace(1, 0, 6), 7.0)


def flow_match_euler(steps: int, shift: float, stride: int) -> torch.Tensor:
    """aejion/AccVideo, models/wan/utils/fm_euler.py, then start_latent_list of generate()."""
    train = shifted(torch.linspace(1, 1000, 1000).flip(0) / 1000, shift)
    sigmas = shifted(torch.linspace(train[0].item(), train[-1].item(), steps), shift)
    return torch.cat([sigmas, torch.zeros(1)])[::stride]


def flow_unipc(steps: int, built: float, asked: float) -> torch.Tensor:
    """aejion/AccVideo, fm_solvers_unipc.py: built with one shift, set_timesteps with another."""
    alphas = torch.linspace(1, 1 / 1000, 1000).flip(0)
    sigma_max = shifted(1 - alphas, built)[0].item()
    sigmas = shifted(torch.linspace(sigma_max, 0, steps + 1)[:-1], asked)
    return torch.cat([sigmas, torch.zeros(1)])


def step_distill() -> torch.Tensor:
    """ModelTC/LightX2V, WanStepDistillScheduler: [1000, 750, 500, 250], shift 5."""
    sigmas = shifted(torch.linspace(1, 0, 1001)[:-1], 5.0)
    chosen = sigmas[[1000 - x for x in (1000, 750, 500, 250)]]
    return torch.cat([chosen, torch.zeros(1)])


def dmd(shift: float) -> torch.Tensor:
    """hao-ai-lab/FastVideo and tianweiy/CausVid: the sigma nearest to every label."""
    sigmas = shifted(torch.linspace(1, 0, 1001)[:-1].double(), shift)
    labels = torch.tensor([1000.0, 757.0, 522.0]).double()
    nearest = (1000 * sigmas[None] - labels[:, None]).abs().argmin(dim=1)
    return torch.cat([sigmas[nearest], torch.zeros(1).double()])


def trigflow(sigma_max: float, steps: int) -> torch.Tensor:
    """NVlabs/rcm: mid times [1.5, 1.4, 1.0] of TrigFlow, in rectified-flow times."""
    mid = [1.5, 1.4, 1.0][: steps - 1]
    t = torch.tensor([math.atan(sigma_max), *mid, 0], dtype=torch.float64)
    return torch.sin(t) / (torch.cos(t) + torch.sin(t))


OFFICIAL = {
    "accvideo-hunyuan-5": flow_match_discrete(),
    "accvideo-wan-t2v-10": flow_match_euler(50, 5.0, 5),
    "accvideo-wan-t2v-10-unipc": flow_unipc(10, 5.0, 5.0),
    "accvideo-wan-i2v-10": flow_match_euler(40, 3.0, 4),
    "accvideo-wan-i2v-10-unipc": flow_unipc(10, 1.0, 3.0),
    "lightx2v-wan21-4": step_distill(),
    "lightning-wan22-4": step_distill(),
    "fastwan-3": dmd(8.0),
    "causvid-wan-3": dmd(8.0),
    "causvid-lora-12": flow_unipc(12, 1.0, 7.0),
    "rcm-wan-4": trigflow(80, 4),
    "rcm-wan-3": trigflow(80, 3),
    "rcm-wan-2": trigflow(80, 2),
    "rcm-wan-1": trigflow(80, 1),
    "rcm-wan22-i2v-4": trigflow(200, 4),
}

# What the official code prints or its authors write, rounded as there.
LITERAL = {
    "accvideo-hunyuan-5": (1, 0.965517, 0.913043, 0.823529, 0.636364, 0),
    "accvideo-wan-t2v-10": (
        *(1, 0.9779, 0.9515, 0.9195, 0.8797, 0.8290, 0.7623, 0.6705, 0.5361, 0.3205, 0),
    ),
    "accvideo-wan-i2v-10": (
        *(1, 0.9634, 0.9211, 0.8715, 0.8125, 0.7414, 0.6539, 0.5436, 0.4002, 0.2062, 0),
    ),
    # github.com/ModelTC/LightX2V-Wan2.2-Lightning issue 3, over 1000.
    "lightning-wan22-4": (1.0, 0.9375001, 0.8333333, 0.625, 0.0),
    "fastwan-3": (1, 0.757, 0.522, 0),
    "rcm-wan-4": (0.987654, 0.933781, 0.852895, 0.608979, 0),
}


def test_every_preset_has_an_official_counterpart_here():
    assert tuple(OFFICIAL) == tuple(PRESETS)


@pytest.mark.parametrize("name", OFFICIAL)
def test_times_are_the_official_schedulers(name: str):
    assert preset(name).times == pytest.approx(OFFICIAL[name].tolist(), abs=1e-6)


@pytest.mark.parametrize("name", LITERAL)
def test_times_are_the_published_numbers(name: str):
    assert preset(name).times == pytest.approx(LITERAL[name], abs=5e-4)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("accvideo-wan-t2v-10-unipc", (999, 978, 952, 921, 882, 833, 769, 681, 555, 357)),
        ("accvideo-wan-i2v-10-unipc", (999, 963, 922, 874, 817, 749, 666, 562, 428, 249)),
    ],
)
def test_unipc_times_have_the_integer_timesteps_that_the_official_code_feeds(name, labels):
    assert tuple(int(1000 * t) for t in preset(name).times[:-1]) == labels


def test_stock_simple_scheduler_gives_the_schedules_that_are_plain_grids():
    for name in ("accvideo-hunyuan-5", "lightx2v-wan21-4", "lightning-wan22-4"):
        one = preset(name)
        assert one.shift is not None
        # ComfyUI, ModelSamplingDiscreteFlow and simple_scheduler.
        table = shifted(torch.arange(1, 1001) / 1000, one.shift)
        chosen = [table[-(1 + int(i * 1000 / one.steps))].item() for i in range(one.steps)]
        assert one.times == pytest.approx([*chosen, 0.0], abs=1e-6)


@pytest.mark.parametrize("one", PRESETS.values(), ids=list(PRESETS))
def test_presets_are_complete(one: Preset):
    assert one.times[-1] == 0 and len(one.times) == one.steps + 1
    assert str(one.steps) in one.title and one.name.replace("-unipc", "").endswith(str(one.steps))
    assert one.families and set(one.families) <= FAMILIES
    assert (one.guidance is not None) == (one.families == ("hunyuan_video",))
    sampler = {"euler": "euler", "renoise": "lcm", "unipc": "uni_pc_bh2"}[one.solver]
    assert one.comfy_sampler == sampler and one.cfg == 1.0 and 0 < one.strength <= 1
    assert one.source.startswith("github.com/") and ": " in one.source


@pytest.mark.parametrize("one", PRESETS.values(), ids=list(PRESETS))
def test_the_documentation_has_every_preset(one: Preset):
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{one.name}` ")]
    assert len(rows) == 1
    sigmas = ", ".join(f"{t:.6f}".rstrip("0").rstrip(".") for t in one.times)
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[1:5] == [sigmas, f"`{one.comfy_sampler}`", f"{one.cfg:g}", f"{one.strength:g}"]


def test_presets_of_a_family_come_in_the_tables_order():
    assert presets_for() == tuple(PRESETS)
    assert presets_for("hunyuan_video") == ("accvideo-hunyuan-5",)
    assert presets_for("wan22_i2v") == ("lightning-wan22-4", "rcm-wan22-i2v-4")
    assert presets_for("wan_t2v")[:2] == ("accvideo-wan-t2v-10", "accvideo-wan-t2v-10-unipc")
    assert presets_for("cogvideox_5b") == ()


def test_unknown_names_are_one_sentence():
    with pytest.raises(AccVideoError, match="'lightning' is unknown; choose one of: accvideo-hu"):
        preset("lightning")
    good = preset("fastwan-3")
    fields = {name: getattr(good, name) for name in good.__slots__}
    with pytest.raises(AccVideoError, match="solver 'heun' is unknown"):
        Preset(**{**fields, "solver": "heun"})
    with pytest.raises(AccVideoError, match="must fall strictly"):
        Preset(**{**fields, "times": (0.0, 1.0)})


def test_misfit_says_what_is_wrong_and_what_to_do():
    wanted = preset("accvideo-hunyuan-5").times
    assert misfit(wanted, wanted) is None
    assert misfit([t + 9e-4 if 0 < t < 1 else t for t in wanted], wanted) is None
    other = misfit([t + 2e-3 if t == wanted[2] else t for t in wanted], wanted)
    assert other is not None and "a time 0.9150 where the student was trained for 0.9130" in other
    count = misfit(preset("accvideo-wan-t2v-10").times, wanted)
    assert count is not None and "steps is 10, but the student's is 5" in count
    remedy = "use the student's own (1.0000, 0.9655, 0.9130, 0.8235, 0.6364, 0.0000)"
    assert remedy in other and remedy in count
