"""Main memory goes back to where it was: after a run, after a cancel, after an error.

A checkpoint of some 400 MB in float32 makes what stays behind stand out from the noise.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from accvideo_core.files import write_safetensors
from accvideo_core.models import FAMILIES
from scripts.comfyui.client import ComfyClient, Event, Interrupted, NodeFailed, Prompt
from scripts.comfyui.server import ComfyServer
from tests import tiny

MEGABYTE = 2**20
SLACK = 64
"""Megabytes that allocators and caches may keep."""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads a process's memory from /proc"
)


@pytest.fixture(scope="module")
def big(comfy_server: ComfyServer, tmp_path_factory: Any) -> Prompt:
    """A graph that loads a large checkpoint and samples it for two steps."""
    from diffusers import WanTransformer3DModel

    name = "big_wan.safetensors"
    network = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=128, num_layers=8, ffn_dim=2048
    )
    tiny.randomise(network)
    table = FAMILIES["wan_t2v"].key_table(dict(network.config))  # type: ignore[arg-type]
    state = {key: x.to(torch.bfloat16) for key, x in network.state_dict().items()}
    folder = comfy_server.base / "models" / "diffusion_models"
    write_safetensors(folder / name, table.to_native(state))
    text = tmp_path_factory.mktemp("memory") / "text.safetensors"
    save_file({"text": torch.randn(1, 512, 4096)}, text)
    size = {"width": 128, "height": 128, "frames": 5, "seed": 0, "steps": 2, "batch_size": 1}
    return {
        "1": {"class_type": "AccVideoLoadTeacher", "inputs": {"teacher": name, "dtype": "auto"}},
        "2": {"class_type": "ProbeConditioning", "inputs": {"file": str(text)}},
        "3": {
            "class_type": "AccVideoSample",
            "inputs": {"model": ["1", 0], "conditioning": ["2", 0], "cfg": 1.0, **size},
        },
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }


def resident(server: ComfyServer) -> float:
    """Megabytes of main memory that the server holds."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def freed(server: ComfyServer, enough: float = 0.0, seconds: float = 5.0) -> float:
    """What the server holds at least in the `seconds` after it was asked to let go of models and
    results; less time once it holds less than `enough`.

    It is asked again and again: a server that is collecting garbage when it is asked sleeps on.
    """
    body = json.dumps({"unload_models": True, "free_memory": True}).encode()
    request = urllib.request.Request(f"{server.url}/free", body, method="POST")
    lowest, end = resident(server), time.monotonic() + seconds
    while lowest >= enough and time.monotonic() < end:
        urllib.request.urlopen(request, timeout=10).close()
        time.sleep(1)
        lowest = min(lowest, resident(server))
    return lowest


def to_the_end(client: ComfyClient, prompt: Prompt) -> None:
    client.run(prompt)


def cancelled(client: ComfyClient, prompt: Prompt) -> None:
    long = copy.deepcopy(prompt)
    long["3"]["inputs"]["steps"] = 500

    def watch(event: Event) -> None:
        if event.node == "3" and event.value >= 2:
            client.interrupt("")

    with pytest.raises(Interrupted):
        client.run(long, on_event=watch)


def failed(client: ComfyClient, prompt: Prompt) -> None:
    wrong = copy.deepcopy(prompt)
    wrong["3"]["inputs"]["frames"] = 6
    with pytest.raises(NodeFailed, match="6 frames do not fit"):
        client.run(wrong)


@pytest.mark.parametrize("use", [to_the_end, cancelled, failed])
def test_memory_returns_to_its_starting_level(
    use: Callable[[ComfyClient, Prompt], None], comfy_server: ComfyServer, big: Prompt
) -> None:
    client = ComfyClient(comfy_server.url)
    use(client, big)  # libraries are imported and allocators filled once
    before = freed(comfy_server)
    use(client, big)
    during = resident(comfy_server)
    after = freed(comfy_server, enough=before + SLACK, seconds=60)  # a busy machine takes longer
    assert during > before + 3 * SLACK, "the checkpoint is not to be seen: the test shows nothing"
    assert after < before + SLACK
