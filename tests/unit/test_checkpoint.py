"""Opening weights of any format: what headers say, what is mapped, and every way to be damaged."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accvideo_core.errors import AccVideoError
from accvideo_core.models.checkpoint import open_checkpoint
from tests import weight_files

STATE = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
    "b.weight": torch.tensor([[0.5, 448.0]]).to(torch.float8_e4m3fn),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.empty(0, 4, dtype=torch.float16),
}


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.float(), y.float())


def make_safetensors(path: Path) -> Path:
    save_file(STATE, path / "x.safetensors", metadata={"format": "pt", "note": "n"})
    return path / "x.safetensors"


def make_torch(path: Path) -> Path:
    torch.save(STATE, path / "x.pt")
    return path / "x.pt"


def make_wrapped(path: Path) -> Path:
    torch.save({"module": {"state_dict": STATE}, "ema": None, "step": 3}, path / "x.ckpt")
    return path / "x.ckpt"


def make_shards(path: Path) -> list[Path]:
    names = [f"x-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    save_file({n: STATE[n] for n in ("a.weight", "c")}, path / names[0])
    save_file({n: STATE[n] for n in ("a.bias", "b.weight", "d")}, path / names[1])
    return [path / name for name in names]


def make_index(path: Path) -> Path:
    shards = make_shards(path)
    held = {"a.weight": 0, "c": 0, "a.bias": 1, "b.weight": 1, "d": 1}
    index = path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: shards[i].name for n, i in held.items()}}))
    return index


MAKERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": make_safetensors,
    "torch": make_torch,
    "wrapped": make_wrapped,
    "first shard": lambda path: make_shards(path)[0],
    "last shard": lambda path: make_shards(path)[1],
    "index": make_index,
    "folder of shards": lambda path: make_shards(path)[0].parent,
    "folder with index": lambda path: make_index(path).parent,
    "folder with one file": lambda path: make_safetensors(path).parent,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_format_gives_the_same_tensors(maker: str, tmp_path: Path):
    with open_checkpoint(MAKERS[maker](tmp_path)) as checkpoint:
        assert set(checkpoint.names) == set(STATE)
        for name, x in STATE.items():
            assert checkpoint.shapes[name] == tuple(x.shape)
            assert checkpoint.dtypes[name] == x.dtype
            assert same(checkpoint.get(name), x), name
        assert checkpoint.bytes == 24 + 4 + 2 + 8


def test_the_format_before_torch_1_6_is_read(tmp_path: Path):
    state = {"a.weight": STATE["a.weight"], "a.bias": STATE["a.bias"]}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    assert all(same(checkpoint.get(name), x) for name, x in state.items())


def test_metadata_is_read_and_got_tensors_outlive_the_checkpoint(tmp_path: Path):
    with open_checkpoint(make_safetensors(tmp_path)) as checkpoint:
        x = checkpoint.get("a.weight")
        assert checkpoint.metadata["note"] == "n"
    del checkpoint
    assert torch.equal(x, STATE["a.weight"])


def test_tensors_are_mapped_and_writing_to_them_never_reaches_the_file(tmp_path: Path):
    path = make_safetensors(tmp_path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    first, second = checkpoint.get("a.weight"), checkpoint.get("a.weight")
    assert first.data_ptr() == second.data_ptr()
    first.fill_(9)
    assert path.read_bytes() == before
    assert torch.equal(open_checkpoint(path).get("a.weight"), STATE["a.weight"])


def test_forgotten_pages_are_read_again(tmp_path: Path):
    state = {name: torch.randn(64, 1024) for name in ("x", "y")}
    save_file(state, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for name, expected in state.items():
        x = checkpoint.get(name)
        assert torch.equal(x, expected)
        checkpoint.forget(name)
        assert torch.equal(x, expected)
        assert torch.equal(checkpoint.get("y"), state["y"])


def test_tensors_got_in_inference_mode_can_be_trained_against(tmp_path: Path):
    with torch.inference_mode():
        x = open_checkpoint(make_safetensors(tmp_path)).get("a.weight")
    assert not x.is_inference()


def test_odd_headers_and_unknown_number_formats(tmp_path: Path):
    header = {
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "y": {"dtype": "F4", "shape": [4], "data_offsets": [8, 10]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (1 - len(raw) % 2)  # an odd length: nothing is aligned
    path = tmp_path / "x.safetensors"
    data = torch.tensor([1.5, -2.0]).numpy().tobytes() + b"\0\0"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    checkpoint = open_checkpoint(path)
    assert checkpoint.get("x").tolist() == [1.5, -2.0] and checkpoint.dtypes["y"] is None
    with pytest.raises(AccVideoError, match="'y' in .* number format that torch cannot read; use"):
        checkpoint.get("y")


def test_gguf_keeps_blocks_packed_and_tells_logical_shapes(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    state = {
        "p.weight": torch.randn(4, 64),
        "n": torch.randn(3),
        "c.weight": torch.randn(2, 3, 1, 2, 2),
    }
    numbers = weight_files.save_gguf(tmp_path / "x.gguf", state)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.shapes == {name: tuple(x.shape) for name, x in state.items()}
    packed = checkpoint.get("p.weight")
    assert packed.dtype == torch.uint8 and packed.shape == (4, 2 * 34)
    quant = gguf.GGMLQuantizationType(checkpoint.entries["p.weight"].quant_type)
    unpacked = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), quant))
    assert torch.equal(unpacked, numbers["p.weight"])
    assert torch.equal(checkpoint.get("n"), state["n"])
    assert torch.equal(checkpoint.get("c.weight"), state["c.weight"])
    assert checkpoint.metadata["general.architecture"] == "hyvid"


def test_a_folder_with_several_variants_gives_diffusers_own(tmp_path: Path):
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert set(open_checkpoint(tmp_path).names) == set(STATE)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-3])
    return path


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def header(path: Path, value: object, size: int = 8) -> Path:
    raw = json.dumps(value).encode()
    return write(path, len(raw).to_bytes(8, "little") + raw + bytes(size))


def make_pickled(path: Path) -> Path:
    torch.save({"module": STATE, "args": Namespace(lr=1)}, path / "x.pt")
    return path / "x.pt"


def lose_a_shard(path: Path) -> Path:
    first, second = make_shards(path)
    second.unlink()
    return first


def lose_an_indexed_shard(path: Path) -> Path:
    index = make_index(path)
    (path / "x-00001-of-00002.safetensors").unlink()
    return index


def two_checkpoints(path: Path) -> Path:
    save_file(STATE, path / "a.safetensors")
    save_file(STATE, path / "b.safetensors")
    return path


def cut_gguf(path: Path) -> Path:
    pytest.importorskip("gguf")
    weight_files.save_gguf(path / "x.gguf", {"p.weight": torch.randn(64, 64)})
    whole = (path / "x.gguf").read_bytes()
    return write(path / "x.gguf", whole[: len(whole) // 2])


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p / "x.safetensors", "does not exist; check the path"),
    "suffix": (lambda p: write(p / "x.bin", b"1"), "no ending of a weights file; choose one of"),
    "empty": (lambda p: write(p / "x.safetensors", b""), "is empty; download it again"),
    "empty torch": (lambda p: write(p / "x.pt", b""), "is empty; download it again"),
    "few bytes": (lambda p: write(p / "x.safetensors", b"abc"), "damaged or cut short .* again"),
    "garbage": (lambda p: write(p / "x.safetensors", b"\xff" * 99), "damaged or cut short"),
    "garbage torch": (lambda p: write(p / "x.pt", b"\xff" * 99), "damaged or cut short .*torch.sa"),
    "web page": (lambda p: write(p / "x.ckpt", b"<!DOCTYPE html>"), "damaged or cut short"),
    "garbage gguf": (lambda p: write(p / "x.gguf", b"\xff" * 99), "damaged or cut short .*GGUF"),
    "cut": (lambda p: cut(make_safetensors(p)), "damaged or cut short .* ends after the file"),
    "cut torch": (lambda p: cut(make_torch(p)), "damaged or cut short"),
    "cut gguf": (cut_gguf, "damaged or cut short"),
    "cut shard": (lambda p: cut(make_shards(p)[1]), "00002-of-00002.* is damaged or cut short"),
    "list": (lambda p: header(p / "x.safetensors", [1]), "its header cannot be read"),
    "no dtype": (lambda p: header(p / "x.safetensors", {"x": {}}), "its header cannot be read"),
    "wrong size": (
        lambda p: header(p / "x.safetensors", {"x": {**ENTRY, "shape": [3]}}),
        "its header cannot be read",
    ),
    "negative": (
        lambda p: header(p / "x.safetensors", {"x": {**ENTRY, "data_offsets": [-8, 0]}}),
        "its header cannot be read",
    ),
    "no tensors": (lambda p: header(p / "x.safetensors", {}), "holds no tensors; choose a file"),
    "git lfs": (
        lambda p: write(p / "x.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS and not the weights; run git lfs pull there",
    ),
    "pickled": (make_pickled, r"Python objects beside weights \(argparse.Namespace\).*use a .safe"),
    "lost shard": (lose_a_shard, "1 of the 2 shards .* 'x-00002-of-00002.safetensors' among them"),
    "lost indexed": (lose_an_indexed_shard, "'x-00001-of-00002.safetensors' among them; download"),
    "index": (lambda p: write(p / "x.safetensors.index.json", b"{}"), "is not an index of shards"),
    "index outside": (
        lambda p: write(p / "x.safetensors.index.json", b'{"weight_map": {"a": "../b"}}'),
        "names files in other folders",
    ),
    "empty folder": (lambda p: p, "holds no weights .*; choose the file, or download"),
    "full folder": (two_checkpoints, r"holds 2 checkpoints \(a.safetensors, b.safeten.*; choose"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_sentence(fault: str, tmp_path: Path):
    make, message = FAULTS[fault]
    path = make(tmp_path)
    with pytest.raises(AccVideoError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = make_safetensors(tmp_path)

    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(AccVideoError, match="cannot read .*Permission denied.*allow this user"):
        open_checkpoint(path)


def test_gguf_without_its_package_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AccVideoError, match="needs the package gguf; install it with pip"):
        open_checkpoint(write(tmp_path / "x.gguf", b"GGUF"))
