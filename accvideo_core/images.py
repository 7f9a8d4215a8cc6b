"""Reading images, and bringing them to a video's size.

Shapes: H, W pixels, 3 colours in [0, 1].
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .errors import AccVideoError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_WIDE = 65535.0


def read_image(path: Path) -> Tensor:
    """Pixels [H, W, 3] float32 in [0, 1] of a PNG, JPEG, WebP or BMP file.

    It stands as its EXIF orientation says. What is transparent is put on black. Grey of 16 bits
    keeps them all (of colours Pillow gives 8); of an animation the first picture is read.

    Raises:
        AccVideoError: the file is missing, damaged or no such image.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise AccVideoError(f"there is no image {path}; check the path")
    try:
        # Named formats only: some of Pillow's others start a program.
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            pixels = _pixels(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise AccVideoError(
            f"{path} is no image that can be read ({reason}); save it as PNG or JPEG again"
        ) from error
    return torch.from_numpy(pixels)


def fitted(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of `image` [H, W, 3] that has the video's shape, in its size [height, width, 3].

    As much as possible is kept, so only two opposite sides lose something. An image that has the
    size already is returned as it is.
    """
    if image.dim() != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise AccVideoError(
            f"the image has shape {tuple(image.shape)}; expected [height, width, 3]"
        )
    if tuple(image.shape[:2]) == (height, width):
        return image
    full_height, full_width = image.shape[:2]
    scale = min(full_height / height, full_width / width)
    kept = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (full_height - kept[0]) // 2, (full_width - kept[1]) // 2
    middle = image[top : top + kept[0], left : left + kept[1]].float().movedim(-1, 0)[None]
    # Antialiasing averages over what one pixel of a smaller picture covers.
    resized = torch.nn.functional.interpolate(
        middle, (height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0].movedim(0, -1).clamp(0, 1).contiguous()


def _pixels(image: Image) -> np.ndarray:
    """[H, W, 3] float32 in [0, 1]."""
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255, which makes them white
        grey = np.asarray(image).astype(np.float32) / _WIDE
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255
