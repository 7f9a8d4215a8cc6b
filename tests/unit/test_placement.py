"""What goes to the device, and what never does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accvideo_core.models import placement
from accvideo_core.models.lora import shared_copy
from accvideo_core.models.placement import MAIN_MEMORY, apart, move, visiting

META = torch.device("meta")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).requires_grad_(False)


def test_all_but_what_is_kept_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_moved", lambda x, _device: x.double())  # seen by the dtype
    net = network()
    parameters = [id(p) for p in net.parameters()]
    move([net], META, keep=net[2])
    found = [{x.dtype for x in (*part.parameters(), *part.buffers())} for part in net]
    assert found == [{torch.float64}, {torch.float64}, {torch.float32}]
    assert [id(p) for p in net.parameters()] == parameters


def test_tensors_of_another_structure_are_known_as_the_same() -> None:
    net = network()
    copied = shared_copy(net)
    copied.append(nn.Linear(2, 2))
    assert {part for part, _, _ in apart([copied], net)} == {copied[3]}


def test_what_was_moved_in_inference_mode_can_be_trained_through() -> None:
    net = network()
    with torch.inference_mode():
        net.to(torch.float64)
        assert any(p.is_inference() for p in net.parameters())
        move([net], MAIN_MEMORY)
    assert not any(x.is_inference() for x in [*net.parameters(), *net.buffers()])


def test_waiting_parts_stay_where_they_are_and_the_rest_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = network()
    moves: list[tuple[str, list[nn.Module]]] = []

    def noted(modules: list[nn.Module], device: torch.device, keep: nn.Module) -> None:
        moves.append((device.type, [part for part, _, _ in apart(modules, keep)]))

    monkeypatch.setattr(placement, "move", noted)
    with pytest.raises(KeyError), visiting(net, META, [net[2]]):
        raise KeyError
    assert [device for device, _ in moves] == ["meta", "cpu"]
    assert all(set(parts) == {net[0], net[1]} for _, parts in moves)


def test_a_network_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[Any] = []
    monkeypatch.setattr(placement, "move", lambda *given, **_: moves.append(given))
    with visiting(network(), MAIN_MEMORY, []):
        assert not moves
    assert not moves
