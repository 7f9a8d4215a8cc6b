"""TensorBoard as a listener of training: a Monitor that writes event files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import AccVideoError
from .monitor import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STAGE = "distill"
"""The only stage whose steps are a run's updates."""


class TensorBoard:
    """Writes the figures of every update into `folder`; use as a context manager around the work.

    metrics.jsonl stays the truth; this is a copy for those who look with TensorBoard. Each update
    is on the disk before the next begins. A run that goes on after a kill does some updates again:
    the new file tells TensorBoard to forget what older files hold of them (`purge_step`).
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            AccVideoError: the package `tensorboard` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise AccVideoError(
                "writing for TensorBoard needs the package tensorboard, which is not installed; "
                "run pip install tensorboard, or leave --tensorboard out"
            ) from error
        self.folder, self._create = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def __call__(self, progress: Progress) -> None:
        """The Monitor itself."""
        if progress.stage != STAGE:
            return
        # The first update of this session says where the run goes on.
        writer = self._writer or self._create(str(self.folder), purge_step=progress.step)
        for name, value in progress.metrics.items():
            if name != "step":
                writer.add_scalar(f"{STAGE}/{name}", value, progress.step)
        writer.flush()
        self._writer = writer

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
