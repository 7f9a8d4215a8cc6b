"""Encoded prompts on disk: the same conditions without the encoders, and never another model's."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accvideo_core.conditioning import Condition, Prompt
from accvideo_core.errors import AccVideoError
from accvideo_core.models.loading import Teacher, load_teacher
from accvideo_core.models.text_cache import TextCache, encoder_name
from tests import tiny

TEXTS = ("a red circle", "a blue square moving left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_random_pipeline(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


def teacher(folder: Path, cache: Path | None, dtype: torch.dtype = torch.float32) -> Teacher:
    loaded = load_teacher(folder, dtype=dtype)
    loaded.text_cache = cache
    return loaded


def encoders_loaded(loaded: Teacher) -> bool:
    return loaded._text is not None


def equal(a: Prompt, b: Prompt) -> bool:
    one, two = a.condition.tensors(), b.condition.tensors()
    same = one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())
    return same and (a.id, a.text) == (b.id, b.text)


def test_a_second_run_loads_no_encoders_and_has_the_same_prompts(folder: Path, cache: Path) -> None:
    plain = teacher(folder, None).encode_prompts(TEXTS)
    first, second = teacher(folder, cache), teacher(folder, cache)
    assert all(map(equal, first.encode_prompts(TEXTS), plain)) and encoders_loaded(first)
    assert all(map(equal, second.encode_prompts(TEXTS), plain)) and not encoders_loaded(second)


def test_only_new_prompts_are_encoded(folder: Path, cache: Path) -> None:
    teacher(folder, cache).encode_prompts(TEXTS[:1])
    loaded, asked = teacher(folder, cache), []
    encode = loaded._encode
    loaded._encode = lambda *args: (asked.append(args[1]), encode(*args))[1]  # type: ignore[method-assign]
    loaded.encode_prompts(TEXTS)
    assert asked == [TEXTS[1]]


def test_guidance_is_the_callers_and_not_the_caches(folder: Path, cache: Path) -> None:
    teacher(folder, cache).encode_prompts(TEXTS, guidance=1.0)
    again = teacher(folder, cache)
    assert [prompt.guidance for prompt in again.encode_prompts(TEXTS, guidance=3.5)] == [3.5, 3.5]
    assert not encoders_loaded(again)


def test_entries_serve_training_though_they_were_read_in_inference_mode(
    folder: Path, cache: Path
) -> None:
    teacher(folder, cache).encode_prompts(TEXTS)
    with torch.inference_mode():
        prompts = teacher(folder, cache).encode_prompts(TEXTS)
    assert not any(x.is_inference() for x in prompts[0].condition.tensors().values())


# What makes another encoder -------------------------------------------------------------------


def change_a_weight(folder: Path) -> None:
    path = next((folder / "text_encoder").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-8:] = b"\x01" * 8
    path.write_bytes(data)


def change_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 300}))


def change_the_vae(folder: Path) -> None:
    path = next((folder / "vae").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-8:] = b"\x01" * 8
    path.write_bytes(data)


@pytest.mark.parametrize("change", [change_a_weight, change_the_tokenizer, change_the_vae])
def test_another_encoder_reads_nothing_of_this_one(
    change: Any, folder: Path, cache: Path, tmp_path: Path
) -> None:
    teacher(folder, cache).encode_prompts(TEXTS)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    change(other)
    loaded = teacher(other, cache)
    loaded.encode_prompts(TEXTS)
    assert encoders_loaded(loaded)


def test_another_number_format_reads_nothing_of_this_one(folder: Path, cache: Path) -> None:
    teacher(folder, cache).encode_prompts(TEXTS)
    narrow = teacher(folder, cache, torch.bfloat16)
    narrow.encode_prompts(TEXTS)
    assert encoders_loaded(narrow)


def test_another_network_and_another_place_change_nothing(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    teacher(folder, cache).encode_prompts(TEXTS)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    path = next((moved / "transformer").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-8:] = b"\x01" * 8
    path.write_bytes(data)
    loaded = teacher(moved, cache)
    loaded.encode_prompts(TEXTS)
    assert not encoders_loaded(loaded)


def test_keys_follow_from_text_and_image_and_length() -> None:
    cache = TextCache(Path("unused"), "encoder")
    image = torch.rand(8, 6, 3)
    keys = [
        *(cache.key("a"), cache.key("b"), cache.key("a", image), cache.key("a", image, 5)),
        cache.key("a", image.flip(0)),
        cache.key("a", image.reshape(6, 8, 3)),
        TextCache(Path("unused"), "other").key("a"),
    ]
    assert len(set(keys)) == len(keys)
    assert cache.key("a", image.clone()) == keys[2]


def test_a_large_file_counts_from_its_first_bytes_to_its_last(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    data = bytearray(3_000_000)
    names = []
    for place in (0, len(data) - 1, 0):
        path.write_bytes(data)
        names.append(encoder_name([path], torch.float32))
        data[place] ^= 255
    path.write_bytes(data + b"\0")
    names.append(encoder_name([path], torch.float32))
    assert len(set(names)) == 4


# Damage ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def swap_with_another(path: Path) -> None:
    other = next(each for each in path.parent.parent.rglob("*.safetensors") if each != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, swap_with_another])
def test_a_damaged_entry_is_encoded_again_and_that_is_said_in_one_line(
    damage: Any, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = teacher(folder, cache).encode_prompts(TEXTS)
    damage(sorted(cache.rglob("*.safetensors"))[0])
    with caplog.at_level(logging.WARNING, "accvideo_core"):
        again = teacher(folder, cache).encode_prompts(TEXTS)
    assert all(map(equal, again, plain))
    (line,) = caplog.messages
    assert line.startswith("encoding a prompt again, because ") and "\n" not in line
    mended = teacher(folder, cache)
    mended.encode_prompts(TEXTS)
    assert not encoders_loaded(mended)


def test_a_folder_that_takes_nothing_is_said_once_and_does_no_harm(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with caplog.at_level(logging.WARNING, "accvideo_core"):
        prompts = teacher(folder, blocked).encode_prompts(TEXTS)
    assert len(prompts) == 2
    (line,) = caplog.messages
    assert line.startswith("encoded prompts are not kept, because ")


def test_entries_are_made_by_whoever_encodes(cache: Path) -> None:
    kept = TextCache(cache, "encoder")
    condition = Condition(torch.rand(1, 3, 4), mask=torch.tensor([[True, True, False]]))
    key = kept.key("a", torch.rand(2, 2, 3))
    assert kept.get(key, lambda: condition) is condition
    found = kept.get(key, never)
    assert torch.equal(found.text, condition.text) and torch.equal(mask(found), mask(condition))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [f"{key}.safetensors"]


def never() -> Condition:
    raise AccVideoError("this is in the cache")


def mask(condition: Condition) -> Tensor:
    assert condition.mask is not None
    return condition.mask
