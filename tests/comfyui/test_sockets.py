"""Prompts with images at the sockets: nothing is lost on the way through CONDITIONING."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_wan
from pack_process import facts_of


@pytest.fixture(scope="module")
def facts(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("sockets")
    tiny_wan.save_pipeline("wan_i2v", base / "teacher")
    return facts_of("sockets_script.py", comfyui_path, base)


@pytest.mark.parametrize("kind", ["latents", "latents and tokens", "everything"])
def test_conditions_with_images_come_back_bit_for_bit(facts: dict[str, Any], kind: str) -> None:
    assert facts[kind] is True


def test_text_alone_stands_under_stock_keys_only(facts: dict[str, Any]) -> None:
    assert facts["text alone"] == ["accvideo_prompt", "guidance", "pooled_output"]


@pytest.mark.parametrize(
    "fact", ["one entry each", "trainable", "one image for all", "one prompt for all", "fitted"]
)
def test_node_encodes_every_prompt_with_its_image(facts: dict[str, Any], fact: str) -> None:
    assert facts[fact] is True


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unpaired", "3 prompts and 2 images do not pair"),
        ("with clip", "leave clip out"),
        ("foreign", "an image, which Wan 2.1 text to video does not take"),
    ],
)
def test_what_does_not_go_together_is_refused(
    facts: dict[str, Any], case: str, message: str
) -> None:
    assert message in facts[case]


@pytest.mark.parametrize(
    "fact", ["of a video", "of images", "of images and back", "of stock images"]
)
def test_latents_have_the_shape_that_vae_nodes_take(facts: dict[str, Any], fact: str) -> None:
    assert facts[fact] is True


def test_latents_of_images_are_no_video(facts: dict[str, Any]) -> None:
    assert "expected [B, 4, T, H, W]" in facts["images for a video"]


def test_images_of_stock_nodes_are_still_read_by_the_family(facts: dict[str, Any]) -> None:
    assert "clip_vision_output, which Wan 2.1 image to video needs" in facts["stock"]
