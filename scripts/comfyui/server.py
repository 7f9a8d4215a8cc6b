"""A headless ComfyUI server with this checkout in it, for the demo and the tests.

    with ComfyServer(base) as server:
        ComfyClient(server.url).run(prompt)

The server keeps everything (models, input, output, database, log) under its own base directory.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
BUNDLED_SERVER = ROOT / "build" / "comfyui" / "server"
BASE = ROOT / "build" / "comfyui" / "base"
PACK_NAME = "accvideo"
BROKEN_PACK = re.compile(r"IMPORT FAILED|Cannot import|Error while calling comfy_entrypoint")


class ServerError(RuntimeError):
    """The server is missing, did not start, or died; the message ends with the tail of its log."""


def server_folder() -> Path:
    """The ComfyUI checkout to use: COMFYUI_PATH, or the one that install.py unpacked.

    Raises ServerError where there is none.
    """
    own = os.environ.get("COMFYUI_PATH")
    folder = Path(own).expanduser().resolve() if own else BUNDLED_SERVER
    if not (folder / "main.py").is_file():
        remedy = "set COMFYUI_PATH to a ComfyUI folder" if own else "run `make setup`"
        raise ServerError(f"No ComfyUI server in {folder} (no main.py): {remedy}.")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """One server process. Use it as a context manager, or call start() and stop().

    `base` is created and kept; the port is any free one when 0; `others` are packs beside this
    one. COMFYUI_PYTHON names the interpreter of a server of one's own, otherwise this one runs it.
    """

    def __init__(
        self,
        base: Path,
        *,
        port: int = 0,
        pack: Path = ROOT,
        others: tuple[Path, ...] = (),
        arguments: tuple[str, ...] = (),
    ):
        self.base = base.resolve()
        self.port = port or free_port()
        self.packs = {PACK_NAME: pack, **{other.name: other for other in others}}
        self.arguments = arguments
        self.log_path = self.base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._process.pid if self._process else None

    @property
    def output(self) -> Path:
        return self.base / "output"

    def start(self, timeout: float = 600.0) -> None:
        """Start the process and return when it answers.

        Raises ServerError if it dies, is not ready in `timeout` seconds, or rejects the pack.
        """
        folder = server_folder()
        self._prepare_base()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("wb") as log_file:
            # A session of its own: Ctrl-C reaches the caller, who stops the server in order.
            self._process = subprocess.Popen(
                self._command(), cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                stdout=log_file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_ready(timeout)
            self._check_pack()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process: politely, then firmly. Does nothing when it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        # ComfyUI closes its doors at once, yet its process often lingers: no need to wait for it.
        for signal_number, patience in (
            (signal.SIGINT, 4),
            (signal.SIGTERM, 10),
            (signal.SIGKILL, 60),
        ):
            if process.poll() is None:
                process.send_signal(signal_number)
            try:
                process.wait(timeout=patience)
                return
            except subprocess.TimeoutExpired:
                continue

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def broken_packs(self) -> list[str]:
        """The lines of the log that say that a pack did not load."""
        return [line for line in self.log_text().splitlines() if BROKEN_PACK.search(line)]

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _prepare_base(self) -> None:
        settings = self.base / "user" / "default" / "comfy.settings.json"
        for folder in (self.base / "custom_nodes", settings.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if not settings.exists():
            # Otherwise the page opens with a dialog over everything.
            settings.write_text('{"Comfy.TutorialCompleted": true}\n', encoding="utf-8")
        for name, folder in self.packs.items():
            link = self.base / "custom_nodes" / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(folder, target_is_directory=True)

    def _command(self) -> list[str]:
        return [
            os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu",
            "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base),
            "--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
            "--disable-api-nodes", "--disable-auto-launch", "--preview-method", "latent2rgb",
            *self.arguments,
        ]  # fmt: skip

    def _wait_until_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerError(f"The ComfyUI server stopped at start:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        raise ServerError(
            f"The ComfyUI server was not ready after {timeout:.0f} s:\n{self.log_tail()}"
        )

    def _check_pack(self) -> None:
        if self.broken_packs():
            raise ServerError("ComfyUI could not load the pack:\n" + "\n".join(self.broken_packs()))


def main() -> None:
    """Run the server for the browser until Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--base", type=Path, default=BASE)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ComfyServer(options.base, port=options.port) as server:
            log.info("ComfyUI is at %s (log: %s). Ctrl-C stops it.", server.url, server.log_path)
            while server.alive():
                time.sleep(0.5)
            raise SystemExit(f"The ComfyUI server stopped:\n{server.log_tail()}")
    except KeyboardInterrupt:
        log.info("Stopped.")
    except ServerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
