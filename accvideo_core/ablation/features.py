"""Figure 5 on the embedded teacher: what its blocks see at the key times, and what that says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..evaluate import world
from ..evaluate.feature_pictures import write_features
from ..evaluate.features import FeatureMap, feature_maps, sample_states
from ..files import read_json, replacing
from ..monitor import Monitor
from ..sampling import SamplePlan
from .accvideo import AccVideoStudy
from .arms import FULL_TEACHER
from .lab import Lab
from .study import NOISE_SEED

_CLIPS = 8
_PICTURE = "features.png"


def make_features(lab: Lab, study: AccVideoStudy, monitor: Monitor) -> None:
    """features.png of one clip, and features.json with figures that are means over clips."""
    if (lab.folder / _PICTURE).exists():
        return
    teacher, model = lab.teacher, lab.teacher.model
    plan = SamplePlan(world.FRAMES, world.SIZE, world.SIZE)
    prompts = study.prompts(teacher)[:_CLIPS]
    grid, m = lab.times(lab.arms()[FULL_TEACHER]), study.setting.student_steps
    clips: list[list[FeatureMap]] = []
    decoded = None
    for prompt in prompts:
        noise = plan.noise(model.latent_spec, [prompt], NOISE_SEED)
        states = sample_states(model, prompt.condition, noise, grid, m, monitor)
        clips.append(feature_maps(model, states, range(model.num_blocks), monitor=monitor))
        if decoded is None:
            decoded = teacher.vae.decode(states.latents)
    maps = [
        replace(one[0], contrast=mean(x.contrast for x in one), share=mean(x.share for x in one))
        for one in zip(*clips, strict=True)
    ]
    told = {"prompt": prompts[0].text, "clips": len(prompts)}
    write_features(maps, decoded, lab.folder, told)


def features_section(lab: Lab, page: Path) -> str:
    """The section, from the folder's files; its picture goes into `images` beside the page."""
    picture = page.parent / "images" / f"{page.stem}_features.png"
    with replacing(picture) as temp:
        shutil.copyfile(lab.folder / _PICTURE, temp)
    told = read_json(lab.folder / "features.json")
    return f"""\
## Figure 5: what the heads see

The colours of a map are the three principal components of a block's tokens: what has one colour
looks alike to the network. C is how unlike neighbouring tokens are (Geary's C: 0 smooth, 1 as
unlike as any two of a frame), a mean over {told["clips"]} clips; the clip shown is
"{told["prompt"]}".

{features_words(told["maps"])}

![What the blocks see at the key times](images/{picture.name})"""


def features_words(maps: list[dict[str, Any]]) -> str:
    """What the contrasts say of the paper's choice of blocks. The first block is left out: while
    there is much noise its tokens are the noise's own.
    """
    last = max(one["block"] for one in maps)
    noisy = list(dict.fromkeys(one["t"] for one in maps if one["t"] > 0))
    finest = {
        t: max((one for one in maps if one["t"] == t and one["block"] > 0),
               key=lambda one: one["contrast"])["block"]
        for t in dict.fromkeys(one["t"] for one in maps)
    }  # fmt: skip
    count = sum(finest[t] == last for t in noisy)
    verdict = {len(noisy): "**holds**", 0: "**does not hold**"}.get(count, "**holds in part**")
    lines = [
        "- The paper looks at the last block while there is noise, because deep blocks hold fine "
        f"detail there. Its C is the largest of all blocks' but the first's at {count} of "
        f"{len(noisy)} key times: that {verdict}."
    ]
    clean = {one["block"]: one for one in maps if one["t"] == 0}
    tapped = next((one for one in clean.values() if one["tapped"]), None)
    if tapped is not None:
        own, deep = tapped["contrast"], clean[last]["contrast"]
        finer = "more" if own > deep else "less" if own < deep else "as much"
        lines.append(
            f"- At t = 0 the paper looks at two thirds of the depth, which keeps fine clues: block "
            f"{tapped['block']} holds {finer} fine detail than the last block "
            f"(C {own:.3f} and {deep:.3f})."
        )
    return "\n".join(lines)
