"""Run nodes/devices.py against ComfyUI's own memory management, on the CPU; prints what happened.

    python tests/comfyui/devices_script.py <comfyui folder> <base folder>
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import types
import weakref
from typing import Any

from pack_process import ROOT, enter


def swapped(devices: Any, teacher: Any, student: Any) -> dict[str, object]:
    """What on_device does for a network whose second layer waits, on a device of tests.

    Tensors cannot come back from the meta device, so moves to and from it are only noted.
    """
    import torch

    management, move = devices.management, devices._move
    placement = importlib.import_module("pack.accvideo_core.models.placement")
    network = teacher.model.module
    meta, here = torch.device("meta"), torch.device("cpu")
    rooms: list[object] = []
    moves: list[tuple[object, object]] = []
    carried: list[object] = []

    def moved(modules: list[Any], device: Any, keep: Any = None) -> None:
        moves.append((modules[0], device))
        if modules[0] is network and keep is not None:
            carried.extend(part for part, _, _ in placement.apart(modules, keep))
        if keep is None:
            move(modules, device)

    with torch.inference_mode():
        network.to(torch.float64)  # as if ComfyUI had moved it
    before = management.get_torch_device, management.free_memory
    management.get_torch_device = lambda: meta
    management.free_memory = lambda *asked: rooms.append(asked)
    devices._move = moved
    with devices.on_device(teacher, student, waiting=[network[1]]):
        inside = list(network.parameters())
        facts: dict[str, object] = {
            "waiting blocks stay": carried == 2 * [network[0]],  # its weight and its bias
            "waiting blocks can be trained through": not any(x.is_inference() for x in inside),
            "all other room is made": rooms == [(devices.ALL, meta)],
        }
    facts["swapped network is put away"] = moves == [
        (network, here), (network, meta), (student, meta), (student, here), (network, here)
    ]  # fmt: skip
    moves.clear()
    coder = torch.nn.Linear(1, 1)
    vae = types.SimpleNamespace(module=coder, decode=lambda x: 1 / x)
    decode = devices.decoder_beside(types.SimpleNamespace(vae_path=ROOT, vae=vae))
    devices._move = lambda modules, device: moves.append((modules[0], device))
    try:
        decode(2.0), decode(0)
    except ZeroDivisionError:
        facts["decoder comes and goes"] = moves == 2 * [(coder, meta), (coder, here)]
    facts["no decoder without a VAE"] = (
        devices.decoder_beside(types.SimpleNamespace(vae_path=None)) is None
    )
    devices._move = move
    management.get_torch_device, management.free_memory = before
    return facts


def main(comfyui: str, base: str) -> None:
    enter(comfyui, base)
    import comfy.model_management as management
    import torch
    from torch import nn

    devices = importlib.import_module("pack.nodes.devices")
    student = importlib.import_module("pack.accvideo_core.distill.student")
    placement = importlib.import_module("pack.accvideo_core.models.placement")

    class Model:
        source = "small"

        def __init__(self) -> None:
            self.module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)

    class Teacher:
        def __init__(self) -> None:
            self.model = Model()

    facts: dict[str, object] = {}
    teacher = Teacher()
    network = teacher.model.module
    with torch.inference_mode():
        devices._load(teacher, "network", network, 0)
    (loaded,) = management.current_loaded_models
    facts["counted"] = loaded.model.model_size() == 2 * (64 + 8) * 4
    facts["whole"] = loaded.model.partially_unload(torch.device("cpu"), 1) == 0
    facts["trainable"] = not any(p.is_inference() for p in network.parameters())
    devices._load(teacher, "network", network, 0)
    facts["loaded once"] = len(management.current_loaded_models) == 1
    management.unload_all_models()
    facts["unloaded"] = not management.current_loaded_models

    copied = student.shared_copy(network)
    copied.append(nn.Linear(8, 8))
    moved = {(part, name) for part, name, _ in placement.apart([copied], network)}
    facts["shared weights stay"] = moved == {(copied[2], "weight"), (copied[2], "bias")}

    facts |= swapped(devices, teacher, copied)

    management.get_total_memory = lambda *_args: 10
    try:
        devices._load(teacher, "network", network, 0)
    except ValueError as error:
        facts["refusal"] = str(error)
    gone = weakref.ref(network)
    del teacher, network, copied, loaded, moved
    gc.collect()
    facts["forgotten"] = gone() is None
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
