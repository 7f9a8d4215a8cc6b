"""Drive ComfyUI's own page in a headless Chromium, the way a person would.

    with ComfyPage(server.url) as page:
        page.drop(Path("workflows/tiny_sample.json"))
        assert page.missing_nodes() == []
        page.run()
        page.screenshot(Path("build/page.png"))

What cannot be done is a PageError.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from playwright.sync_api import Browser, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
READY = """() => window.app?.graph && window.app.extensionManager
    && Object.keys(LiteGraph.registered_node_types).length > 100"""
# A drop of a file, event by event: what the page's own handler listens to.
DROP = """([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("#graph-canvas");
    const box = canvas.getBoundingClientRect();
    const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(
            new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true, ...at}));
}"""
LOADED = """count => app.graph.nodes.length === count
    && !app.graph.nodes.some(node => node.accvideoOld)"""
MISSING = """() => app.graph.nodes.map(n => n.type)
    .filter(type => !LiteGraph.registered_node_types[type])"""
# Texts, because a value without a JSON form would not survive the way out of the page.
TO_PROMPT = "async () => JSON.stringify(await app.graphToPrompt())"
SET = "([name, value]) => app.extensionManager.setting.set(name, value)"
LISTEN = """() => {
    window.accvideoRun = {errors: [], done: false};
    app.api.addEventListener("execution_error", e =>
        accvideoRun.errors.push(`${e.detail.node_type}: ${e.detail.exception_message}`));
    app.api.addEventListener("execution_interrupted", () => accvideoRun.errors.push("interrupted"));
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, () => { accvideoRun.done = true; });
}"""


class PageError(RuntimeError):
    """The page could not do what was asked of it."""


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (str(MAC) if MAC.exists() else None)


class ComfyPage:
    """One browser window on the server at `url`."""

    def __init__(self, url: str, *, width: int = 1600, height: int = 1000, timeout: float = 60.0):
        self.url = url
        self.size = (width, height)
        self.timeout_ms = timeout * 1000

    def __enter__(self) -> ComfyPage:
        chromium = find_chromium()
        if chromium is None:
            raise PageError(
                "No Chromium or Chrome found: install one (Debian: apt install chromium)."
            )
        self._playwright: Playwright = sync_playwright().start()
        try:
            self._browser: Browser = self._playwright.chromium.launch(
                executable_path=chromium, headless=True, args=ARGUMENTS
            )
            width, height = self.size
            self.page = self._browser.new_page(viewport={"width": width, "height": height})
            self.page.set_default_timeout(self.timeout_ms)
            self.page.goto(self.url)
            self.page.wait_for_function(READY)
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._browser.close()
        self._playwright.stop()

    def drop(self, workflow: Path) -> None:
        """Drop a workflow file onto the canvas and wait until its nodes are there."""
        text = workflow.read_text(encoding="utf-8")
        count = len(json.loads(text)["nodes"])
        self.page.evaluate("() => app.graph.nodes.forEach(node => { node.accvideoOld = true; })")
        self.page.evaluate(DROP, [workflow.name, text])
        self.page.wait_for_function(LOADED, arg=count)

    def load(self, workflow: dict[str, Any]) -> None:
        """Load a UI workflow directly."""
        self.page.evaluate("workflow => app.loadGraphData(workflow, true, true)", workflow)

    def load_api(self, prompt: dict[str, Any], name: str = "workflow") -> None:
        """Load an API workflow; the page lays its nodes out. to_prompt() then gives its UI form."""
        self.page.evaluate("([prompt, name]) => app.loadApiJson(prompt, name)", [prompt, name])

    def missing_nodes(self) -> list[str]:
        """Node types on the canvas that the server does not have."""
        return self.page.evaluate(MISSING)

    def to_prompt(self) -> dict[str, Any]:
        """What is on the canvas: {"workflow": the UI form, "output": the API form}."""
        return json.loads(self.page.evaluate(TO_PROMPT))

    def new_nodes(self, on: bool) -> None:
        """Draw nodes as "Nodes 2.0" (Vue) does, or on the canvas (LiteGraph)."""
        self.page.evaluate(SET, ["Comfy.VueNodes.Enabled", on])

    def reload(self) -> None:
        """Open the page again, as the browser's button does; it brings its workflow back."""
        self.page.reload()
        self.page.wait_for_function(READY)

    def run(self, timeout: float = 300.0) -> None:
        """Queue what is on the canvas and wait for its end. Raises PageError if a node fails."""
        self.queue()
        self.wait(timeout)

    def queue(self) -> None:
        """Queue what is on the canvas."""
        self.page.evaluate(LISTEN)
        if not self.page.evaluate("async () => await app.queuePrompt(0, 1)"):
            raise PageError("The page did not queue the workflow.")

    def cancel(self) -> None:
        """Cancel what runs, as the page's button does."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")

    def wait(self, timeout: float = 300.0) -> None:
        """Wait for the end of what was queued. Raises PageError if it failed or was cancelled."""
        deadline = time.monotonic() + timeout
        while not self.page.evaluate("() => accvideoRun.done"):
            if time.monotonic() > deadline:
                raise PageError(f"The workflow did not end within {timeout:.0f} s.")
            self.page.wait_for_timeout(200)
        errors = self.page.evaluate("() => accvideoRun.errors")
        if errors:
            raise PageError("; ".join(errors))

    def screenshot(self, path: Path) -> Path:
        """Write a PNG of the window, with the whole graph in view."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(500)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))
        return path
