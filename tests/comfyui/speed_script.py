"""Speed Settings, tiny decoders and their previews in ComfyUI's own process; prints what happened.

    python tests/comfyui/speed_script.py <comfyui folder> <base folder>

The base folder holds a HunyuanVideo pipeline in "teacher".
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pack_process import enter, refusal

SIZE = {"width": 32, "height": 32, "frames": 5, "seed": 3, "steps": 2, "batch_size": 1}
PLAIN: dict[str, Any] = {
    **{"attention": "auto", "sparse": "dense", "compile": False, "cuda_graphs": False},
    **{"fp8": False, "swap_blocks": 0, "cfg_batch": "auto"},
}


def main(comfyui: str, base: str) -> None:
    enter(comfyui, base)
    import folder_paths

    folder_paths.set_output_directory(str(Path(base) / "output"))
    loading = importlib.import_module("pack.accvideo_core.models.loading")
    nodes = {
        name: importlib.import_module(f"pack.nodes.{name}")
        for name in ("speed", "sample", "dataset", "decoders", "previews", "sockets", "compare")
    }
    teacher = loading.load_teacher(Path(base) / "teacher")
    facts = {**sampled(nodes, teacher), **recorded(nodes, teacher), **waiting(nodes, teacher)}
    facts |= compared(nodes, teacher)
    print(json.dumps({**facts, **decoded(nodes, loading, folder_paths, Path(base))}))


def settings(nodes: dict[str, Any], **changes: Any) -> Any:
    """What the node gives out."""
    return nodes["speed"].AccVideoSpeed.execute(**{**PLAIN, **changes}).args[0]


def sampled(nodes: dict[str, Any], teacher: Any) -> dict[str, Any]:
    """Whether settings change the latents, and what they leave behind."""
    import torch

    prompts = nodes["sockets"].to_native(teacher.encode_prompts(["a red circle"]))
    network = teacher.model.module
    processors = [m.processor for m in network.modules() if hasattr(m, "processor")]

    def run(**more: Any) -> torch.Tensor:
        with torch.inference_mode():  # as ComfyUI runs nodes
            out = nodes["sample"].AccVideoSample.execute(teacher, prompts, **SIZE, **more)
        return out.args[0]["samples"]

    def frames(of: torch.Tensor, decoder: str) -> torch.Tensor:
        with torch.inference_mode():
            out = nodes["sample"].AccVideoDecode.execute(teacher, {"samples": of}, 0, 8, decoder)
        return out.args[0]

    plain = run()
    decoded, last = (frames(plain, name) for name in list(nodes["decoders"].VAES)[:2])
    swapped = run(speed=settings(nodes, attention="math", swap_blocks=2))
    after = [m.processor for m in network.modules() if hasattr(m, "processor")]
    return {
        "settings change no result": bool(torch.allclose(plain, swapped, atol=1e-5)),
        "channels last shows the same": bool(torch.allclose(decoded, last, atol=1e-4)),
        "nothing is left behind": all(a is b for a, b in zip(processors, after, strict=True)),
        "trainable afterwards": not any(
            p.is_inference() for m in (network, teacher.vae.module) for p in m.parameters()
        ),
        "together": refusal(lambda: settings(nodes, cuda_graphs=True, swap_blocks=2)),
        "too many": refusal(lambda: run(speed=settings(nodes, swap_blocks=900))),
        "kernel": refusal(lambda: run(speed=settings(nodes, attention="sage"))),
    }


def recorded(nodes: dict[str, Any], teacher: Any) -> dict[str, Any]:
    """What recording takes of the settings."""
    import torch

    prompts = nodes["sockets"].to_native(teacher.encode_prompts(["a red circle"]))
    size = {"width": 32, "height": 32, "frames": 5, "samples_per_prompt": 1, "seed": 0}
    steps = {"teacher_steps": 2, "keep": 2, "batch_size": 1, "dtype": "float32"}

    def run(dataset: str, **more: Any) -> torch.Tensor:
        node = nodes["dataset"].AccVideoRecordTrajectories
        with torch.inference_mode():
            found = node.execute(teacher, prompts, dataset, **size, **steps, **more).args[0]
        return found.read(found.ids()[0]).latents

    plain = run("plain")
    fast = run("fast", speed=settings(nodes, swap_blocks=2))
    inexact = settings(nodes, sparse="radial")
    return {
        "recorded alike": bool(torch.allclose(plain, fast, atol=1e-5)),
        "recorded inexactly": refusal(lambda: run("never", speed=inexact)),
    }


def compared(nodes: dict[str, Any], teacher: Any) -> dict[str, Any]:
    """What a comparison takes of the settings."""
    import torch

    students = importlib.import_module("pack.accvideo_core.distill.student")
    times, spec = (1.0, 0.0), teacher.model.latent_spec
    info = students.StudentInfo(
        teacher.model.family.name, "", times, None, students.LoraSpec(rank=2), spec, 5, 32, 32
    )
    student = nodes["sockets"].StudentHandle(students.Student.create(teacher.model, info), teacher)
    prompts = nodes["sockets"].to_native(teacher.encode_prompts(["a red circle"]))
    how = {"count": 1, "seed": 0, "batch_size": 1, "fps": 8.0, "samples_per_prompt": 1}

    def run(name: str, **changes: Any) -> torch.Tensor:
        node, speed = nodes["compare"].AccVideoCompare, settings(nodes, **changes)
        with torch.inference_mode():
            return node.execute(teacher, student, prompts, name, **how, speed=speed).args[0]

    plain = run("plain")
    return {
        "compared alike": bool(torch.allclose(plain, run("fast", swap_blocks=2), atol=2 / 255)),
        "compared inexactly": refusal(lambda: run("never", sparse="radial")),
    }


def waiting(nodes: dict[str, Any], teacher: Any) -> dict[str, Any]:
    """Which parts stay in main memory."""
    import copy
    from dataclasses import replace

    model, of = teacher.model, nodes["speed"].waiting_modules
    full = replace(model, module=copy.deepcopy(model.module))
    some = settings(nodes, swap_blocks=2)
    own = of([full], model, some)
    return {
        "nothing waits": of([model], model, settings(nodes)) == of([model], model, None) == [],
        "blocks wait": len(of([model], model, some)) == 2,
        "an unasked teacher waits": own[0] is model.module and len(own) == 3,
        "a teacher that is compared does not": len(of([model, full], model, some)) == 4,
    }


def decoded(
    nodes: dict[str, Any], loading: Any, folder_paths: Any, base: Path
) -> dict[str, Any]:
    """A tiny decoder in models/vae_approx, chosen at the node and found for previews."""
    import torch

    tiny = importlib.import_module("pack.accvideo_core.models.tiny_decoder")
    families = importlib.import_module("pack.accvideo_core.models")
    folder = Path(folder_paths.get_folder_paths("vae_approx")[0])
    folder.mkdir(parents=True, exist_ok=True)
    names = nodes["decoders"]
    before = names.decoder_input().options
    torch.manual_seed(0)
    for name in ("taehv.pth", "taew2_1.pth"):
        torch.save(tiny.TinyNetwork(shapes()).state_dict(), folder / name)
    folder_paths.filename_list_cache.clear()

    def teacher(family: str) -> Any:
        entry = families.FAMILIES[family]
        sizes = {"in_channels": 16, "out_channels": 16}
        model = families.VideoModel(torch.nn.Linear(1, 1), entry, entry.latent_spec(sizes, {}))
        return loading.Teacher(model, base)

    hunyuan = teacher("hunyuan_video")
    latent = {"samples": torch.randn(2, 16, 2, 4, 6)}

    def decode(which: Any, name: str) -> torch.Tensor:
        with torch.inference_mode():
            return nodes["sample"].AccVideoDecode.execute(which, latent, 1, 24.0, name).args[0]

    preview = nodes["previews"].previewer(hunyuan, draw=lambda frames: frames)
    return {
        "listed": sorted(set(names.decoder_input().options) - set(before)),
        "decoded": list(decode(hunyuan, "taehv.pth").shape),
        "preview": list(preview(latent["samples"]).shape),
        "preview of another family": names.decoder_for_previews(teacher("cogvideox_5b")) is None,
        "another family": refusal(lambda: decode(hunyuan, "taew2_1.pth")),
        "no such file": nodes["sample"].AccVideoDecode.validate_inputs(decoder="gone.pth"),
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Of a tiny decoder for 16 channels, all its layers 4 wide."""
    grows = {f"decoder.{7 + 6 * i}.conv.weight": (4 * g, 4) for i, g in enumerate((1, 2, 2))}
    afters = {f"decoder.{8 + 6 * i}.weight": (4, 4) for i in range(3)}
    return {"decoder.1.weight": (4, 16), "decoder.22.weight": (3, 4), **grows, **afters}


if __name__ == "__main__":
    main(*sys.argv[1:])
