"""Make the UI form of API workflows: the files that a person drags into the page.

The API form is the source; node titles and groups come from its `_meta`, and so do notes, which
become Markdown above their node. Groups stand from left to right in the order in which they first
appear, and so do the nodes inside them.

    python -m scripts.comfyui.make_ui_workflow    (workflows/api/*.json -> workflows/)
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

from scripts.comfyui.client import ComfyClient
from scripts.comfyui.server import BASE, ROOT, ComfyServer
from scripts.comfyui.validate import PACK_ID, PACK_PREFIX, ObjectInfo, inputs_of, is_widget

WIDTH, GAP, HEAD = 330, 40, 60
ROW = 26
"""Height of a slot or a widget."""
NOTE_WIDTH, NOTE_COLUMNS, LINE = 480, 62, 24
"""A note's width in pixels and in characters, and the height of its lines."""
TALL = 1000
"""Height at which a group begins a new column."""
SHOWS = {
    **dict.fromkeys(("AccVideoDistill", "AccVideoAdversarialTune"), 250),
    **dict.fromkeys(("AccVideoCompare", "AccVideoEvaluate"), 320),
    "AccVideoInspectTrajectory": 320,
    "AccVideoInspectFeatures": 320,
    "AccVideoToyExperiment": 320,
    "SaveVideo": 320,
    "PreviewAny": 160,
}
"""Room for what a node shows while it runs or when it has run."""
COLOURS = ["#3f789e", "#a1309b", "#8A8", "#b58b2a", "#88A", "#b06634"]


def to_ui(prompt: dict[str, Any], info: ObjectInfo, name: str) -> dict[str, Any]:
    """The UI form of an API workflow; the same input gives the same output."""
    numbers = {node: int(node) for node in prompt}
    nodes = {node: _node(numbers[node], entry, info) for node, entry in prompt.items()}
    links: list[list[Any]] = []
    for node, entry in prompt.items():
        for slot, socket in enumerate(nodes[node]["inputs"]):
            origin, output = entry["inputs"].get(socket["name"], (None, None))
            if origin is None:
                continue
            number = len(links) + 1
            source = nodes[origin]["outputs"][output]
            source["links"].append(number)
            socket["link"] = number
            target = numbers[node]
            links.append([number, numbers[origin], output, target, slot, source["type"]])
    notes = _notes(prompt, first=max(numbers.values()) + 1)
    groups = _lay_out(prompt, nodes, notes)
    placed = [*nodes.values(), *notes.values()]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"accvideo/{name}")),
        "revision": 0,
        "last_node_id": max(node["id"] for node in placed),
        "last_link_id": len(links),
        "nodes": placed,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(number: int, entry: dict[str, Any], info: ObjectInfo) -> dict[str, Any]:
    kind, given = entry["class_type"], entry["inputs"]
    schema = info[kind]
    sockets, values, rows = [], [], 0
    for name, (spec, _) in inputs_of(schema).items():
        linked = isinstance(given.get(name), list)
        if is_widget(spec):
            values += _widget_values(name, spec, None if linked else given.get(name))
            rows += 4 if spec[1].get("multiline") else 1
        if linked or not is_widget(spec):
            widget = {"widget": {"name": name}} if is_widget(spec) else {}
            sockets.append({"name": name, "type": spec[0], **widget, "link": None})
    outputs = [
        {"name": name, "type": produced, "links": []}
        for name, produced in zip(schema["output_name"], schema["output"], strict=True)
    ]
    height = HEAD + ROW * (rows + max(len(sockets), len(outputs))) + SHOWS.get(kind, 0)
    ours = kind.startswith(PACK_PREFIX)
    return {
        "id": number,
        "type": kind,
        "pos": [0, 0],
        "size": [WIDTH, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "title": entry["_meta"]["title"],
        "properties": {"cnr_id": PACK_ID if ours else "comfy-core", "Node name for S&R": kind},
        "widgets_values": values,
    }


def _notes(prompt: dict[str, Any], first: int) -> dict[str, dict[str, Any]]:
    """The notes in the nodes' `_meta`, by the node that each stands above."""
    texts = {node: entry["_meta"]["note"] for node, entry in prompt.items()
             if "note" in entry["_meta"]}  # fmt: skip
    return {
        node: {
            "id": first + index,
            "type": "MarkdownNote",
            "pos": [0, 0],
            "size": [NOTE_WIDTH, HEAD + LINE * _lines(text)],
            "flags": {},
            "order": first + index - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": "Read me",
            "properties": {},
            "widgets_values": [text],
        }
        for index, (node, text) in enumerate(texts.items())
    }


def _lines(text: str) -> int:
    """Lines that a text takes on the page, about."""
    return sum(1 + len(line) // NOTE_COLUMNS for line in text.splitlines())


def _widget_values(name: str, spec: Any, value: Any) -> list[Any]:
    """A widget's value, its default when none is given, and that of the widget a seed brings."""
    kind, options = spec
    if value is None:
        choices = kind if isinstance(kind, list) else options.get("options") or [""]
        value = options.get("default", choices[0])
    seed = name in ("seed", "noise_seed")
    controlled = options.get("control_after_generate", seed)
    return [value, "fixed"] if controlled else [value]


def _lay_out(
    prompt: dict[str, Any], nodes: dict[str, Any], notes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Give every node its place; returns the groups around them."""
    members: dict[str, list[Any]] = {}
    for node, entry in prompt.items():
        group = members.setdefault(entry["_meta"]["group"], [])
        group += [notes[node]] if node in notes else []
        group.append(nodes[node])
    groups, left = [], 0
    for index, (title, inside) in enumerate(members.items()):
        x, y, bottom, width = left + GAP, GAP + HEAD, 0, 0
        for node in inside:
            if y > GAP + HEAD and y + node["size"][1] > TALL:
                x, y, width = x + width + GAP, GAP + HEAD, 0
            node["pos"] = [x, y]
            width = max(width, node["size"][0])
            y += node["size"][1] + GAP + 30
            bottom = max(bottom, y)
        right = x + width + GAP
        groups.append(
            {
                "id": index + 1,
                "title": title,
                "bounding": [left, 0, right - left, bottom],
                "color": COLOURS[index % len(COLOURS)],
                "font_size": 24,
                "flags": {},
            }
        )
        left = right + GAP
    return groups


def main() -> None:
    folder = ROOT / "workflows"
    parser = argparse.ArgumentParser(description="Make the UI form of API workflows.")
    made = sorted({*folder.glob("api/*.json")} - {folder / "api" / "smoke_line.json"})
    parser.add_argument("files", type=Path, nargs="*", default=made)
    options = parser.parse_args()
    with ComfyServer(BASE) as server:
        info = ComfyClient(server.url).object_info()
    for path in options.files:
        workflow = to_ui(json.loads(path.read_text(encoding="utf-8")), info, path.stem)
        (folder / path.name).write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
