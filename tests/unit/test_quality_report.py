"""The quality document: its numbers are the planted ones, and its verdicts follow from them."""

from __future__ import annotations

from statistics import stdev
from typing import Any

from accvideo_core.distill.recipes import PRESETS
from accvideo_core.evaluate.report import FIGURES
from scripts.quality import Setting, _command
from scripts.quality_report import Spread, render

SHARES = {"shape": 1.0, "colour": 1.0, "motion": 1.0, "background": 1.0, "all": 0.98}


def row(name: str, steps: int, **figures: float) -> dict[str, Any]:
    rest = {key: 0.5 for key in FIGURES}
    return {"name": name, "steps": steps, **rest, **SHARES, "gap_closed": None, **figures} | {
        "seconds_per_clip": 0.1
    }


def results(gap: float, adversarial: tuple[float, ...], diversity: float = 0.0) -> dict[int, Any]:
    """Three seeds whose adversarial arm changes the Frechet distance by these amounts."""

    def one(change: float) -> dict[str, Any]:
        values = {"fd_real": change, "sharpness": 0.0, "diversity": diversity}
        return {
            "setting": Setting(steps=(2,)).as_dict(),
            "teacher": "abc",
            "clips": 512,
            "prompts": ["x"] * 256,
            "reference": "teacher@50",
            "figures": FIGURES,
            "rows": [
                row("teacher@50", 50),
                row("teacher@2", 2),
                row("trajectory@2", 2, gap_closed=gap),
                row("continued@2", 2),
                row("adversarial@2", 2),
            ],
            "differences": [
                {"a": a, "b": b, "figure": name, "value": value, "error": 0.1}
                for a, b in (("trajectory@2", "teacher@2"), ("adversarial@2", "continued@2"))
                for name, value in values.items()
            ],
        }

    return {seed: one(change) for seed, change in enumerate(adversarial)}


def verdicts(found: dict[int, Any]) -> list[str]:
    text = render(found, command="make it", pictures=["images/a.png"])
    part = text.split("## What was asked")[1].split("##")[0]
    return [line.rsplit("**", 2)[1] for line in part.strip().splitlines()]


def test_verdicts_follow_the_figures():
    better = (-2.0, -2.1, -1.9)
    assert verdicts(results(0.75, better)) == ["yes", "yes", "yes"]
    assert verdicts(results(0.65, better)) == ["no", "yes", "yes"]


def test_a_gain_that_the_seeds_disagree_on_is_not_claimed():
    assert verdicts(results(0.75, (-2.0, 2.0, -1.0)))[-1] == "no"
    assert verdicts(results(0.75, (2.0, 2.1, 1.9)))[-1] == "no"
    assert verdicts(results(0.75, (-2.0,)))[-1] == "no"


def test_a_gain_bought_with_diversity_does_not_count():
    assert verdicts(results(0.75, (-2.0, -2.1, -1.9), diversity=-0.1))[-1] == "no"


def test_sharper_than_real_is_no_gain():
    found = results(0.75, (0.0, 0.0, 0.0))
    for i, one in enumerate(found.values()):
        for difference in one["differences"]:
            if difference["figure"] == "sharpness":
                difference["value"] = 0.1 + 0.001 * i
    assert verdicts(found)[-1] == "yes"
    for one in found.values():
        one["rows"].append(row("real clips", 0, sharpness=0.4))
    assert verdicts(found)[-1] == "no"


def test_the_document_states_figures_command_and_pictures():
    text = render(results(0.75, (-2.0, -2.1, -1.9)), command="make it", pictures=["images/a.png"])
    assert "    make it" in text and "![a.png](images/a.png)" in text
    assert "| adversarial@2 - continued@2 | tiny FVD to real | -2 [-2.25, -1.75] |" in text
    assert "-2.1 [-2.3, -1.9]" in text
    assert "| trajectory@2 | 100 % |" in text and "75 %" in text
    assert "None" not in text and "nan" not in text


def test_spread_is_students_interval():
    spread = Spread((1.0, 2.0, 3.0))
    assert spread.mean == 2.0
    assert spread.margin == 4.30 * stdev((1, 2, 3)) / 3**0.5
    assert spread.text() == "2 +- 1" and Spread((0.5, 0.5)).text(share=True) == "50 %"


def test_the_control_differs_from_the_adversarial_arm_in_its_term_alone():
    setting = Setting(adversarial_changes=("adv_weight=0.2",))
    control, tuned = (setting.recipe(arm, 2, 0).as_dict() for arm in ("continued", "adversarial"))
    different = {key for key in control if control[key] != tuned[key]}
    assert different == {"name", "adversarial", "adv_weight"}
    first = setting.recipe("trajectory", 2, 0)
    assert first.lr == PRESETS["tiny-trajectory"].lr and first.train_steps == setting.updates


def test_the_command_names_what_is_not_the_default():
    assert _command(Setting()) == "python -m scripts.quality"
    changed = Setting(steps=(2, 1), more_updates=7, changes=("lr=1e-3", "ema=0.9"))
    assert _command(changed) == (
        "python -m scripts.quality --steps 2 1 --more-updates 7 --set lr=1e-3 ema=0.9"
    )
