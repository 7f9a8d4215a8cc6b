"""Pictures and tables that a node leaves in a report folder and shows on itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image


def shown_report(pictures: Sequence[Path], table: str, *more: str) -> io.NodeOutput:
    """All pictures of a folder in output/accvideo and the table on the node; the first picture,
    the table and `more` on its sockets.
    """
    saved = [
        ui.SavedResult(path.name, f"accvideo/{path.parent.name}", io.FolderType.output)
        for path in pictures
    ]
    with Image.open(pictures[0]) as picture:
        first = as_image(picture)
    return io.NodeOutput(first, table, *more, ui={"images": saved, "text": [table]})


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float()[None] / 255
