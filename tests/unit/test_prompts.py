"""Prompts from files: every format, what is reported, and the sentence for every fault."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from PIL import Image

from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.trajectories.prompts import (
    PromptEntry,
    encode_entries,
    read_prompts,
    too_long,
    too_long_notes,
)
from accvideo_core.trajectories.store import TrajectoryDataset

Write = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


def texts(path: Path, column: str | None = None) -> list[tuple[int, str]]:
    return [(entry.line, entry.text) for entry in read_prompts(path, column).entries]


def picture(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size=(48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


# Text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_has_a_prompt_a_line_with_or_without_a_mark(write: Write, mark: bytes):
    path = write("a.txt", mark + "a cat \r\n\u732b\u304c\u8d70\u308b\rcaf\xe9\u2028here\n".encode())
    # U+2028 ends no line in an editor, so it ends no prompt.
    assert texts(path) == [
        (1, "a cat"),
        (2, "\u732b\u304c\u8d70\u308b"),
        (3, "caf\xe9\u2028here"),
    ]
    assert read_prompts(path).notes == ()
    assert texts(write("prompts", "a file without a suffix is text")) != []


def test_empty_lines_and_repetitions_are_reported_with_their_lines(write: Write):
    path = write("a.txt", "one\n\ntwo\n  \none\ntwo\n" + "\n" * 5)
    read = read_prompts(path)
    assert [entry.text for entry in read.entries] == ["one", "two"]
    assert read.notes == (
        "a.txt: left out 7 lines without a prompt (2, 4, 7, 8, 9, ...)",
        "a.txt: left out 2 repetitions of a prompt (line 5 is line 1 again)",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\r\ntwo\r\nthr\xe9e\r\n", "line 3 holds the byte 0xE9"),
        (b"one\rtw\xffo", "line 2 holds the byte 0xFF"),
        ("one".encode("utf-16-le"), "line 1 holds the byte 0x00"),
        ("one".encode("utf-16"), "line 1 holds the byte 0xFF"),
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
    ],
)
def test_bad_bytes_are_named_with_their_line(write: Write, content: bytes, message: str):
    with pytest.raises(AccVideoError, match=message):
        read_prompts(write("a.txt", content))


def test_files_that_are_no_prompts_are_refused(write: Write, tmp_path: Path):
    with pytest.raises(AccVideoError, match="there is no prompts file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(AccVideoError, match=r"no list of prompts by its name; use one of \.txt"):
        read_prompts(write("a.xlsx", b"PK"))
    with pytest.raises(AccVideoError, match="text file and has no column 'prompt'"):
        read_prompts(write("a.txt", "x"), "prompt")


# JSON -----------------------------------------------------------------------------------------


def test_json_lines_hold_strings_and_objects(write: Write, tmp_path: Path):
    lines = [
        '"a string"',
        '{"prompt": "by prompt", "text": "not this"}',
        '{"text": "by\\n text\\n"}',
        '{"caption": "by caption", "image": "sub/a.png"}',
        "",
        '{"prompt": null}',
        '{"file_name": "b.png", "text": "with an image"}',
    ]
    read = read_prompts(write("a.jsonl", "\n".join(lines)))
    assert [(e.text, e.image, e.line) for e in read.entries] == [
        ("a string", None, 1),
        ("by prompt", None, 2),
        ("by text", None, 3),
        ("by caption", tmp_path / "sub" / "a.png", 4),
        ("with an image", tmp_path / "b.png", 7),
    ]
    assert read.notes == ("a.jsonl: left out 2 lines without a prompt (5, 6)",)


def test_json_is_one_list_one_entry_or_lines(write: Write):
    items = ["a", {"text": "b", "style": "c"}, ""]
    assert texts(write("a.json", json.dumps(items, indent=2))) == [(1, "a"), (2, "b")]
    note = "a.json: left out 1 entry without a prompt (3)"
    assert read_prompts(write("a.json", json.dumps(items))).notes == (note,)
    assert texts(write("b.json", '{"style": "c"}'), "style") == [(1, "c")]
    assert texts(write("c.json", '"a"\n{"text": "b"}')) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"a"\n{"text": "b"', "line 2 is not JSON"),
        ("a.jsonl", "a cat runs", r"line 1 is not JSON .*name a file with a prompt a line \.txt"),
        ("a.json", '[\n"a",\n"b"\n"c"\n]', "line 4 is not JSON"),
        ("a.jsonl", '{"words": "b"}', "line 1 holds no prompt; .*'prompt' or 'text' or 'caption'"),
        ("a.json", "[3]", "entry 1 holds no prompt"),
        ("a.jsonl", '{"text": 3}', "line 1 holds no prompt"),
        ("a.jsonl", '{"text": "a", "image": {"bytes": 1}}', "line 1 has an image that is no path"),
        ("a.jsonl", '"\\ud83d"', "line 1 holds half of a character"),
        ("a.json", "[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_json_that_holds_no_prompt_is_named_with_its_place(
    write: Write, name: str, content: str, message: str
):
    with pytest.raises(AccVideoError, match=message):
        read_prompts(write(name, content))


def test_a_named_column_is_the_only_one_taken(write: Write):
    path = write("a.jsonl", '{"prompt": "a", "short": "b"}')
    assert texts(path, "short") == [(1, "b")]
    with pytest.raises(AccVideoError, match="line 1 holds no prompt; .* as 'long'"):
        read_prompts(path, "long")


# Tables ---------------------------------------------------------------------------------------


def test_csv_takes_the_named_the_obvious_or_the_only_column(write: Write):
    table = 'id,Caption,style\n1,"a red, round\ncircle",x\n2,"she says ""go""",y\n'
    expected = [(2, "a red, round circle"), (4, 'she says "go"')]
    assert texts(write("a.csv", table)) == expected
    assert texts(write("a.csv", "\ufeff" + table), "style") == [(2, "x"), (4, "y")]
    assert texts(write("a.tsv", "id\tprompt\n1\ta, b\n")) == [(2, "a, b")]
    assert texts(write("b.csv", "id;prompt\n1;a, b\n")) == [(2, "a, b")]
    both = write("c.csv", "text,prompt\na,b\n")
    assert texts(both) == [(2, "b")] and texts(both, "text") == [(2, "a")]


def test_csv_reports_what_could_be_a_prompt_and_is_none(write: Write):
    read = read_prompts(write("a.csv", "a cat runs\na dog runs\n\n"))
    assert [entry.text for entry in read.entries] == ["a dog runs"]
    assert read.notes == (
        "a.csv: the first line, 'a cat runs', is the column's name and no prompt",
        "a.csv: left out 1 line without a prompt (3)",
    )
    assert read_prompts(write("a.csv", "prompt\na dog\n")).notes == ()


def test_csv_has_images_beside_the_file(write: Write, tmp_path: Path):
    path = write("sub/a.csv", "file_name,text\nx/1.png,a\n,b\n")
    images = [entry.image for entry in read_prompts(path).entries]
    assert images == [tmp_path / "sub" / "x" / "1.png", None]


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("id,style\n1,a\n", None, "no column 'prompt' or 'text' or 'caption' .*: id, style"),
        ("id,style\n1,a\n", "words", "no column 'words' with text; .*: id, style"),
        ("prompt\na red, round circle\n", None, "line 2 has 2 fields and the first line 1; put"),
        ('prompt,id\n"a,1\nb,2\n', None, "line 2 is not CSV"),
        ('prompt,id\n"a" cat,1\n', None, "line 2 is not CSV .* double quotes"),
        ("", None, "is empty"),
        ("prompt\n", None, "holds no prompts"),
        (b"prompt\na\ncaf\xe9", None, "line 3 holds the byte 0xE9"),
    ],
)
def test_csv_that_would_lose_prompts_is_refused(
    write: Write, content: str | bytes, column: str | None, message: str
):
    with pytest.raises(AccVideoError, match=message):
        read_prompts(write("a.csv", content), column)


def test_parquet_is_read_by_column(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    words = pyarrow.array(["x", "y", "x", "z"]).dictionary_encode()
    pictures = pyarrow.array([{"bytes": b"1", "path": None}] * 4)
    columns = {"id": [1, 2, 3, 4], "prompt": ["a", None, "a", "b"], "style": words}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({**columns, "image": pictures}), path)
    read = read_prompts(path)
    assert [(entry.line, entry.text, entry.image) for entry in read.entries] == [
        (1, "a", None),
        (4, "b", None),
    ]
    assert read.notes == (
        "a.parquet: column 'image' holds no paths and is not read; save its images as files for "
        "image to video",
        "a.parquet: left out 1 row without a prompt (2)",
        "a.parquet: left out 1 repetition of a prompt (row 3 is row 1 again)",
    )
    assert [text for _, text in texts(path, "style")] == ["x", "y", "z"]
    with pytest.raises(AccVideoError, match="no column 'id' with text; .*: prompt, style"):
        read_prompts(path, "id")
    paths = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "image": ["b.png"]}), paths)
    assert read_prompts(paths).entries == (PromptEntry("a", tmp_path / "b.png", 1),)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AccVideoError, match="is not Parquet or is damaged"):
        read_prompts(path)


def test_parquet_without_pyarrow_says_what_to_install(write: Write, monkeypatch):
    plain = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AccVideoError, match="needs the package pyarrow.*pip install pyarrow"):
        read_prompts(write("a.parquet", b"PAR1"))


# Folders --------------------------------------------------------------------------------------


def test_a_folder_has_captions_beside_its_images(write: Write, tmp_path: Path):
    folder = tmp_path / "photos"
    for name in ("b.PNG", "a.jpg", "sub/c.webp", "d.bmp", "e.jpeg", ".thumbs/x.png", "._a.jpg"):
        picture(folder / name)
    write("photos/a.txt", "\ufeffa cat\non a mat\n")
    write("photos/b.txt", "a dog")
    write("photos/sub/c.txt", "a cow")
    write("photos/d.txt", " \n")
    read = read_prompts(folder)
    assert [(e.text, e.image, e.line) for e in read.entries] == [
        ("a cat on a mat", folder / "a.jpg", 1),
        ("a dog", folder / "b.PNG", 2),
        ("a cow", folder / "sub/c.webp", 5),
    ]
    assert read.notes == ("photos: left out 2 images without a caption (d.bmp, e.jpeg)",)


@pytest.mark.parametrize(
    ("listing", "key"), [("captions.jsonl", "image"), ("metadata.jsonl", "file_name")]
)
def test_a_folder_may_have_one_file_of_captions(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, key: str
):
    for name in ("a.png", "sub/b.png", "c.png"):
        picture(tmp_path / "photos" / name)
    rows = [
        {key: "./sub/../sub/b.png", "text": "b"},
        {key: "a.png", "text": "a"},
        {key: "a.png", "text": "another of a"},
        {key: "gone.png", "text": "gone"},
    ]
    write(f"photos/{listing}", "\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    read = read_prompts(Path("photos"))
    assert [(e.text, str(e.image)) for e in read.entries] == [
        ("a", "photos/a.png"),
        ("another of a", "photos/a.png"),
        ("b", "photos/sub/b.png"),
    ]
    assert read.notes == (
        "photos: left out 1 image without a caption (c.png)",
        "photos: left out 1 caption of no image that is there (gone.png)",
    )
    write(f"photos/{listing}", '{"text": "of what?"}')
    with pytest.raises(AccVideoError, match=f"{listing} line 1 names no file"):
        read_prompts(Path("photos"))


def test_folders_without_images_or_captions_are_refused(tmp_path: Path):
    with pytest.raises(AccVideoError, match=r"holds no images \(\.png"):
        read_prompts(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(AccVideoError, match="none of the 1 images in .* has a caption"):
        read_prompts(tmp_path)


def test_a_model_that_reads_no_text_takes_images_by_their_names(write: Write, tmp_path: Path):
    for name in ("b.png", "a.png"):
        picture(tmp_path / name)
    write("b.txt", "told")
    read = read_prompts(tmp_path, captioned=False)
    assert [entry.text for entry in read.entries] == ["a", "told"] and read.notes == ()


# Length ---------------------------------------------------------------------------------------


def test_length_is_counted_in_tokens_or_estimated_from_words(write: Write):
    tokenizer = tiny_wan.tokenizer(tiny_wan.WORDS)
    given = ["red " * 9, "red " * 10, "square"]
    assert too_long(given, 10, tokenizer) == [(1, 11)]  # ten words and the first token
    assert too_long(["word " * 75], 100) == [(0, 101)]
    assert too_long(["word " * 74], 100) == []
    assert too_long(["\u732b" * 100], 100) == [(0, 101)]
    assert too_long_notes(given, 100, tokenizer) == ()
    (note,) = too_long_notes([*given, "a " * 30], 10, tokenizer)
    start = "a " * 23 + "a..."
    assert note == (
        "2 prompts with more than the 10 tokens that the text encoder reads will be cut there "
        f"(the longest, {start!r}, has 31)"
    )
    read = read_prompts(write("a.txt", "word " * 75 + "\nshort"), limit=100)
    assert len(read.entries) == 2 and "has about 101)" in read.notes[0]


# The line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline("wan_i2v", tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture(scope="module")
def teacher(wan: Path) -> Teacher:
    return load_teacher(wan)


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """Two images with one caption, one of them larger than the video; one broken, one without."""
    folder = tmp_path / "photos"
    picture(folder / "a.png", (255, 0, 0))
    picture(folder / "b.png", (0, 0, 255), size=(200, 100))
    picture(folder / "c.png").write_bytes(b"no image")
    picture(folder / "d.png")
    for name in "abc":
        (folder / f"{name}.txt").write_text("a red square moving left")
    return folder


def test_entries_with_images_are_encoded_as_the_teacher_does(teacher: Teacher, photos: Path):
    entries = [*read_prompts(photos).entries, PromptEntry("square", None, 0)]
    made = encode_entries(teacher, entries[::-1], (5, 32, 48))
    assert [prompt.text for prompt in made.prompts] == ["square"] + ["a red square moving left"] * 2
    assert made.prompts[0].id == teacher.encode_prompts(["square"])[0].id
    blue = torch.tensor([0.0, 0, 1]).expand(32, 48, 3)
    alone = teacher.encode_image("a red square moving left", blue, 5).condition.tensors()
    together = made.prompts[1].condition.tensors()
    assert alone.keys() == together.keys() == {"text", "mask", "image", "image_tokens"}
    assert all(torch.allclose(x, together[name], atol=1e-5) for name, x in alone.items())
    (note,) = made.notes
    assert note.startswith("left out 1 image that cannot be read (") and "c.png" in note


def test_the_same_image_under_two_names_is_one_prompt(teacher: Teacher, photos: Path):
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes())
    made = encode_entries(teacher, read_prompts(photos).entries[:2], (5, 32, 48))
    assert len(made.prompts) == 1
    assert made.notes == ("left out 1 prompt given before already",)


def test_images_that_cannot_be_used_are_refused(teacher: Teacher, photos: Path):
    entries = read_prompts(photos).entries
    with pytest.raises(AccVideoError, match="none of the 1 images can be read; .*c.png"):
        encode_entries(teacher, entries[2:], (5, 32, 48))
    with pytest.raises(AccVideoError, match="need the size of the videos"):
        encode_entries(teacher, entries)
    text_only = Teacher(tiny_wan.video_model("wan_t2v"), Path("nowhere"))
    with pytest.raises(AccVideoError, match="takes no image"):
        encode_entries(text_only, entries, (5, 32, 48))


def test_record_takes_a_folder_of_images(wan: Path, photos: Path, tmp_path: Path, capsys):
    size = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "2", "--keep", "1"]
    words = ["record", str(tmp_path / "clips"), "--teacher", str(wan), "--device", "cpu", *size]
    assert main([*words, "--prompts", str(photos)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "accvideo record" in line]
    assert len(said) == 2
    assert "photos: left out 1 image without a caption (d.png)" in said[0]
    assert "left out 1 image that cannot be read" in said[1]

    dataset = TrajectoryDataset.open(tmp_path / "clips")
    first, second = (dataset.read(id) for id in dataset.ids())
    prompts = [dataset.prompt(each.prompt_id) for each in (first, second)]
    assert prompts[0].id != prompts[1].id and prompts[0].text == prompts[1].text
    images = [prompt.condition.image for prompt in prompts]
    assert images[0] is not None and images[0].shape == (1, 20, 2, 4, 6)
    assert not torch.equal(images[0], images[1])
    tokens = [prompt.condition.image_tokens for prompt in prompts]
    assert tokens[0] is not None and not torch.equal(tokens[0], tokens[1])

    before = sorted((tmp_path / "clips").rglob("*.safetensors"))
    contents = [path.read_bytes() for path in before]
    assert main([*words, "--prompts", str(photos)]) == 0
    assert main([*words, "--prompts", str(photos), "--dtype", "bfloat16"]) == 0
    assert [path.read_bytes() for path in before] == contents
    assert sorted((tmp_path / "clips").rglob("*.safetensors")) == before


def test_record_says_what_the_text_encoder_will_cut(wan: Path, photos: Path, capsys, tmp_path):
    (photos / "a.txt").write_text("red " * 600)
    size = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "1", "--keep", "1"]
    words = ["record", str(tmp_path / "clips"), "--teacher", str(wan), "--device", "cpu", *size]
    assert main([*words, "--prompts", str(photos), "--cfg", "1"]) == 0
    assert "1 prompt with more than the 512 tokens" in capsys.readouterr().err
    assert main([*words, "--prompt", "x", "--column", "text"]) == 2
    assert "--column text is a column of --prompts" in capsys.readouterr().err
