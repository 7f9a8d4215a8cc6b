"""TensorBoard as a listener of a run, across kills and goings-on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError
from accvideo_core.monitor import Cancelled, Progress, together
from accvideo_core.tensorboard import TensorBoard


def updates(sink: TensorBoard, steps: range, session: float) -> None:
    for step in steps:
        figures = {"step": step, "loss": 0.5 * step + session, "k": step % 2}
        sink(Progress("distill", step, 12, figures))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard itself reads the folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_figures_of_every_update_are_on_the_disk_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path / "tensorboard") as sink:
        sink(Progress("plan", 1, 2, {"bytes": 1.0}))  # another stage counts other steps
        updates(sink, range(1, 4), 0.0)
        found = scalars(tmp_path / "tensorboard")
    loss = [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert found == {"distill/loss": loss, "distill/k": [(1, 1.0), (2, 0.0), (3, 1.0)]}


def test_updates_done_again_after_a_kill_replace_the_lost_ones(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    killed = TensorBoard(tmp_path)  # never closed
    updates(killed, range(1, 9), session=0.0)
    with TensorBoard(tmp_path) as sink:
        updates(sink, range(7, 13), session=0.25)
    before = [(step, 0.5 * step) for step in range(1, 7)]
    after = [(step, 0.5 * step + 0.25) for step in range(7, 13)]
    assert scalars(tmp_path)["distill/loss"] == before + after


def test_nothing_is_written_before_the_first_update(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path / "tensorboard"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_remedy_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(AccVideoError, match="run pip install tensorboard"):
        TensorBoard(tmp_path)
    words = ["distill", "no dataset", str(tmp_path / "run"), "--teacher", "none", "--tensorboard"]
    assert main(words) == 2
    assert "run pip install tensorboard" in capsys.readouterr().err


def test_monitors_are_called_in_order_until_one_raises() -> None:
    heard: list[str] = []

    def stop(progress: Progress) -> None:
        heard.append("stop")
        raise Cancelled

    monitor = together(lambda _: heard.append("first"), stop, lambda _: heard.append("last"))
    with pytest.raises(Cancelled):
        monitor(Progress("distill", 1, 2))
    assert heard == ["first", "stop"]
