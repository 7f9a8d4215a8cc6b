"""Talk to a running ComfyUI server: queue a prompt, follow it, fetch what it made.

    client = ComfyClient(server.url)
    result = client.run(prompt, on_event=print)
    result.outputs["9"]["images"][0]["filename"]

Faults come as ComfyError: what the server refused, what a node raised, a server that went away.
"""

from __future__ import annotations

import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import websocket

Prompt = dict[str, dict[str, Any]]
"""An API workflow: node id -> {"class_type", "inputs", "_meta"}."""

TEXT_MESSAGE = 3
"""Kind of the binary message that carries a node's progress text."""

CANCEL_SECONDS = 30.0
"""How long a cancelled node may take to stop."""


class ComfyError(RuntimeError):
    """The server could not do what was asked."""


class PromptRejected(ComfyError):
    """The server's validation refused the prompt, or a part of it; `node_errors` is its answer."""

    def __init__(self, message: str, node_errors: dict[str, Any]):
        super().__init__(message)
        self.node_errors = node_errors


class NodeFailed(ComfyError):
    """A node raised while it ran."""

    def __init__(self, node_id: str, node_type: str, kind: str, message: str, trace: str):
        super().__init__(f"{node_type} (node {node_id}) failed with {kind}: {message}")
        self.node_id, self.node_type, self.kind = node_id, node_type, kind
        self.node_message, self.trace = message, trace


class Interrupted(ComfyError):
    """The prompt was cancelled."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a node reports while it runs; value and total are steps, text is its own line."""

    node: str
    value: float = 0
    total: float = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished prompt: outputs by node id, the nodes that ran, those that came from the cache."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    executed: tuple[str, ...]
    cached: tuple[str, ...]
    seconds: float
    previews: int = 0


@dataclass(slots=True)
class _Run:
    """What is collected while a prompt runs."""

    prompt_id: str
    on_event: Callable[[Event], None]
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    previews: int = 0
    error: ComfyError | None = None


class ComfyClient:
    """One client of the server at `url` (http://host:port)."""

    def __init__(self, url: str, timeout: float = 30.0):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex

    def object_info(self) -> dict[str, Any]:
        """Every node's schema by class name."""
        return self._json("/object_info")

    def history(self, prompt_id: str) -> dict[str, Any]:
        return self._json(f"/history/{prompt_id}").get(prompt_id, {})

    def queue(self, prompt: Prompt, workflow: dict[str, Any] | None = None) -> str:
        """Queue a prompt and return its id. Raises PromptRejected if any node is invalid."""
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            answer = self._json("/prompt", body)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise ComfyError(f"POST /prompt answered {error.code}.") from error
            answer = json.load(error)
            raise _rejection(answer) from None
        if answer["node_errors"]:
            # The server runs the valid outputs and drops the others: for us that is a failure.
            self.delete(answer["prompt_id"])
            self.interrupt(answer["prompt_id"])
            raise _rejection(answer)
        return answer["prompt_id"]

    def run(
        self,
        prompt: Prompt,
        *,
        workflow: dict[str, Any] | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        timeout: float = 900.0,
    ) -> Result:
        """Queue a prompt, follow it to its end and return what it made.

        `on_event` hears every progress report; it may call interrupt(). Raises PromptRejected,
        NodeFailed, Interrupted, or ComfyError when the server goes away or `timeout` passes.
        """
        start = time.monotonic()
        address = self.url.replace("http", "ws", 1) + f"/ws?clientId={self.client_id}"
        socket = websocket.create_connection(address, timeout=self.timeout)
        try:
            run = _Run(self.queue(prompt, workflow), on_event)
            try:
                _follow(run, socket, timeout)
            except KeyboardInterrupt:
                # The node gets the time to keep what it has done.
                self.interrupt(run.prompt_id)
                _follow(run, socket, timeout=CANCEL_SECONDS)
                raise
        except (websocket.WebSocketException, ConnectionError) as error:
            raise ComfyError(f"The server closed the connection ({error}).") from error
        finally:
            socket.close()
        if run.error:
            raise run.error
        outputs = self.history(run.prompt_id).get("outputs", {})
        executed, cached = tuple(run.executed), tuple(run.cached)
        seconds = time.monotonic() - start
        return Result(run.prompt_id, outputs, executed, cached, seconds, run.previews)

    def interrupt(self, prompt_id: str) -> None:
        """Cancel the prompt if it is the one that runs."""
        self._post("/interrupt", {"prompt_id": prompt_id})

    def delete(self, prompt_id: str) -> None:
        """Take the prompt out of the queue if it still waits there."""
        self._post("/queue", {"delete": [prompt_id]})

    def view(self, file: dict[str, str]) -> bytes:
        """The content of a file as an output names it: {"filename", "subfolder", "type"}."""
        query = urllib.parse.urlencode(
            {key: file[key] for key in ("filename", "subfolder", "type") if key in file}
        )
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=self.timeout) as answer:
            return answer.read()

    def _json(self, path: str, body: Any = None) -> Any:
        return json.loads(self._post(path, body) if body is not None else self._get(path))

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=self.timeout) as answer:
            return answer.read()

    def _post(self, path: str, body: Any) -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()


def _follow(run: _Run, socket: websocket.WebSocket, timeout: float) -> None:
    """Book the messages of the run until it has ended."""
    for message in _messages(socket, time.monotonic() + timeout):
        if _take(run, message):
            return


def _messages(socket: websocket.WebSocket, deadline: float) -> Iterator[str | bytes]:
    """Messages as they come; raises ComfyError when the deadline passes."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ComfyError("The prompt did not finish in time.")
        socket.settimeout(min(left, 5.0))
        try:
            yield socket.recv()
        except websocket.WebSocketTimeoutException:
            continue


def _take(run: _Run, message: str | bytes) -> bool:
    """Book one message; True when the prompt has ended.

    The end is `executing` with node null: only then is the history complete.
    """
    if isinstance(message, bytes):
        _take_binary(run, message)
        return False
    parsed = json.loads(message)
    kind, data = parsed["type"], parsed.get("data") or {}
    if data.get("prompt_id") != run.prompt_id:
        return False
    if kind == "executing":
        if data.get("node") is None:
            return True
        run.on_event(Event(data["node"]))
    elif kind == "execution_cached":
        run.cached.extend(data["nodes"])
    elif kind == "executed":
        run.executed.append(data["node"])
    elif kind == "progress_state":
        for node, state in data["nodes"].items():
            if state.get("state") == "running":
                run.on_event(Event(node, state["value"], state["max"]))
    elif kind == "execution_interrupted":
        run.error = Interrupted("The prompt was cancelled.")
    elif kind == "execution_error":
        run.error = NodeFailed(
            data["node_id"], data["node_type"], data["exception_type"].rpartition(".")[2],
            data["exception_message"].strip(), "".join(data.get("traceback", [])),
        )  # fmt: skip
    return False


def _take_binary(run: _Run, message: bytes) -> None:
    """Binary messages: progress text of a node, or a preview picture."""
    (kind,) = struct.unpack(">I", message[:4])
    if kind != TEXT_MESSAGE:
        run.previews += 1
        return
    (length,) = struct.unpack(">I", message[4:8])
    node = message[8 : 8 + length].decode()
    run.on_event(Event(node, text=message[8 + length :].decode(errors="replace")))


def _rejection(answer: dict[str, Any]) -> PromptRejected:
    """One sentence per fault, as the server's validation named it."""
    faults = [
        f"{fault['class_type']} (node {node}): {error['message']}: {error['details']}"
        for node, fault in answer.get("node_errors", {}).items()
        for error in fault["errors"]
    ]
    head = answer.get("error", {})
    if isinstance(head, dict) and head.get("message"):
        faults.insert(0, f"{head['message']} {head.get('details', '')}".strip())
    return PromptRejected("; ".join(faults), answer.get("node_errors", {}))
