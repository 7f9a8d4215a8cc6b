"""The training nodes on ComfyUI's own page: the curve moves, Cancel works, a reload restores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_train_nodes import DISTILL, folder, rows, training

from scripts.comfyui.page import PageError
from scripts.comfyui.server import ComfyServer

PICTURES = Path(__file__).resolve().parents[2] / "build" / "page"
CURVE = "accvideo_curve"
FIND = """() => {
    const within = graph => graph.nodes.flatMap(n => n.subgraph ? within(n.subgraph) : [n]);
    const node = within(app.graph).find(n => n.type === "AccVideoDistill");
    return node?.widgets.find(w => w.name === "accvideo_curve")?.element;
}"""
POINTS = f"""() => {{
    const line = ({FIND})()?.querySelector("polyline");
    return line ? line.getAttribute("points").split(" ").length : 0;
}}"""
LOADED = f"""() => {{
    const image = ({FIND})()?.querySelector("img");
    return image?.complete && image.naturalWidth > 0;
}}"""
OWNERS = f"""() => app.graph.nodes.filter(n => n.widgets?.some(w => w.name === "{CURVE}"))
    .map(n => n.type)"""
INTO_SUBGRAPH = """() => {
    const node = app.graph.nodes.find(n => n.type === "AccVideoDistill");
    app.graph.convertToSubgraph(new Set([node]));
}"""


def open_training(page: Any, run: str, **inputs: Any) -> None:
    prompt = training(run, **inputs)
    for entry in prompt.values():
        entry["_meta"] = {"title": entry["class_type"]}
    page.load_api(prompt, run)
    page.page.wait_for_function(f"() => ({FIND})()?.isConnected")


def until_points(page: Any, more_than: int) -> int:
    """The number of the curve's points once it has grown; at once where a node fails."""
    grown = f"count => accvideoRun.errors.length || ({POINTS})() > count"
    page.page.wait_for_function(grown, arg=more_than)
    assert page.page.evaluate("() => accvideoRun.errors") == []
    return page.page.evaluate(POINTS)


def saved(page: Any) -> tuple[Any, Any]:
    """What the workflow stores of the training node, and what is queued for it."""
    both = page.to_prompt()
    (node,) = [n for n in both["workflow"]["nodes"] if n["type"] == "AccVideoDistill"]
    return node["widgets_values"], both["output"][DISTILL]["inputs"]


@pytest.mark.parametrize("new_nodes", [False, True], ids=["canvas", "vue"])
def test_curve_moves_stops_with_cancel_and_comes_back(
    page: Any, comfy_server: ComfyServer, new_nodes: bool
) -> None:
    run = f"page_{new_nodes}"
    page.new_nodes(new_nodes)
    open_training(page, run, train_steps=200)
    assert page.page.evaluate(OWNERS) == ["AccVideoDistill"]
    before = saved(page)
    assert len(before[0]) == len(before[1]) - 2, "a widget's value more than inputs that have one"

    page.queue()
    first = until_points(page, 0)
    until_points(page, first)
    page.screenshot(PICTURES / f"{run}.png")
    page.cancel()
    with pytest.raises(PageError, match="interrupted"):
        page.wait()
    done = len(rows(comfy_server, run))
    assert done < 200
    assert (folder(comfy_server, run) / "checkpoints" / f"{done:08d}.safetensors").is_file()
    page.page.wait_for_function(f"count => ({POINTS})() === count", arg=done)
    assert saved(page) == before

    page.reload()
    page.page.wait_for_function(f"count => ({POINTS})() === count", arg=done)
    page.page.wait_for_function(LOADED)
    assert saved(page) == before
    page.screenshot(PICTURES / f"{run}_again.png")


def test_curve_finds_its_node_inside_a_subgraph(page: Any, comfy_server: ComfyServer) -> None:
    page.new_nodes(False)
    open_training(page, "page_subgraph", train_steps=5)
    page.page.evaluate(INTO_SUBGRAPH)
    assert page.page.evaluate(OWNERS) == []
    page.run()
    assert page.page.evaluate(POINTS) == 5
