"""The whole line in a real ComfyUI server: what `make demo` runs.

Starts a headless server with this checkout in it, queues an API workflow, shows what the nodes
report, and collects what the comparison left in ComfyUI's output folder.

    python -m scripts.demo [--workflow workflows/api/tiny_line.json] [--out build/demo] [--fresh]
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from scripts.comfyui.client import ComfyClient, ComfyError, Event, NodeFailed, Prompt
from scripts.comfyui.server import BASE, ROOT, ComfyServer, ServerError

WORKFLOW = ROOT / "workflows" / "api" / "tiny_line.json"
OUT = ROOT / "build" / "demo"
QUIET_SECONDS = 10.0
"""How often a line is written where there is no terminal to redraw it on."""


class Progress:
    """Events of a running prompt as lines of text: node title, steps, the node's own text, ETA."""

    def __init__(self, prompt: Prompt, stream: TextIO = sys.stdout):
        self.titles = {node: title_of(entry) for node, entry in prompt.items()}
        self.stream = stream
        self.live = stream.isatty()
        self.node = ""
        self.text = ""
        self.value = self.total = 0.0
        self.started = self.written = time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.node != self.node:
            self.finish()
            self.node, self.text = event.node, ""
            self.value = self.total = 0.0
            self.started = self.written = time.monotonic()
            if not self.live:
                self._write(f"{self._title()} ...\n")
        if event.text:
            self.text = event.text.splitlines()[-1]
        if event.total > 1:
            self.value, self.total = event.value, event.total
        now = time.monotonic()
        if self.live:
            self._write(f"\r\033[K  {self.line(now)}"[: shutil.get_terminal_size().columns])
        elif now - self.written >= QUIET_SECONDS:
            self._write(f"  {self.line(now)}\n")
            self.written = now

    def line(self, now: float) -> str:
        """The title with the node's own text, or with steps and ETA where it tells no more."""
        if self.text:
            return f"{self._title()}  {self.text}"
        if not self.total:
            return self._title()
        line = f"{self._title()}  {self.value:.0f}/{self.total:.0f}"
        if 0 < self.value < self.total:
            left = (self.total - self.value) * (now - self.started) / self.value
            line += f"  ETA {duration(left)}"
        return line

    def finish(self) -> None:
        """Close the running node's line."""
        if not self.node:
            return
        start = "\r\033[K" if self.live else ""
        took = duration(time.monotonic() - self.started)
        text = f"  {self.text}" if self.text else ""
        self._write(f"{start}  {self._title()}: done in {took}{text}\n")
        self.node = ""

    def _title(self) -> str:
        return self.titles.get(self.node, f"node {self.node}")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def title_of(entry: dict[str, Any]) -> str:
    return entry.get("_meta", {}).get("title") or entry["class_type"]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def collect(output: Path, since: float, out: Path) -> list[Path]:
    """Copy every comparison written since the time `since` into `out`; returns the copies.

    A comparison is a folder of `output/accvideo` with a report.json. One goes straight into `out`,
    several into a folder each. What stood in `out` before is removed.
    """
    reports = sorted((output / "accvideo").glob("*/report.json"))
    folders = [report.parent for report in reports if report.stat().st_mtime >= since]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    copies = []
    for folder in folders:
        target = out if len(folders) == 1 else out / folder.name
        shutil.copytree(folder, target, dirs_exist_ok=True)
        copies.append(target)
    return copies


def run(workflow: Path, out: Path, base: Path) -> None:
    prompt: Prompt = json.loads(workflow.read_text(encoding="utf-8"))
    start = time.time()
    print(f"Starting ComfyUI with the pack in it (log: {base / 'server.log'})", flush=True)
    with ComfyServer(base) as server:
        print(f"Running {workflow.name} on {server.url}", flush=True)
        progress = Progress(prompt)
        try:
            result = ComfyClient(server.url).run(prompt, on_event=progress, timeout=3600)
        except ComfyError as error:
            if not server.alive():
                raise ServerError(f"The ComfyUI server died:\n{server.log_tail()}") from error
            raise
        progress.finish()
    folders = collect(base / "output", start, out)
    if not folders:
        raise SystemExit(f"{workflow.name} ran, but no node of it wrote a report.")
    for folder in folders:
        print("\n" + (folder / "table.txt").read_text(encoding="utf-8").rstrip())
    print(f"\nIn {out}:")
    for path in sorted(out.rglob("*.*")):
        print(f"  {path.relative_to(out)}  ({path.stat().st_size / 1024:.0f} KB)")
    print(
        f"Done in {duration(time.time() - start)}, {duration(result.seconds)} of it in the nodes."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the whole line in a real ComfyUI server.")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--base", type=Path, default=BASE, help="the server's own folder")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs left")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.base / "output" / "accvideo", ignore_errors=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options.workflow, options.out, options.base)
    except KeyboardInterrupt:
        raise SystemExit(
            "\nStopped. What was recorded and trained is kept; run it again to go on."
        ) from None
    except NodeFailed as error:
        raise SystemExit(f"\n{error}\n(traceback in {options.base / 'server.log'})") from None
    except (ComfyError, ServerError, OSError) as error:
        raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
