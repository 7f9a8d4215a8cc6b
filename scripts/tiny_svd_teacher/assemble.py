"""Assemble the trained parts into the image-to-video pipeline folder that ships with the package.

    python scripts/tiny_svd_teacher/assemble.py

Weights are stored in float16. Run it at any time: it takes the latest checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableVideoDiffusionPipeline
from torch import nn

from accvideo_core.models import tiny_svd
from train_temporal_vae import half

WORK = Path("build/tiny_svd_teacher")

log = logging.getLogger("assemble")


def checkpoint(name: str) -> dict[str, Any]:
    state = torch.load(WORK / f"{name}.pt", weights_only=True)
    log.info("%s: %d steps, %.0f s", name, state["step"], state["seconds"])
    return state


def assemble() -> StableVideoDiffusionPipeline:
    """The pipeline with the latest weights, float32."""
    pipeline = tiny_svd.build_pipeline()
    pipeline.unet.load_state_dict(checkpoint("unet")["ema"])
    for part in ("decoder", "encoder"):
        half(pipeline.vae, part).load_state_dict(checkpoint(part)["modules"])
    return pipeline


def save(pipeline: StableVideoDiffusionPipeline, folder: Path) -> int:
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
    pipeline.save_pretrained(beside, safe_serialization=True)
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
    parser.add_argument("--output", type=Path, default=tiny_svd.embedded_image_teacher_path())
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = save(assemble(), options.output)
    log.info("%s: %.1f MB", options.output, size / 1e6)


if __name__ == "__main__":
    main()
