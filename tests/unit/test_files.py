"""Files exist whole or not at all, and every fault is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch

from accvideo_core import files
from accvideo_core.errors import AccVideoError

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.linspace(-2, 2, 7).bfloat16(),
    "mask": torch.tensor([[True, False]]),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(12.0).reshape(3, 4).T,
}
META = {"text": 'a "quoted" \u4f60\u597d', "b": "2", "a": "1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "folder" / "x.safetensors"
    files.write_safetensors(file, TENSORS, META)
    return file


def test_round_trip_keeps_values_shapes_dtypes_and_metadata(path: Path) -> None:
    tensors, meta = files.read_safetensors(path)
    assert meta == META == files.read_metadata(path)
    assert tensors.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert tensors[name].dtype == x.dtype and torch.equal(tensors[name], x), name


def test_the_library_reads_what_we_write(path: Path) -> None:
    for name, x in safetensors.torch.load_file(path).items():
        assert torch.equal(x, TENSORS[name]), name


def test_every_tensor_is_aligned_to_its_element(path: Path) -> None:
    header = files._read_header(path)
    start = path.stat().st_size - max(e["data_offsets"][1] for e in files._entries(header))
    for name, x in TENSORS.items():
        assert (start + header[name]["data_offsets"][0]) % x.element_size() == 0, name


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.unit.test_files import META, TENSORS;"
        "from accvideo_core.files import write_safetensors;"
        "write_safetensors(Path(sys.argv[1]), dict(reversed(TENSORS.items())), META)"
    )
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code, tmp_path / "1"], env=env, check=True)
    files.write_safetensors(tmp_path / "0", TENSORS, dict(reversed(META.items())))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_any_flipped_bit_is_found(path: Path) -> None:
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(AccVideoError, match="x.safetensors"):
            files.read_safetensors(path)


def test_any_truncation_and_any_tail_is_found(path: Path) -> None:
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(AccVideoError, match="truncated"):
            files.read_safetensors(path)
    path.write_bytes(data + b"0")
    with pytest.raises(AccVideoError, match="instead of"):
        files.read_safetensors(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AccVideoError, match="cannot read .*nowhere.safetensors .*No such file"):
        files.read_safetensors(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04 some zip file", b"\x02" + bytes(7) + b"{}", bytes(64)]
)
def test_a_foreign_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(AccVideoError, match="not written by AccVideo"):
        files.read_safetensors(tmp_path / "f")


def test_a_file_of_the_library_without_our_checksum_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "f", {"a": "b"})
    with pytest.raises(AccVideoError, match="not written by AccVideo"):
        files.read_safetensors(tmp_path / "f")


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), files.replacing(path) as temp:
            temp.write_text("half")
            raise error
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_system_errors_become_a_sentence_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AccVideoError, match="cannot write .*check the path and the disk"):
        files.write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(AccVideoError, match="is not JSON"):
        files.read_json(tmp_path / "file")


def test_appending_after_an_unfinished_line_starts_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    files.append_lines(path, "one\n")
    with open(path, "a") as file:
        file.write("unfini")
    files.append_lines(path, "two\nthree\n")
    assert path.read_text() == "one\nunfini\ntwo\nthree\n"


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".a.1.tmp", ".b.2.tmp", "c.tmp"):
        (tmp_path / "00").mkdir(exist_ok=True)
        (tmp_path / "00" / name).write_text("")
    os.utime(tmp_path / "00" / ".a.1.tmp", (0, 0))
    os.utime(tmp_path / "00" / "c.tmp", (0, 0))
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path / "00")) == [".b.2.tmp", "c.tmp"]


def test_tensors_made_later_give_the_same_bytes_and_exist_one_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def later(x: torch.Tensor) -> files.Later:
        def make() -> torch.Tensor:
            nonlocal most
            alive.append(weakref.ref(made := x.clone()))
            most = max(most, sum(ref() is not None for ref in alive))
            return made

        return files.Later(tuple(x.shape), x.dtype, make)

    files.write_safetensors(tmp_path / "now.safetensors", TENSORS, META)
    made = {name: later(x) for name, x in TENSORS.items()}
    files.write_safetensors(tmp_path / "later.safetensors", made, META)
    assert (tmp_path / "now.safetensors").read_bytes() == (
        tmp_path / "later.safetensors"
    ).read_bytes()
    assert len(alive) == len(TENSORS) and most <= 2  # the last one goes when the next is bound
    wrong = {"x": files.Later((3,), torch.float32, lambda: torch.zeros(2))}
    with pytest.raises(ValueError, match="x is"):
        files.write_safetensors(tmp_path / "wrong.safetensors", wrong)
    assert not (tmp_path / "wrong.safetensors").exists()
