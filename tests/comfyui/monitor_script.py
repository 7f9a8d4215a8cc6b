"""Run nodes/train_monitor.py against ComfyUI's modules with a server and a clock of tests.

    python tests/comfyui/monitor_script.py <comfyui folder> <base folder>

Prints what was told of a run that goes on after update 500.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pack_process import enter

TOTAL, DONE, SECONDS = 1000, 500, 0.1


class Server:
    """What of a PromptServer a monitor uses; keeps what is sent."""

    client_id: str | None = None

    def __init__(self) -> None:
        self.sockets: dict[str, object] = {}
        self.events: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.previews: list[list[int]] = []

    def send_sync(self, event: str, data: dict[str, Any], sid: str | None) -> None:
        assert event == "accvideo.train" and sid == self.client_id
        self.events.append(json.loads(json.dumps(data)))

    def send_progress_text(self, text: str, node: str, sid: str | None) -> None:
        self.texts.append(text)

    def progress(self, value: int, total: int, preview: Any, node_id: Any = None) -> None:
        if preview is not None:
            self.previews.append([value, *preview[1].size, preview[2]])


class Clock:
    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


def main(comfyui: str, base: str) -> None:
    enter(comfyui, base)
    import comfy.model_management as management
    import comfy.utils
    import folder_paths
    import server as comfy_server
    from comfy_execution.utils import CurrentNodeContext
    from PIL import Image

    monitors = importlib.import_module("pack.nodes.train_monitor")
    Progress = importlib.import_module("pack.accvideo_core.monitor").Progress
    server = Server()
    comfy_server.PromptServer.instance = server  # type: ignore[assignment]
    comfy.utils.set_progress_bar_global_hook(server.progress)
    monitors.time = sys.modules["pack.nodes.monitor"].time = Clock  # type: ignore[attr-defined]

    run = Path(folder_paths.get_output_directory()) / "accvideo" / "runs" / "long"
    (run / "samples").mkdir(parents=True)
    lines = [json.dumps({"step": i, "trajectory": 1 / i}) for i in range(1, DONE + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    looks = {600: ("motion fell to 80 % of the teacher's",), 800: ()}
    facts: dict[str, Any] = {}
    with CurrentNodeContext("prompt", "12:3", 0):
        monitor = monitors.TrainMonitor("long", lambda _: None)
        for step in range(DONE + 1, TOTAL + 1):
            Clock.now += SECONDS
            if step in looks:
                sheet = run / "samples" / f"{step}.png"
                Image.new("RGB", (800, 200), "navy").save(sheet)
                monitor(Progress("look", 1, 2, preview=lambda: 1 / 0))
                monitor(Progress("look", 2, 2, notes=looks[step], picture=sheet))
            if step == 900:
                server.client_id = "page"
                monitors.live._drawing.add("page")
            figures = {"loss": 1 / step, "trajectory": 1 / step}
            monitor(Progress("distill", step, TOTAL, figures))
        management.interrupt_current_processing(True)
        try:
            monitor(Progress("distill", TOTAL, TOTAL, {"loss": 0.0}))
        except management.InterruptProcessingException:
            facts["cancelled"] = True
    facts |= {"events": server.events, "texts": server.texts, "previews": server.previews}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
