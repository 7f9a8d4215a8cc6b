"""Ranks: the processes that train or sample together, and what they tell each other.

torchrun starts them. `ALONE` is a run of one process, whose answers cost nothing, so that trainer
and sampler ask the same questions either way and have no special case.

The ranks of a sequence group (Ulysses) are neighbours: they see the same samples and divide the
tokens among them. Groups divide the samples.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AccVideoError


@dataclass(frozen=True)
class Ranks:
    """One process."""

    rank: int = 0
    size: int = 1
    """Processes."""
    sequence: int = 1
    """Processes that divide the tokens of one sample."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    @property
    def groups(self) -> int:
        """Groups that divide a batch."""
        return self.size // self.sequence

    @property
    def group(self) -> int:
        """The number of this process's group."""
        return self.rank // self.sequence

    @property
    def first_of_group(self) -> bool:
        """Whether this is the process that writes down what its group has made."""
        return self.rank % self.sequence == 0

    def rows(self, batch: int) -> slice:
        """This process's samples of a batch of `batch`."""
        each = batch // self.groups
        start = self.group * each
        return slice(start, start + each)

    def parts(self, batch: int, accumulate: int) -> int:
        """In how many equal parts this process computes its samples.

        A part is as large as in one process, or smaller.
        """
        mine, most = batch // self.groups, batch // accumulate
        return next(n for n in range(1, mine + 1) if mine % n == 0 and mine // n <= most)

    def reduce(self, parameters: Iterable[Tensor], whole: bool) -> None:
        """Make gradients those of the whole batch, the same in every process.

        Args:
            parameters: their gradients are changed in place.
            whole: each process computed with all tokens of its samples, as heads do; not so the
                student, whose gradient is the sum over the processes that divide the tokens.
        """

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The mean over processes of figures that all of them have."""
        return dict(figures)

    def gather(self, x: Tensor) -> Tensor:
        """What the groups hold, [n, ...] on the CPU each, one after the other."""
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return flag

    def together(self) -> Callable[[bool], bool]:
        """Whether a flag is set in any process of the own group; all processes ask for it once."""
        return bool

    def agree(self, number: int) -> bool:
        """Whether all processes say the same number."""
        return True

    def wait(self) -> None:
        """Go on when all processes have come here."""


ALONE = Ranks()
FAILED = 2
"""Exit status of a process whose error another one has told."""


class ManyRanks(Ranks):
    """Processes of torch's default group."""

    def reduce(self, parameters: Iterable[Tensor], whole: bool) -> None:
        import torch.distributed as dist

        split = 1 if whole else self.sequence
        for p in parameters:
            if p.grad is None:
                continue
            if hasattr(p, "device_mesh"):  # sharded by FSDP, which has taken the mean
                p.grad.to_local().mul_(split)  # type: ignore[attr-defined]
            else:
                dist.all_reduce(p.grad)
                p.grad.mul_(split / self.size)

    def mean(self, figures: Mapping[str, float]) -> dict[str, float]:
        import torch.distributed as dist

        values = torch.tensor([float(x) for x in figures.values()], dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(figures, (values / self.size).tolist(), strict=True))

    def gather(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts[:: self.sequence])

    def any(self, flag: bool) -> bool:
        return self._most(int(flag)) > 0

    def together(self) -> Callable[[bool], bool]:
        import torch.distributed as dist

        if self.sequence == 1:
            return bool
        own, _ = dist.new_subgroups(self.sequence, backend="gloo")

        def any_of_group(flag: bool) -> bool:
            found = torch.tensor(int(flag))
            dist.all_reduce(found, dist.ReduceOp.MAX, own)
            return bool(found)

        return any_of_group

    def agree(self, number: int) -> bool:
        most, least = self._most(number), -self._most(-number)
        return most == least

    def wait(self) -> None:
        self._most(0)

    def _most(self, number: int) -> int:
        import torch.distributed as dist

        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


@contextlib.contextmanager
def joined(sequence: int | None = None, device: str | None = None) -> Iterator[Ranks]:
    """The processes that torchrun started, for the length of the block; else `ALONE`.

    Each takes the GPU of its number on its machine, unless `device` is the CPU. Where several fail,
    mostly for the same reason, the error leaves this in the first of them only.

    Raises:
        AccVideoError: torch cannot do that, or the numbers do not go together.
        SystemExit: another process has raised its error before.
    """
    import torch.distributed as dist

    sequence = sequence or 1
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        _check_sequence(sequence, 1)
        yield ALONE
        return
    _check_torch()
    store, rank, size = next(dist.rendezvous("env://"))
    try:
        _check_device(device)
        on_cuda = device != "cpu" and torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(dist.get_node_local_rank())
        _check_sequence(sequence, size)
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        group = dist.PrefixStore("accvideo", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size)
        yield ManyRanks(rank, size, sequence, _processes_here(size)) if size > 1 else ALONE
    except AccVideoError:  # others may wait for this process, which torchrun then ends
        if store.add("accvideo failed", 1) > 1:
            raise SystemExit(FAILED) from None
        raise
    except BaseException:
        _leave()
        raise
    _leave()


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _processes_here(size: int) -> int:
    """Processes on this machine, of `size` in all."""
    import torch.distributed as dist

    names: list[Any] = [None] * size
    dist.all_gather_object(names, platform.node())
    return names.count(platform.node())


def _check_sequence(sequence: int, size: int) -> None:
    if sequence < 1 or size % sequence:
        raise AccVideoError(
            f"sequence-parallel is {sequence}, which does not divide the {size} processes; start "
            "a multiple of it with torchrun, or choose a divisor"
        )


def _check_device(device: str | None) -> None:
    import torch.distributed as dist

    if device not in (None, "cpu", "cuda"):
        raise AccVideoError(
            f"device is {device}, but every process takes a GPU of its own; give cuda or cpu"
        )
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else None
    if gpus is not None and dist.get_node_local_rank() >= gpus:
        raise AccVideoError(
            f"torchrun started more processes than this machine's {gpus} GPUs; give "
            f"--nproc-per-node {gpus}"
        )


def _check_torch() -> None:
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise AccVideoError(
            f"torch {torch.__version__} cannot work in several processes; "
            "install torch 2.7 or newer, built with torch.distributed"
        ) from error
