"""Assemble the trained parts into the pipeline folder that ships with the package.

    python scripts/tiny_teacher/build.py

Weights are stored in float16. Run it at any time: it takes the latest checkpoints, and with
``--allow-missing`` leaves a part that has none untrained.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoPipeline
from torch import nn

from accvideo_core.evaluate import world
from accvideo_core.models import tiny
from train_vae import half, initialise

WORK = Path("build/tiny_teacher")

log = logging.getLogger("build")


def checkpoint(name: str, allow_missing: bool) -> dict[str, Any] | None:
    path = WORK / f"{name}.pt"
    if not path.exists() and allow_missing:
        log.warning("%s is untrained: there is no %s", name, path)
        return None
    state = torch.load(path, weights_only=True)
    log.info("%s: %d steps, %.0f s", name, state["step"], state["seconds"])
    return state


def assemble(allow_missing: bool) -> HunyuanVideoPipeline:
    """The pipeline with the latest weights, float32."""
    pipeline = tiny.build_pipeline(world.VOCABULARY)
    dit = checkpoint("dit", allow_missing)
    if dit:
        pipeline.transformer.load_state_dict(dit["ema"])
    initialise(pipeline.vae)
    for part in ("decoder", "encoder"):
        state = checkpoint(part, allow_missing)
        if state:
            half(pipeline.vae, part).load_state_dict(state["modules"])
    return pipeline


def save(pipeline: HunyuanVideoPipeline, folder: Path) -> int:
    """Write float16 weights, keeping the model card; returns the size in bytes.

    The configurations go on saying float32: that is how the folder is meant to be run.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else None
    beside = WORK / "pipeline"
    shutil.rmtree(beside, ignore_errors=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()
    tiny.save_pipeline(pipeline, beside)
    for config in beside.glob("*/config.json"):
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if "dtype" in settings:
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if text is not None:
        (beside / "README.md").write_text(text, encoding="utf-8")
    for file in beside.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(beside, folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--allow-missing", action="store_true")
    parser.add_argument("--output", type=Path, default=tiny.embedded_teacher_path())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = save(assemble(options.allow_missing), options.output)
    log.info("%s: %.1f MB", options.output, size / 1e6)


if __name__ == "__main__":
    main()
