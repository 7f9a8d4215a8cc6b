"""The nodes: sockets in, one call of the library, sockets out. Nothing is computed here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import live, paths
from .compare import AccVideoCompare
from .dataset import AccVideoLoadDataset, AccVideoRecordTrajectories
from .evaluate import AccVideoEvaluate
from .ingest import AccVideoIngestVideos
from .inspect import AccVideoInspectFeatures, AccVideoInspectTrajectory
from .sample import AccVideoDecode, AccVideoSample, AccVideoSchedule
from .speed import AccVideoSpeed
from .student import AccVideoExportStudent, AccVideoLoadStudent, AccVideoSaveStudent
from .teacher import (
    AccVideoEncodePrompts,
    AccVideoLoadTeacher,
    AccVideoTeacherLora,
    AccVideoTinyPrompts,
)
from .tiny_world import AccVideoTinyVideos
from .toy import AccVideoToyExperiment
from .train import AccVideoAdversarialTune, AccVideoDistill

NODES: tuple[type[io.ComfyNode], ...] = (
    AccVideoLoadTeacher,
    AccVideoTeacherLora,
    AccVideoTinyPrompts,
    AccVideoTinyVideos,
    AccVideoEncodePrompts,
    AccVideoRecordTrajectories,
    AccVideoIngestVideos,
    AccVideoLoadDataset,
    AccVideoInspectTrajectory,
    AccVideoInspectFeatures,
    AccVideoDistill,
    AccVideoAdversarialTune,
    AccVideoSaveStudent,
    AccVideoExportStudent,
    AccVideoLoadStudent,
    AccVideoSchedule,
    AccVideoSpeed,
    AccVideoSample,
    AccVideoDecode,
    AccVideoCompare,
    AccVideoEvaluate,
    AccVideoToyExperiment,
)


class AccVideoExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def on_load(self) -> None:
        paths.register_folders()
        live.register_route()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
