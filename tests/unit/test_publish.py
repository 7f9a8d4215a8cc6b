"""What travels to people's ComfyUI: no forbidden call, no heavy import, no torch, not too large."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

FORBIDDEN_MODULES = {
    "subprocess", "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve",
    "socket", "socketserver", "ssl", "http", "urllib", "requests", "httpx", "aiohttp",
    "urllib3", "ftplib", "smtplib", "webbrowser", "multiprocessing", "pip", "pytest",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_OS = {"environ", "environb", "getenv", "putenv", "system", "popen", "fork", "kill"}
FORBIDDEN_OS_PREFIXES = ("exec", "spawn", "posix_spawn")
MEGABYTE = 2**20
LARGEST_PACK = 30 * MEGABYTE
LARGEST_ASSETS = 22 * MEGABYTE

# Loads a folder the way ComfyUI's nodes.py does: the module's name is the folder's path, the
# folder is not on sys.path, and an absolute import of the library finds nothing.
LOADER = """
import asyncio, importlib, importlib.abc, importlib.util, json, sys, time
from pathlib import Path

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "accvideo_core":
            raise ModuleNotFoundError(f"absolute import of {name}")

sys.meta_path.insert(0, Block())
folder = Path(sys.argv[1])
name = str(folder).replace(".", "_x_")
start = time.perf_counter()
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
seconds = time.perf_counter() - start
"""


def shipped_python(root: Path) -> list[Path]:
    folders = [root / "accvideo_core", root / "nodes"]
    return [root / "__init__.py", *(path for f in folders for path in sorted(f.rglob("*.py")))]


def hazards(source: str) -> list[str]:
    """What a registry's scanner would stop at, one text per place."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = (node.module or "").split(".")[0]
            found += [module] if module in FORBIDDEN_MODULES else []
            found += [f"os.{a.name}" for a in node.names if module == "os" and _bad_os(a.name)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            found += [f"os.{node.attr}"] if _bad_os(node.attr) else []
        elif isinstance(node, ast.Call):
            found += _bad_call(node)
    return found


def _bad_os(name: str) -> bool:
    return name in FORBIDDEN_OS or name.startswith(FORBIDDEN_OS_PREFIXES)


def _bad_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    if name in FORBIDDEN_CALLS:
        return [name]
    if name == "torch.load":
        safe = [
            k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"
        ]
        return [] if safe else ["torch.load without weights_only=True"]
    return []


def run_loader(root: Path, tmp_path: Path, then: str, *arguments: str) -> dict:
    """Load the pack in an isolated interpreter, run `then`, return the JSON that it prints."""
    link = tmp_path / "custom_nodes" / "accvideo"
    link.parent.mkdir(parents=True)
    link.symlink_to(root, target_is_directory=True)
    command = [sys.executable, "-I", "-c", LOADER + then, str(link), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from urllib.request import urlopen",
        "import os\nos.environ['A'] = '1'",
        "from os import getenv",
        "import os\nos.execvp('a', [])",
        "eval('1')",
        "import pickle",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
    ],
)
def test_scan_finds_a_planted_hazard(source: str) -> None:
    assert hazards(source)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.replace('a', 'b')",
        "model.eval()",
        "import re\nre.compile('a')",
        "import torch\ntorch.load('a', weights_only=True)",
        "from .socket_types import Model",
    ],
)
def test_scan_accepts_harmless_code(source: str) -> None:
    assert hazards(source) == []


def test_shipped_python_holds_no_hazard(root: Path) -> None:
    files = shipped_python(root)
    assert len(files) > 10, "the list of shipped files is implausibly short"
    found = {str(p.relative_to(root)): hazards(p.read_text(encoding="utf-8")) for p in files}
    assert {name: places for name, places in found.items() if places} == {}


def test_shipped_python_is_ascii(root: Path) -> None:
    assert [str(p) for p in shipped_python(root) if not p.read_bytes().isascii()] == []


def test_requirements_are_the_projects_and_name_no_torch(root: Path) -> None:
    installed = [line for line in metadata.requires("accvideo") or [] if "extra ==" not in line]
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert sorted(listed) == sorted(installed)
    names = [re.split(r"[^\w-]", line)[0] for line in metadata.requires("accvideo") or []]
    assert not {"torch", "torchvision", "torchaudio"} & set(names)


def test_the_library_and_the_pack_have_one_version(root: Path) -> None:
    import accvideo_core

    # Written out, because the registry of ComfyUI packs reads pyproject.toml and builds nothing.
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{accvideo_core.__version__}"\n' in text
    assert metadata.version("accvideo") == accvideo_core.__version__


def test_shipped_files_stay_small(root: Path) -> None:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: what is shipped is not known")
    sizes = {name: (root / name).stat().st_size for name in shipped_files(root)}
    assets = sum(size for name, size in sizes.items() if "assets" in Path(name).parts)
    assert "__init__.py" in sizes and not [n for n in sizes if n.startswith(("tests/", "scripts/"))]
    assert assets <= LARGEST_ASSETS, f"assets hold {assets / MEGABYTE:.1f} MB"
    assert sum(sizes.values()) <= LARGEST_PACK, sorted(sizes, key=sizes.__getitem__)[-5:]


def shipped_files(root: Path) -> set[str]:
    """Tracked files that .comfyignore does not hold back."""

    def listed(*options: str) -> set[str]:
        command = ["git", "-C", str(root), "ls-files", "-z", *options]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name for name in text.split("\0") if name and (root / name).is_file()}

    return listed() - listed("-c", "-i", "--exclude-from=.comfyignore")


def test_pack_imports_at_once_and_without_torch(root: Path, tmp_path: Path) -> None:
    report = run_loader(
        root, tmp_path,
        "print(json.dumps([seconds, sorted({m.partition('.')[0] for m in sys.modules}), "
        "pack.WEB_DIRECTORY, hasattr(pack, 'NODE_CLASS_MAPPINGS')]))",
    )  # fmt: skip
    seconds, modules, web, has_mappings = report
    assert seconds < 1.0
    assert not {"torch", "numpy", "diffusers", "transformers", "comfy_api"} & set(modules)
    assert web == "./web" and not has_mappings


def test_every_module_of_the_library_loads_inside_the_pack(root: Path, tmp_path: Path) -> None:
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((root / "accvideo_core").rglob("*.py"))
        if path.name != "__main__.py"
    ]
    loaded = run_loader(
        root, tmp_path,
        "wanted = json.loads(sys.argv[2])\n"
        "print(json.dumps([importlib.import_module(f'{name}.{n}').__name__ for n in wanted]))",
        json.dumps(names),
    )  # fmt: skip
    assert len(loaded) == len(names) > 10


def test_entrypoint_yields_the_nodes_and_loads_no_model_library(
    root: Path, tmp_path: Path, comfyui_path: Path
) -> None:
    report = run_loader(
        root, tmp_path,
        "sys.path.insert(0, sys.argv[2]); sys.argv = ['x', '--cpu']\n"
        "import comfy.options; comfy.options.enable_args_parsing()\n"
        "import comfy_api.latest, comfy.model_patcher, comfy.samplers\n"
        "before = set(sys.modules)\n"
        "extension = asyncio.run(pack.comfy_entrypoint())\n"
        "asyncio.run(extension.on_load())\n"
        "nodes = asyncio.run(extension.get_node_list())\n"
        "new = sorted({m.partition('.')[0] for m in set(sys.modules) - before})\n"
        "print(json.dumps([[n.define_schema().node_id for n in nodes], new]))",
        str(comfyui_path),
    )  # fmt: skip
    ids, modules = report
    assert ids and all(node.startswith("AccVideo") for node in ids)
    assert not {"diffusers", "transformers", "peft", "av", "matplotlib"} & set(modules)
