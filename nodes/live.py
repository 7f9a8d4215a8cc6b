"""A run as the page draws it: told while it trains, and asked for when the page is opened again.

The page needs neither; without it, a node's preview shows the same (train_monitor.py).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import folder_paths

from ..accvideo_core.distill.metrics import read_metrics
from ..accvideo_core.distill.run import CONFIG_FILE
from ..accvideo_core.distill.watch import LOOKS_FILE
from ..accvideo_core.errors import AccVideoError
from ..accvideo_core.evaluate.curve import LossCurve
from ..accvideo_core.files import read_json
from . import paths

EVENT = "accvideo.train"
ROUTE = "/accvideo/run"
POINTS = 250
"""Of each line; a node is not many more pixels wide."""

PREVIEW = "preview.png"
"""The last sample in a run's folder, where its recipe asks for none in samples/."""

_drawing: set[str] = set()
"""Clients whose pages draw runs themselves."""


def state(run: str, curve: LossCurve, sample: Path | None, **more: Any) -> dict[str, Any]:
    """What a page draws, JSON-ready; lines are [[step, loss], ...] by term."""
    return {
        "run": run,
        "step": curve.step,
        "lines": curve.lines(POINTS),
        "sample": None if sample is None else _address(sample),
        **more,
    }


def stored(run: str) -> dict[str, Any]:
    """The state of a run as its folder tells it; an empty one where there is no run.

    Raises:
        AccVideoError: the name is none.
    """
    folder = paths.run_folder(run)
    config = folder / CONFIG_FILE
    total = read_json(config)["recipe"]["train_steps"] if config.is_file() else 0
    more = {"total": total, "notes": last_notes(folder)}
    return state(run, LossCurve.of_run(folder), last_sample(folder), **more)


def last_sample(folder: Path) -> Path | None:
    """The newest picture of a run."""
    found = [path for path in (*folder.glob("samples/*.png"), folder / PREVIEW) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def last_notes(folder: Path) -> tuple[str, ...]:
    """What the last look at a run's student said."""
    looks = read_metrics(folder / LOOKS_FILE)
    return tuple(looks[-1]["notes"]) if looks else ()  # type: ignore[arg-type]


def tell(node: str, told: dict[str, Any]) -> None:
    """Send a state to the page that queued the running prompt."""
    server = _server()
    if server is not None:
        server.send_sync(EVENT, {"node": node, **told}, server.client_id)


def page_draws() -> bool:
    """Whether the page that queued the running prompt draws runs itself."""
    server = _server()
    return server is not None and server.client_id in _drawing


def register_route() -> None:
    """Answer GET /accvideo/run?name=<run>; nothing outside the folder of runs can be named."""
    server = _server()
    if server is not None:
        server.routes.get(ROUTE)(_answer)


async def _answer(request: Any) -> Any:
    from server import web

    query = request.rel_url.query
    client, server = query.get("client"), _server()
    if server is not None and client in server.sockets:
        _drawing.add(client)
    try:
        # Metrics of a long run take their time to read, and the server has others to serve.
        found = await asyncio.to_thread(stored, query.get("name", ""))
    except AccVideoError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(found)


def _address(file: Path) -> dict[str, Any]:
    """Where ComfyUI's /view serves a file of the output folder; changes when the file does."""
    output = Path(folder_paths.get_output_directory()).resolve()
    return {
        "filename": file.name,
        "subfolder": file.parent.relative_to(output).as_posix(),
        "type": "output",
        "version": file.stat().st_mtime_ns // 1_000_000,
    }


def _server() -> Any:
    """The running server; None where nodes are used without one."""
    # Not imported: without a server that would bring half of ComfyUI in.
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)
