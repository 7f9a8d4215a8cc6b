"""Weights in the books of ComfyUI's memory management, as far as a CPU shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack_process import facts_of


@pytest.fixture(scope="module")
def facts(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("devices")
    return facts_of("devices_script.py", comfyui_path, base)


@pytest.mark.parametrize(
    "fact",
    [
        "counted",
        "whole",
        "trainable",
        "loaded once",
        "unloaded",
        "shared weights stay",
        "waiting blocks stay",
        "waiting blocks can be trained through",
        "all other room is made",
        "swapped network is put away",
        "decoder comes and goes",
        "no decoder without a VAE",
        "forgotten",
    ],
)
def test_teacher_is_a_model_of_comfyuis_management(facts: dict[str, Any], fact: str) -> None:
    assert facts[fact] is True


def test_what_cannot_fit_the_device_is_refused_with_both_sizes(facts: dict[str, Any]) -> None:
    assert facts["refusal"] == (
        "'small' takes 0.0 GB and the device has 0.0 GB; choose an fp8 or GGUF file of it, or a "
        "smaller model"
    )
