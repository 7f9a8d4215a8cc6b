"""The nodes' schemas as the compatibility of saved workflows sees them.

    python tests/comfyui/schemas.py dump <comfyui folder> <base folder>    print them as JSON
    python tests/comfyui/schemas.py freeze                                 write the golden files

UI workflows hold widget values by position and links by slot, API workflows hold names; so schemas
may only grow at the end. Texts (tooltips, display names, categories) are free to change.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent / "golden"
KEPT_OPTIONS = ("options", "min", "max")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

Schema = dict[str, Any]


def reduced(info: dict[str, Any]) -> Schema:
    """What a saved workflow depends on, of one node's object_info."""
    return {
        "required": _inputs(info["input"].get("required", {})),
        "optional": _inputs(info["input"].get("optional", {})),
        "outputs": [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)],
        "output_node": info["output_node"],
    }


def _inputs(inputs: dict[str, Any]) -> list[list[Any]]:
    """[name, type, the options that decide whether a value is accepted], in order."""
    return [
        [name, spec[0], {key: spec[1][key] for key in KEPT_OPTIONS if key in spec[1]}]
        for name, spec in inputs.items()
    ]


def breaks(old: dict[str, Schema], new: dict[str, Schema]) -> list[str]:
    """One sentence for everything that worked with `old` schemas and does not with `new` ones."""
    faults = [f"{name} is gone" for name in old if name not in new]
    for name in old.keys() & new.keys():
        faults += [f"{name}: {fault}" for fault in _breaks_node(old[name], new[name])]
    return sorted(faults)


def _breaks_node(old: Schema, new: Schema) -> list[str]:
    faults = []
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        faults.append("outputs may only be added at the end")
    if old["output_node"] and not new["output_node"]:
        faults.append("is no output node any more")
    if not {each[0] for each in new["required"]} <= {each[0] for each in old["required"]}:
        faults.append("new inputs must be optional: API workflows do not have them")
    # What need not be given any more is still taken; only a widget's place would change by it.
    freed = {each[0] for each in new["optional"] if each[1] not in WIDGETS}
    old = {**old, "required": [each for each in old["required"] if each[0] not in freed]}
    for group in ("required", "optional"):
        names = [each[0] for each in old[group]]
        if [each[0] for each in new[group]][: len(names)] != names:
            faults.append(f"{group} inputs may only be added at the end")
            continue
        for before, after in zip(old[group], new[group], strict=False):
            faults += [f"{before[0]}: {fault}" for fault in _breaks_input(before, after)]
    return faults


def _breaks_input(old: list[Any], new: list[Any]) -> list[str]:
    faults = []
    missing = set(str(old[1]).split(",")) - set(str(new[1]).split(","))
    if missing:
        faults.append(f"type {old[1]} became {new[1]}")
    before, after = old[2], new[2]
    lost = [value for value in before.get("options", []) if value not in after.get("options", [])]
    if lost:
        faults.append(f"no longer takes {', '.join(map(repr, lost))}")
    if "min" in after and ("min" not in before or after["min"] > before["min"]):
        faults.append("its minimum rose")
    if "max" in after and ("max" not in before or after["max"] < before["max"]):
        faults.append("its maximum fell")
    return faults


def golden() -> dict[str, Schema]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}


def current(comfyui: Path) -> dict[str, Schema]:
    """The schemas that the checkout has now, stated by the ComfyUI in `comfyui`.

    Runs in a process of its own: ComfyUI's modules have names such as `nodes` and `utils`.
    Raises ImportError where ComfyUI's API cannot be imported.
    """
    with tempfile.TemporaryDirectory() as base:
        command = [sys.executable, __file__, "dump", str(comfyui), base]
        done = subprocess.run(command, cwd=base, capture_output=True, text=True, check=False)
    if "No module named 'comfy" in done.stderr:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(done.stderr)
    infos = json.loads(done.stdout.splitlines()[-1])
    return {name: reduced(info) for name, info in infos.items()}


def dump(comfyui: str, base: str) -> None:
    """Print object_info of every node of the pack, loaded as ComfyUI loads it."""
    sys.path[0] = comfyui
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, base
    spec = importlib.util.spec_from_file_location(
        "pack_under_test", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack_under_test"] = module
    spec.loader.exec_module(module)

    async def collect() -> dict[str, Any]:
        extension = await module.comfy_entrypoint()
        await extension.on_load()
        nodes = await extension.get_node_list()
        return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in nodes}

    print(json.dumps(asyncio.run(collect())))


def freeze() -> None:
    """Write the golden files, unless that would break saved workflows."""
    sys.path.insert(0, str(ROOT))
    from scripts.comfyui.server import server_folder

    now = current(server_folder())
    faults = breaks(golden(), now)
    if faults:
        raise SystemExit("\n".join(["Not written, saved workflows would break:", *faults]))
    for name, schema in now.items():
        (GOLDEN / f"{name}.json").write_text(json.dumps(schema, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "dump":
        dump(*sys.argv[2:])
    else:
        freeze()
