"""Check workflow files against a server's `object_info`, without running them.

API workflows name inputs; UI workflows hold links by slot and widget values by position. Both are
brought to the same question: does this value fit this input's schema? Each check returns one
sentence per fault; an empty list is a valid file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

ObjectInfo = dict[str, Any]
Spec = tuple[Any, dict[str, Any]]
"""An input's type (a name, or the list of a combo's values) and its options."""

FRONTEND_NODES = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
NUMBERS = {"INT": int, "FLOAT": (int, float)}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3"}
ABSOLUTE_PATH = re.compile(r"^(/|~|[A-Za-z]:[/\\])")
PACK_ID = "accvideo"
PACK_PREFIX = "AccVideo"


def validate_api(prompt: dict[str, Any], info: ObjectInfo) -> list[str]:
    """Faults of an API workflow: node id -> {"class_type", "inputs"}."""
    faults = [f"node {node}: unknown class {entry.get('class_type')!r}"
              for node, entry in prompt.items() if entry.get("class_type") not in info]  # fmt: skip
    if faults:
        return faults
    for node, entry in prompt.items():
        where = f"{entry['class_type']} (node {node})"
        faults += [f"{where}: {fault}" for fault in _api_node(entry, prompt, info)]
    if not any(info[entry["class_type"]]["output_node"] for entry in prompt.values()):
        faults.append("no node of the workflow is an output node")
    return faults + _foreign_paths(prompt)


def validate_ui(workflow: dict[str, Any], info: ObjectInfo) -> list[str]:
    """Faults of a UI workflow: {"nodes": [...], "links": [[id, from, slot, to, slot, type]]}."""
    nodes = {node["id"]: node for node in workflow.get("nodes", [])}
    if not nodes:
        return ["the file has no nodes: is it an API workflow?"]
    faults = [f"node {node['id']}: unknown class {node['type']!r}" for node in nodes.values()
              if node["type"] not in info and node["type"] not in FRONTEND_NODES]  # fmt: skip
    if faults:
        return faults
    links = {link[0]: link for link in workflow.get("links", [])}
    for link in links.values():
        faults += [f"link {link[0]}: {fault}" for fault in _ui_link(link, nodes, info)]
    for node in nodes.values():
        if node["type"] in info:
            where = f"{node['type']} (node {node['id']})"
            faults += [f"{where}: {fault}" for fault in _ui_node(node, links, info)]
    return faults + _foreign_paths([node.get("widgets_values") for node in nodes.values()])


def inputs_of(schema: dict[str, Any]) -> dict[str, tuple[Spec, bool]]:
    """Inputs in the order of the page, required ones first: name -> (spec, required)."""
    found: dict[str, tuple[Spec, bool]] = {}
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            found[name] = ((spec[0], spec[1] if len(spec) > 1 else {}), group == "required")
    return found


def is_widget(spec: Spec) -> bool:
    """Whether the page draws a widget for an input, and not only a socket."""
    kind, options = spec
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def _chosen(spec: Spec, key: Any) -> dict[str, Any]:
    """The inputs that a dynamic combo adds when `key` is chosen, as part of a schema."""
    for option in spec[1].get("options", []):
        if option["key"] == key:
            return {"input": option["inputs"]}
    return {"input": {}}


def _api_node(entry: dict[str, Any], prompt: dict[str, Any], info: ObjectInfo) -> Iterator[str]:
    schema, given = info[entry["class_type"]], entry["inputs"]
    expected = inputs_of(schema)
    for name, (spec, required) in list(expected.items()):
        if spec[0] == "COMFY_DYNAMICCOMBO_V3":
            nested = inputs_of(_chosen(spec, given.get(name)))
            expected.update({f"{name}.{key}": value for key, value in nested.items()})
        grows = isinstance(spec[0], str) and spec[0].startswith("COMFY_AUTOGROW")
        if required and name not in given and not grows:
            yield f"required input {name!r} is missing"
    for name, value in given.items():
        if name not in expected:
            if name.partition(".")[0] not in expected:
                yield f"there is no input {name!r}"
            continue
        spec = expected[name][0]
        if isinstance(value, list):
            fault = _api_link(value, spec, prompt, info)
        elif is_widget(spec):
            fault = _value_fault(value, spec)
        else:
            fault = f"needs a link of type {spec[0]}, has {value!r}"
        if fault:
            yield f"input {name!r}: {fault}"


def _api_link(value: list[Any], spec: Spec, prompt: dict[str, Any], info: ObjectInfo) -> str:
    if len(value) != 2 or str(value[0]) not in prompt:
        return f"links to {value!r}, which is not there"
    outputs = info[prompt[str(value[0])]["class_type"]]["output"]
    if not isinstance(value[1], int) or not 0 <= value[1] < len(outputs):
        return f"links to output {value[1]!r} of node {value[0]}, which has {len(outputs)}"
    return _type_fault(outputs[value[1]], spec)


def _ui_link(link: list[Any], nodes: dict[Any, Any], info: ObjectInfo) -> Iterator[str]:
    number, origin_id, origin_slot, target_id, target_slot, _ = link
    if origin_id not in nodes or target_id not in nodes:
        yield f"joins node {origin_id} and node {target_id}, which are not both there"
        return
    origin, target = nodes[origin_id], nodes[target_id]
    outputs, inputs = origin.get("outputs", []), target.get("inputs", [])
    if origin_slot >= len(outputs) or number not in (outputs[origin_slot].get("links") or []):
        yield f"is not listed at output {origin_slot} of node {origin_id}"
        return
    if target_slot >= len(inputs) or inputs[target_slot].get("link") != number:
        yield f"is not listed at input {target_slot} of node {target_id}"
        return
    if origin["type"] in FRONTEND_NODES or target["type"] in FRONTEND_NODES:
        return
    produced = info[origin["type"]]["output"]
    if origin_slot >= len(produced):
        yield f"starts at output {origin_slot} of {origin['type']}, which has {len(produced)}"
        return
    expected = inputs_of(info[target["type"]]).get(inputs[target_slot]["name"])
    fault = _type_fault(produced[origin_slot], expected[0]) if expected else ""
    if fault:
        yield f"into {inputs[target_slot]['name']!r} of {target['type']}: {fault}"


def _ui_node(node: dict[str, Any], links: dict[Any, Any], info: ObjectInfo) -> Iterator[str]:
    schema = info[node["type"]]
    expected = inputs_of(schema)
    linked: set[str] = set()
    for slot in node.get("inputs", []):
        name, number = slot["name"], slot.get("link")
        if name.partition(".")[0] not in expected:
            yield f"there is no input {name!r}"
        if number is not None:
            linked.add(name)
            if number not in links:
                yield f"input {name!r} has link {number}, which is not there"
    for name, (spec, required) in expected.items():
        grows = isinstance(spec[0], str) and spec[0].startswith("COMFY_AUTOGROW")
        if required and not grows and not is_widget(spec) and name not in linked:
            yield f"required input {name!r} has no link"
    if len(node.get("outputs", [])) > len(schema["output"]):
        yield f"has {len(node['outputs'])} outputs, the class has {len(schema['output'])}"
    yield from _ui_widgets(node.get("widgets_values") or [], schema)
    cnr_id = node.get("properties", {}).get("cnr_id")
    if node["type"].startswith(PACK_PREFIX) and cnr_id != PACK_ID:
        yield f"properties.cnr_id is {cnr_id!r}, must be {PACK_ID!r} for installing missing nodes"


def _ui_widgets(values: list[Any] | dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    if isinstance(values, dict):
        expected = inputs_of(schema)
        pairs = [(name, expected[name][0], value) for name, value in values.items()
                 if name in expected]  # fmt: skip
    else:
        left = list(values)
        pairs = list(_take_widgets(schema, left))
        if left:
            yield f"{len(left)} widget values too many: {left!r}"
    for name, spec, value in pairs:
        fault = "has no value" if value is _MISSING else _value_fault(value, spec)
        if fault:
            yield f"widget {name!r}: {fault}"


_MISSING = object()


def _take_widgets(schema: dict[str, Any], left: list[Any]) -> Iterator[tuple[str, Spec, Any]]:
    """Give each widget its value, in the order in which the page writes them; empties `left`."""
    for name, (spec, _) in inputs_of(schema).items():
        if not is_widget(spec):
            continue
        value = left.pop(0) if left else _MISSING
        yield name, spec, value
        if spec[0] == "COMFY_DYNAMICCOMBO_V3":
            for nested, nested_spec, nested_value in _take_widgets(_chosen(spec, value), left):
                yield f"{name}.{nested}", nested_spec, nested_value
        # The page adds a widget of its own after a seed, and an upload button after a file list.
        if spec[1].get("control_after_generate") or name in ("seed", "noise_seed"):
            if left and left[0] in ("fixed", "increment", "decrement", "randomize"):
                left.pop(0)
        elif any(key.endswith("_upload") for key in spec[1]) and left:
            left.pop(0)


def _value_fault(value: Any, spec: Spec) -> str:
    """Why `value` does not fit a widget, or an empty string."""
    kind, options = spec
    if isinstance(kind, list):
        return "" if value in kind else f"{value!r} is not one of {kind!r}"
    if kind == "COMBO":
        allowed = options.get("options", [])
        return "" if value in allowed else f"{value!r} is not one of {allowed!r}"
    if kind == "COMFY_DYNAMICCOMBO_V3":
        keys = [option["key"] for option in options.get("options", [])]
        return "" if value in keys else f"{value!r} is not one of {keys!r}"
    if kind == "BOOLEAN":
        return "" if isinstance(value, bool) else f"{value!r} is not true or false"
    if kind == "STRING":
        return "" if isinstance(value, str) else f"{value!r} is not a text"
    if kind in NUMBERS:
        if isinstance(value, bool) or not isinstance(value, NUMBERS[kind]):
            return f"{value!r} is not of type {kind}"
        low, high = options.get("min", value), options.get("max", value)
        return "" if low <= value <= high else f"{value!r} is outside [{low}, {high}]"
    return ""


def _type_fault(produced: Any, spec: Spec) -> str:
    """Why an output of type `produced` cannot feed an input, or an empty string."""
    combo = isinstance(produced, list) or produced == "COMBO"
    if isinstance(spec[0], list) or spec[0] == "COMBO":
        return "" if combo or produced in ("*", "STRING") else f"{produced} cannot feed a combo"
    offered = {"COMBO"} if combo else set(str(produced).split(","))
    wanted = set(str(spec[0]).split(","))
    free = {"*", "COMFY_MATCHTYPE_V3"}
    if offered & wanted or free & (offered | wanted):
        return ""
    return f"{produced} does not fit {spec[0]}"


def _foreign_paths(value: Any) -> list[str]:
    """Faults for texts that would hold on one machine or one system only."""
    if isinstance(value, str):
        faults = []
        if "\\" in value:
            faults.append(f"a backslash in {value!r}: use / between folders")
        if ABSOLUTE_PATH.match(value):
            faults.append(f"an absolute path {value!r}: name files, not places")
        return faults
    children = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        return [fault for child in children for fault in _foreign_paths(child)]
    return []
