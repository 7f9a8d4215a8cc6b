"""Prompts with images through CONDITIONING and back, with ComfyUI's API; prints what happened.

    python tests/comfyui/sockets_script.py <comfyui folder> <base folder>

The base folder holds Wan's image-to-video pipeline in "teacher".
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

from pack_process import enter, refusal

WORDS = ("a red circle", "a blue square")


def main(comfyui: str, base: str) -> None:
    enter(comfyui, base)
    sockets = importlib.import_module("pack.nodes.sockets")
    node = importlib.import_module("pack.nodes.teacher").AccVideoEncodePrompts
    loading = importlib.import_module("pack.accvideo_core.models.loading")
    teacher = loading.load_teacher(Path(base) / "teacher")
    facts = {**round_trips(sockets), **encoded(sockets, node, teacher), **latents(sockets)}
    print(json.dumps(facts))


def round_trips(sockets: Any) -> dict[str, Any]:
    """Whether conditions with every kind of image come back as they were."""
    import torch

    conditioning = sockets.Condition
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    family = types.SimpleNamespace(encode_image=len, from_native=None)
    model = types.SimpleNamespace(family=family, latent_spec=None)
    mask = torch.ones(1, 5, dtype=torch.bool)
    given: dict[str, dict[str, torch.Tensor]] = {
        "latents": {"image": random(20, 2, 4, 4)},
        "latents and tokens": {
            "image": random(20, 2, 4, 4),
            "image_tokens": random(7, 16),
            "mask": mask,
        },
        "everything": {
            "image": random(16, 1, 4, 4),
            "image_tokens": random(7, 16),
            "mask": mask,
            "pooled": random(12),
            "guidance": torch.tensor([6.0]),
            "micro": torch.tensor([[6.0, 127.0, 0.02]]),
        },
    }
    facts = {}
    for name, tensors in given.items():
        prompt = sockets.Prompt.of("a red circle", conditioning(text=random(5, 20), **tensors))
        native = sockets.to_native([prompt])
        (back,) = sockets.from_native(copy.deepcopy(native), model)
        same = back.condition.tensors().keys() == prompt.condition.tensors().keys() and all(
            torch.equal(x, prompt.condition.tensors()[field])
            for field, x in back.condition.tensors().items()
        )
        keys = set(native[0][1]) - {"pooled_output", "guidance"}
        ours = all(key.startswith("accvideo_") for key in keys)
        facts[name] = same and ours and (back.id, back.text) == (prompt.id, prompt.text)
    plain = conditioning(
        text=random(5, 20), mask=mask, pooled=random(12), guidance=torch.tensor([6.0])
    )
    native = sockets.to_native([sockets.Prompt.of("a red circle", plain)])
    return {**facts, "text alone": sorted(native[0][1])}


def encoded(sockets: Any, node: Any, teacher: Any) -> dict[str, Any]:
    """What the node makes of prompts and images."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 32, 48, 3, generator=generator)
    size = {"width": 48, "height": 32, "frames": 5}

    def run(prompts: str, images: torch.Tensor, **more: Any) -> list[Any]:
        with torch.inference_mode():  # as ComfyUI runs nodes
            made = node.execute(teacher, prompts, images=images.clone(), **size, **more).args[0]
            return sockets.from_native(made, teacher.model)

    pair = run("\n".join(WORDS), images)
    tensors = [x for prompt in pair for x in prompt.condition.tensors().values()]
    alone = [
        teacher.encode_image(text, image, 5) for text, image in zip(WORDS, images, strict=True)
    ]
    large = run("a red circle", torch.rand(1, 70, 50, 3, generator=generator))
    text_only = types.SimpleNamespace(encode_image=None, title="Wan 2.1 text to video")
    foreign = types.SimpleNamespace(family=text_only)
    unseen = [[alone[0].condition.text, {"concat_latent_image": torch.zeros(1, 16, 2, 4, 6)}]]
    return {
        "one entry each": [prompt.id for prompt in pair] == [prompt.id for prompt in alone],
        "trainable": not any(x.is_inference() for x in tensors),
        "one image for all": len({prompt.id for prompt in run("\n".join(WORDS), images[:1])}) == 2,
        "one prompt for all": len({prompt.id for prompt in run("a red circle", images)}) == 2,
        "fitted": large[0].condition.image.shape == (1, 20, 2, 4, 6),
        "unpaired": refusal(lambda: run("a\nb\nc", images)),
        "with clip": refusal(lambda: run("a", images, clip=object())),
        "foreign": refusal(lambda: sockets.from_native(sockets.to_native(alone), foreign)),
        "stock": refusal(lambda: sockets.from_native(unseen, teacher.model)),
    }


def latents(sockets: Any) -> dict[str, Any]:
    """What a LATENT is for a VAE of frames and for one of images."""
    import torch

    spec = importlib.import_module("pack.accvideo_core.latents").LatentSpec
    x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    video, images = spec(4, stride_t=4, stride_hw=8), spec(4, stride_t=1, stride_hw=8)
    native = sockets.to_latent(x, images)
    stock = sockets.from_latent({"samples": native["samples"][:3]}, images)
    return {
        "of a video": sockets.to_latent(x, video)["samples"] is x,
        "of images": torch.equal(native["samples"][3], x[1, :, 0]),
        "of images and back": torch.equal(sockets.from_latent(native, images), x),
        "of stock images": torch.equal(stock, x[:1]),
        "images for a video": refusal(lambda: sockets.from_latent(native, video)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
