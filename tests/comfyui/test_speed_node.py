"""Speed Settings at the sockets, and tiny decoders, in ComfyUI's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack_process import facts_of

from tests import tiny


@pytest.fixture(scope="module")
def facts(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("speed")
    tiny.save_random_pipeline(base / "teacher")
    return facts_of("speed_script.py", comfyui_path, base)


@pytest.mark.parametrize(
    "fact",
    [
        "settings change no result",
        "nothing is left behind",
        "channels last shows the same",
        "trainable afterwards",
        "recorded alike",
        "nothing waits",
        "blocks wait",
        "an unasked teacher waits",
        "a teacher that is compared does not",
        "compared alike",
        "preview of another family",
    ],
)
def test_models_compute_as_the_settings_say(facts: dict[str, Any], fact: str) -> None:
    assert facts[fact] is True


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("together", "leave one of the two out"),
        ("too many", "choose at most"),
        ("kernel", "'sage'"),
        ("recorded inexactly", "sparse 'radial' changes what the teacher answers"),
        ("compared inexactly", "sparse 'radial' changes what the teacher answers"),
        ("another family", "decodes the latents of another model than HunyuanVideo"),
        ("no such file", "there is no decoder 'gone.pth'"),
    ],
)
def test_what_does_not_go_is_refused_in_a_sentence(
    facts: dict[str, Any], case: str, message: str
) -> None:
    assert message in facts[case] and "\n" not in facts[case]


def test_tiny_decoders_are_listed_decode_and_draw_previews(facts: dict[str, Any]) -> None:
    assert facts["listed"] == ["taehv.pth", "taew2_1.pth"]
    assert facts["decoded"] == [5, 32, 48, 3]
    assert facts["preview"] == [2, 5, 32, 48, 3]
