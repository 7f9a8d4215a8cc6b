"""ComfyUI's own page in a headless Chromium: workflows open, nothing is missing, one runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.comfyui.validate import validate_api

ROOT = Path(__file__).resolve().parents[2]
UI_WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FAST = ROOT / "workflows" / "tiny_sample.json"
PICTURES = ROOT / "build" / "page"


@pytest.mark.parametrize("path", UI_WORKFLOWS, ids=lambda path: path.stem)
def test_dropped_workflow_opens_whole(
    page: Any, path: Path, object_info: dict[str, Any], tmp_path: Path
) -> None:
    page.drop(path)
    assert page.missing_nodes() == []
    assert validate_api(page.to_prompt()["output"], object_info) == []
    assert page.screenshot(PICTURES / f"{path.stem}.png").stat().st_size > 10_000


def test_page_names_a_missing_node(page: Any) -> None:
    workflow = json.loads(FAST.read_text(encoding="utf-8"))
    workflow["nodes"][0]["type"] = "AccVideoGone"
    page.load(workflow)
    assert page.missing_nodes() == ["AccVideoGone"]


def test_fast_workflow_runs_from_the_page(page: Any) -> None:
    page.drop(FAST)
    page.run(timeout=600)
    assert page.screenshot(PICTURES / "ran.png").is_file()
