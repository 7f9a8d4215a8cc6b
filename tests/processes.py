"""Two processes that train together (gloo, CPU), kept alive for a module's tests.

    with Pair(folder) as pair:
        mine, others = pair(work, argument, ...)     work(ranks, argument, ...) in each of the two
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

_PATIENCE = 120.0
"""Seconds until a process that does not answer counts as hung."""


class Pair:
    """Runs module-level functions in two processes; their results, the first process's first."""

    def __init__(self, folder: Path) -> None:
        # One import for both, where the system can divide a process.
        divides = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if divides else "spawn")
        if divides:
            context.set_forkserver_preload(["peft", "accvideo_core.distill.trainer", "tests.tiny"])
        self.ends, self.processes = [], []
        for rank in range(2):
            end, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, rank, folder / "meet"), daemon=True)
            process.start()
            self.ends.append(end)
            self.processes.append(process)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            end.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()

    def __call__(self, work: Callable[..., Any], *args: Any, **facts: int) -> list[Any]:
        """Raises RuntimeError with the processes' tracebacks where the work failed.

        `facts` are those of `Ranks` that differ from two processes on one machine.
        """
        for end in self.ends:
            end.send((work, args, facts))
        answers = []
        for rank, end in enumerate(self.ends):
            if not end.poll(_PATIENCE):
                raise RuntimeError(f"process {rank} hangs in {work.__name__}")
            answers.append(end.recv())
        if failures := [text for failed, text in answers if failed]:
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]


def _serve(end: Any, rank: int, meet: Path) -> None:
    """Answer (failed, result or traceback) to each (work, arguments, facts) until None comes."""
    import torch
    import torch.distributed as dist

    from accvideo_core.ranks import ManyRanks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    both = ManyRanks(rank, size=2, local_size=2)
    while (request := end.recv()) is not None:
        work, args, facts = request
        try:
            end.send((False, work(replace(both, **facts), *args)))
        except Exception:
            end.send((True, f"process {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
