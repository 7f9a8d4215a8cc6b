"""The node that runs the paper's one-dimensional experiment."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from comfy_api.latest import io

from . import paths
from .monitor import NodeMonitor
from .reports import shown_report

if TYPE_CHECKING:
    from ..accvideo_core.toy import ToySettings


class AccVideoToyExperiment(io.ComfyNode):
    """Figure 2 of the paper, measured."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoToyExperiment",
            display_name="1-D Toy Experiment",
            category="AccVideo/evaluate",
            description="See in minutes, on a CPU, why students are distilled on the teacher's own "
            "trajectories: the paper's one-dimensional experiment (Figure 2), written to "
            "output/accvideo/<name>. Needs no model.",
            search_aliases=["toy", "1D", "Figure 2", "useless points", "mismatch", "PeRFlow"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output("figure", tooltip="All six panels."),
                io.String.Output("table", tooltip="The numbers as a table of text."),
                io.String.Output("numbers", tooltip="The numbers as JSON."),
            ],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.complaint(paths.report_folder, name)

    @classmethod
    def execute(
        cls,
        name: str,
        preset: str,
        seed: int,
        tolerance: float = 0.5,
        envelope: int = 256,
        teacher_updates: int = 0,
        student_updates: int = 0,
    ) -> io.NodeOutput:
        from ..accvideo_core.toy import FIGURE, run_toy
        from ..accvideo_core.toy.report import table

        asked = {"teacher_updates": teacher_updates, "student_updates": student_updates}
        settings = replace(
            _preset(preset), seed=seed, tolerance=tolerance, envelope=envelope,
            **{field: updates for field, updates in asked.items() if updates},
        )  # fmt: skip
        folder = paths.report_folder(name)
        numbers = run_toy(folder, settings, NodeMonitor())
        told = json.dumps(numbers, indent=2)
        return shown_report([folder / f"{FIGURE}.png"], table(numbers), told)


def _preset(name: str) -> ToySettings:
    from ..accvideo_core.toy import PRESETS

    return PRESETS[name]


def _inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "name",
            default="my_toy",
            tooltip="Folder in output/accvideo. A cancelled experiment goes on there; other "
            "settings need another name.",
        ),
        io.Combo.Input(
            "preset",
            options=["short", "paper"],
            default="short",
            tooltip="short takes minutes; paper has the published updates, batch and learning "
            "rate, and takes several times as long.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="Of weights, noise and batches.",
        ),
        io.Float.Input(
            "tolerance",
            default=0.5,
            min=0.01,
            max=10.0,
            step=0.01,
            optional=True,
            tooltip="A point is useless where the teacher takes it to an end farther than this "
            "from the data at -3 and 3 (criterion endpoint).",
        ),
        io.Int.Input(
            "envelope",
            default=256,
            min=16,
            max=100_000,
            optional=True,
            advanced=True,
            tooltip="A point is useless where it lies outside what this many of the teacher's "
            "trajectories cover (criterion envelope).",
        ),
        *(_updates(of) for of in ("teacher", "student")),
    ]


def _updates(of: str) -> io.Input:
    return io.Int.Input(
        f"{of}_updates",
        default=0,
        min=0,
        max=1_000_000,
        optional=True,
        advanced=True,
        tooltip=f"Training steps of the {of}. 0 is the preset's number.",
    )
