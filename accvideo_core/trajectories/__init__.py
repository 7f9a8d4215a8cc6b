"""Recording a teacher's denoising trajectories, and the dataset they lie in."""

from __future__ import annotations

from .info import DatasetInfo
from .record import RecordSpec, record
from .store import Trajectory, TrajectoryDataset, record_id

__all__ = [
    "DatasetInfo",
    "RecordSpec",
    "Trajectory",
    "TrajectoryDataset",
    "record",
    "record_id",
]
