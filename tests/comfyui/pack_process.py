"""The pack among ComfyUI's own modules, in a process of its own: they have names such as `nodes`.

A script beside this file begins with `enter` and ends by printing one line of JSON, which the test
that ran it gets by `facts_of`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def facts_of(script: str, comfyui: Path, base: Path) -> dict[str, Any]:
    """What a script beside this file printed, run on `base` as ComfyUI's folder of data."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(comfyui), str(base)]
    done = subprocess.run(command, cwd=base, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def enter(comfyui: str, base: str) -> None:
    """Let this process import ComfyUI's modules, on the CPU, and the pack's as `pack.nodes`."""
    sys.path[0] = comfyui
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, base
    for name, folder in (("pack", ROOT), ("pack.nodes", ROOT / "nodes")):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module


def refusal(work: Callable[[], object]) -> str:
    """What the work is refused with; nothing where it is not."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""
