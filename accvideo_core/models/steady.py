"""What is the same in every step of one sampling is computed in the first one.

Rotary tables follow from the size of the latents alone, projections of the text from the condition
alone. A family lists the callables of its networks that compute them: `Family.tables` and
`Family.texts`. What is kept is found by the sizes, or by the very tensor that is asked about
(its identity and version), never by its values, for which a device would have to be waited for.

With gradients everything is computed each time, because autograd needs it. So it is inside a CUDA
graph that is being captured, which must hold the computation and not one outcome of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .experts import networks_of

if TYPE_CHECKING:
    from .video_model import VideoModel

RESULTS = 4
"""Kept of each callable: a prompt's, its negative's, and those of both in one batch."""

_Key = Callable[[Any], Hashable]


class _Kept:
    """The last results of callables, found by their arguments."""

    def __init__(self) -> None:
        self._results: dict[Hashable, OrderedDict[Hashable, tuple[Any, Any]]] = {}

    def once(self, key: _Key, compute: Callable[..., Any], name: Hashable, *args: Any) -> Any:
        """`compute(*args)`, or what `name` gave when it was last asked about the same `key`s."""
        if torch.is_grad_enabled() or _capturing():
            return compute(*args)
        found = self._results.setdefault(name, OrderedDict())
        asked = tuple(key(x) for x in args)
        if asked not in found:
            # Only of a living tensor is the identity its own.
            found[asked] = compute(*args), args if key is _identity else None
            if len(found) > RESULTS:
                found.popitem(last=False)
        found.move_to_end(asked)
        return found[asked][0]


_active: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
"""What is kept for each network that is being sampled."""


@contextmanager
def steady(model: VideoModel) -> Iterator[None]:
    """Inside, what a model's networks compute alike in every step is computed once; exact."""
    family = model.family
    with ExitStack() as stack:
        for network in networks_of(model.module).values():
            kept = stack.enter_context(_keeping(network))
            for path in family.tables:
                stack.enter_context(_kept_at(network, path, _size, kept))
            for path in family.texts:
                stack.enter_context(_kept_at(network, path, _identity, kept))
        yield


def once(network: nn.Module, compute: Callable[..., Any], *args: Any) -> Any:
    """`compute(network, *args)`, which follows from the sizes of `args`, for a family's own code.

    Inside `steady` it is computed once, outside each time.
    """
    kept = _active.get(network)
    if kept is None:
        return compute(network, *args)
    return kept.once(_size, partial(compute, network), compute, *args)


@contextmanager
def _keeping(network: nn.Module) -> Iterator[_Kept]:
    outer = _active.get(network)
    kept = _active[network] = _Kept()
    try:
        yield kept
    finally:
        if outer is None:
            del _active[network]
        else:
            _active[network] = outer


@contextmanager
def _kept_at(network: nn.Module, path: str, key: _Key, kept: _Kept) -> Iterator[None]:
    """Inside, the submodule or method at `path` is asked once for each `key` of its arguments."""
    place, _, name = path.rpartition(".")
    owner = network.get_submodule(place)
    found = getattr(owner, name)
    if found is None:  # a part that not every network of the family has
        yield
        return
    owner, name = (found, "forward") if isinstance(found, nn.Module) else (owner, name)
    plain = getattr(owner, name)
    had = name in owner.__dict__

    def keeping(*args: Any, **kwargs: Any) -> Any:
        names, count = tuple(kwargs), len(args)

        def compute(*values: Any) -> Any:
            return plain(*values[:count], **dict(zip(names, values[count:], strict=True)))

        return kept.once(key, compute, (path, names), *args, *kwargs.values())

    setattr(owner, name, keeping)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, plain)
        else:
            delattr(owner, name)


def _size(x: Any) -> Hashable:
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x


def _identity(x: Any) -> Hashable:
    if not isinstance(x, Tensor):
        return x
    # A tensor of inference mode is changed without a trace, and so never the same again.
    return object() if x.is_inference() else (id(x), x._version)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
