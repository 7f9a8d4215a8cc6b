"""Fixtures that all rooms share: one real ComfyUI server for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Tiny tensors gain nothing from threads, and waiting for them costs on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI checkout under test; skips where there is none."""
    from scripts.comfyui.server import ServerError, server_folder

    try:
        return server_folder()
    except ServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def comfy_server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running ComfyServer with this checkout and the tests' own nodes in it."""
    from scripts.comfyui.server import ComfyServer
    from tests.comfyui.placeholders import put_placeholders

    base = tmp_path_factory.mktemp("comfyui")
    put_placeholders(ROOT / "workflows" / "api", base)
    probe = ROOT / "tests" / "comfyui" / "probe"
    with ComfyServer(base, others=(probe,)) as server:
        yield server


@pytest.fixture
def comfy_client(comfy_server: Any) -> Any:
    """A new client of the session's server."""
    from scripts.comfyui.client import ComfyClient

    return ComfyClient(comfy_server.url)


@pytest.fixture(scope="session")
def object_info(comfy_server: Any) -> dict[str, Any]:
    """Every node's schema, as the session's server states it."""
    from scripts.comfyui.client import ComfyClient

    return ComfyClient(comfy_server.url).object_info()


@pytest.fixture(scope="module")
def page(comfy_server: Any) -> Iterator[Any]:
    """An open page; skips where there is no browser."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    from scripts.comfyui.page import ComfyPage, find_chromium

    if find_chromium() is None:
        pytest.skip("no Chromium or Chrome on this machine (Debian: apt install chromium)")
    with ComfyPage(comfy_server.url, timeout=180) as opened:
        yield opened
