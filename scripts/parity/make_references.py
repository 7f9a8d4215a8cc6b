"""Make the reference files of `tests/parity/data` from checkouts of the official code.

    python -m scripts.parity.make_references --hunyuan HunyuanVideo --wan Wan2.1 \
        [--accvideo AccVideo] [--hunyuan-i2v HunyuanVideo-I2V] [--wan22 Wan2.2] \
        [--out tests/parity/data]

Every file whose checkout is given is made again; the others stay. It takes under two minutes and
3 GB of memory on a CPU and needs torch, diffusers and einops.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch

from . import blocks, networks, official, samplers
from .regenerate import Tensors, save_reference

log = logging.getLogger(__name__)

CHECKOUTS: dict[str, tuple[str, Callable[[str, Path], ModuleType]]] = {
    "hunyuan": ("hyvideo", official.hunyuan),
    "hunyuan_i2v": ("hyvideo", official.hunyuan),
    "accvideo": ("models/hunyuan", official.hunyuan),
    "wan21": ("wan", official.wan),
    "wan22": ("wan", official.wan),
}
"""Where the networks lie in each checkout, and how they are imported."""

Make = Callable[[], tuple[Tensors, dict[str, Any]]]


def references(roots: dict[str, Path]) -> Iterator[tuple[str, str, Make]]:
    """(name, checkout, function that makes it) of every reference that these checkouts allow."""
    codes: dict[str, ModuleType] = {}
    for name, root in roots.items():
        folder, load = CHECKOUTS[name]
        codes[name] = load(f"official_{name}", root / folder)
    for case in networks.CASES:
        if case.code in codes:
            yield case.name, case.code, partial(networks.make, case, codes[case.code])
    for block in blocks.BLOCKS:
        if block.code in codes:
            yield block.name, block.code, partial(blocks.make, block, codes[block.code])
    for name, code, make in _samplers(roots):
        if code in roots:
            yield name, code, make


def _samplers(roots: dict[str, Path]) -> Iterator[tuple[str, str, Make]]:
    nowhere = Path()
    accvideo, wan = roots.get("accvideo", nowhere), roots.get("wan21", nowhere)
    unipc = accvideo / "models/wan/utils/fm_solvers_unipc.py"
    yield "sampler_accvideo", "accvideo", partial(samplers.accvideo_hunyuan, accvideo)
    for kind, steps, every, shift in (("t2v", 50, 5, 5.0), ("i2v", 40, 4, 3.0)):
        euler = partial(samplers.accvideo_wan_euler, accvideo, steps, every, shift)
        yield f"sampler_accvideo_wan_{kind}_euler", "accvideo", euler
        first = shift if kind == "t2v" else 1.0
        make = partial(samplers.wan_unipc, unipc, 10, shift, first)
        yield f"sampler_accvideo_wan_{kind}_unipc", "accvideo", make
        official_file = wan / "wan/utils/fm_solvers_unipc.py"
        make = partial(samplers.wan_unipc, official_file, steps, shift)
        yield f"sampler_wan_{kind}_unipc", "wan21", make
        yield f"sampler_wan_{kind}_dpm", "wan21", partial(samplers.wan_sigmas, wan, steps, shift)


def main() -> None:
    """Parse the paths and write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hunyuan", type=Path, help="checkout of Tencent's HunyuanVideo")
    parser.add_argument("--hunyuan-i2v", type=Path, help="checkout of HunyuanVideo-I2V")
    parser.add_argument("--accvideo", type=Path, help="checkout of AccVideo")
    parser.add_argument("--wan", dest="wan21", type=Path, help="checkout of Wan2.1")
    parser.add_argument("--wan22", type=Path, help="checkout of Wan2.2")
    parser.add_argument("--out", type=Path, default=Path("tests/parity/data"))
    given = vars(parser.parse_args())
    out = given.pop("out")
    roots = {name: path.resolve() for name, path in given.items() if path}
    if not roots:
        parser.error("give the path of at least one checkout")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Autocast for CUDA, which has no effect here.
    warnings.filterwarnings("ignore", module="torch|official_")
    out.mkdir(parents=True, exist_ok=True)
    for name, code, make in references(roots):
        tensors, info = make()
        made = {"commit": commit(roots[code]), "torch": torch.__version__}
        made["diffusers"] = diffusers.__version__
        path = out / f"{name}.safetensors"
        save_reference(path, tensors, {**info, "made": made})
        log.info("%s: %.0f kB", path, path.stat().st_size / 1000)


def commit(root: Path) -> str:
    """The checkout's commit, or "unknown" where it is no git checkout."""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
