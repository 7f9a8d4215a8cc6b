"""Mending a damaged dataset: what is damaged is removed and made again by its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..conditioning import Prompt
from ..errors import AccVideoError
from ..monitor import Monitor, Progress, silent
from .listing import read_listing
from .record import Batch, Recorder, plan
from .rollout import Preview
from .store import TrajectoryDataset
from .verify import Fault

if TYPE_CHECKING:
    from ..models.loading import Teacher


def mend(
    dataset: TrajectoryDataset,
    faults: Sequence[Fault],
    teacher: Teacher,
    negative: Prompt | None = None,
    monitor: Monitor = silent,
) -> list[str]:
    """Remove what `faults` name and record exactly those records again, with the same bytes.

    A prompt's condition is encoded again from its text. Where that cannot be done (its text is
    lost, or it has an image) it is left as it is, with the records that need it.

    Args:
        negative: of the teacher, for a dataset whose own negative prompt is damaged.

    Returns:
        A sentence for each thing that was left or could not be made again.

    Raises:
        AccVideoError: the dataset is of another teacher; nothing is touched then.
    """
    info = dataset.info
    if info.cutting is not None:
        dataset.repair(faults)
        return ["what was damaged is removed; ingest the same videos again to make it anew"]
    if teacher.model.fingerprint != info.teacher:
        raise AccVideoError(
            f"dataset {dataset.folder.name!r} was recorded from {info.teacher_source} (fingerprint "
            f"{info.teacher}), and this teacher has fingerprint {teacher.model.fingerprint}; give "
            "the teacher it was recorded from, with the same LoRAs"
        )
    again = _encoded(dataset, faults, teacher, negative)
    lost = {f.id for f in faults if f.kind == "prompt"} - again.keys()
    batches = plan(dataset, None, dataset.samples_per_prompt)
    if info.negative in lost:
        mendable = []
    else:
        mendable = [batch for batch in batches if lost.isdisjoint(batch.prompt_ids)]
    left = _records(dataset, batches) - _records(dataset, mendable)
    damaged = {f.id for f in faults if f.kind == "record"} - left
    removed = damaged | again.keys()
    dataset.repair([f for f in faults if f.kind in ("line", "plan") or f.id in removed])
    for prompt in again.values():
        (dataset.add_negative if prompt.id == info.negative else dataset.add_prompt)(prompt)
    todo = [batch for batch in mendable if not damaged.isdisjoint(batch.ids(info.seed))]
    notes = _record(dataset, todo, teacher, monitor)
    notes += [f"record {id} belonged to no listed prompt, and is removed"
              for id in sorted(damaged - _records(dataset, todo))]  # fmt: skip
    return notes + [
        f"prompt {id} cannot be encoded again from its text alone; record it again with its text "
        "and image, and repair again"
        for id in sorted(lost)
    ]


def _records(dataset: TrajectoryDataset, batches: Sequence[Batch]) -> set[str]:
    return {id for batch in batches for id in batch.ids(dataset.info.seed)}


def _encoded(
    dataset: TrajectoryDataset, faults: Sequence[Fault], teacher: Teacher, negative: Prompt | None
) -> dict[str, Prompt]:
    """Every damaged prompt that its text gives again, by id."""
    texts, info = read_listing(dataset.folder).texts, dataset.info
    asked = [fault.id for fault in faults if fault.kind == "prompt"]
    known = [texts[id] for id in asked if id in texts]
    made = teacher.encode_prompts(known, info.guidance) if known else []
    found = [Prompt(p.id, p.text, p.condition.with_guidance(info.guidance)) for p in made]
    found += [negative] if negative else []
    return {prompt.id: prompt for prompt in found if prompt.id in asked}


def _record(
    dataset: TrajectoryDataset, batches: Sequence[Batch], teacher: Teacher, monitor: Monitor
) -> list[str]:
    """Record what is missing of these batches; a sentence for each record that was not finite."""
    if not batches:
        return []
    steps, notes = len(dataset.info.time_grid) - 1, []
    with Recorder(teacher.model, dataset) as recorder:
        for number, batch in enumerate(batches):

            def report(step: int, preview: Preview, done: int = number * steps) -> None:
                monitor(Progress("repair", done + step, len(batches) * steps, preview=preview))

            notes += recorder.do(batch, report).reasons
    return notes
