"""Ingesting: clips of real videos as a dataset of one state each, the clean latents at t = 0.

Every clip is a prompt of its own, with its video's caption and, for image-to-video families, its
first frame. Its id follows from the video's content, the caption, the clip's number and the
settings; it is encoded alone. So its bytes depend neither on interruptions, nor on the order of the
videos, nor on who encodes it.

    look_at    the videos that can be used, and what is wrong with the others (footage.py)
    Ingester   cuts and encodes the clips of one video, and writes them
    ingest     all of it in one process, or in several that are started on the same folder

Shapes: F frames, H, W pixels; C channels, T latent frames.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..conditioning import Prompt
from ..files import disk_errors, locked, remove_leftovers, write_bytes
from ..monitor import Monitor, Progress, silent
from ..video_reading import BrokenVideo
from .clips import cut
from .footage import Footage, IngestSpec, Skipped, Source, look_at, source_facts
from .info import DTYPES, DatasetInfo
from .listing import Listing, read_listing, write_listing
from .prompts import too_long_notes
from .record import Batch, Outcome, versions
from .rollout import Report, rounding_error
from .shared_work import share
from .store import Trajectory, TrajectoryDataset, record_id
from .writer import Closing, Writer

if TYPE_CHECKING:
    from ..models.loading import Teacher

VIDEOS_FILE = "videos.jsonl"
"""Which videos a dataset's clips were cut from, a line each."""
SKIPPED_FILE = "skipped.jsonl"
"""What the last ingestion could not use, and why, a line each."""
SEED = 0
"""Of every ingested dataset, as nothing is drawn."""


@dataclass(frozen=True, slots=True)
class Ingestion:
    """What came of a folder of videos."""

    dataset: TrajectoryDataset
    videos: int
    """Videos that were used."""
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def ingest(
    teacher: Teacher, folder: Path, spec: IngestSpec, out: Path, monitor: Monitor = silent
) -> Ingestion:
    """Ingest the videos in `folder` into the dataset in `out`, and go on where a run stopped.

    Several processes that are started on one `out` share the work. More videos, or more clips of
    each, add to what is there. The monitor is called for every video that is looked at and every
    clip; when it raises, all finished clips are on the disk once this has returned.

    A video that cannot be used, or not to its end, is left out and told with its reason, here and
    in SKIPPED_FILE. Raises AccVideoError when there is no video or none can be used, for impossible
    settings, for an `out` that holds a dataset with other ones (then nothing is touched), for a
    teacher without VAE or text encoders, and for a full disk.
    """
    info = _info(teacher, spec)
    teacher.check_encoders()
    teacher.check_vae()
    folder, out = Path(folder), Path(out)
    if out.exists() and any(out.iterdir()):  # before the videos are looked at, which takes long
        TrajectoryDataset.create(out, info)
    image = teacher.model.family.encode_image is not None
    caption = spec.caption if spec.caption is not None or not image else ""
    footage = look_at(folder, replace(spec, caption=caption), out, monitor)
    notes = (*footage.notes, *_text_notes(teacher, footage))
    dataset = TrajectoryDataset.create(out, info)
    remove_leftovers(dataset.folder)
    _remove_halves(dataset, footage.sources)
    batches = [Batch(0, source.prompt_ids) for source in footage.sources]
    clips = sum(source.clips for source in footage.sources)
    monitor(Progress("ingest", 0, clips, notes=notes))
    try:
        lost = share(Ingester(teacher, dataset, footage.sources), batches, monitor)
    finally:
        _list(dataset, footage.sources)
    skipped = (*footage.skipped, *_lost(footage.sources, lost))
    _write_lines(dataset.folder / SKIPPED_FILE, [_skipped_facts(one) for one in skipped])
    return Ingestion(dataset, len(footage.sources), skipped, notes)


class Ingester(Closing):
    """Makes the clips of one video after another, in one process, as `share` asks for them.

    A clip is written by a background thread while the next one is encoded. Close it, or use it as a
    context, to be sure that all is on the disk.
    """

    stage = "ingest"

    def __init__(
        self, teacher: Teacher, dataset: TrajectoryDataset, sources: Sequence[Source]
    ) -> None:
        self.dataset = dataset
        self._teacher = teacher
        self._sources = {source.prompt_ids: source for source in sources}
        self._writer = Writer()
        self._asked: list[tuple[str, Tensor | None]] = []
        # One for all clips: it has the text encoders on their device while it is open.
        self._encoded = self._encoder()
        self._last: Prompt | None = None

    def steps(self, batch: Batch) -> int:
        """Clips of a video."""
        return len(batch.prompt_ids)

    @torch.no_grad()
    def do(
        self,
        batch: Batch,
        report: Report = lambda _step, _preview: None,
        stored: Callable[[Outcome], None] = lambda _outcome: None,
    ) -> Outcome:
        """Make those clips of one video that do not exist, and have them written.

        Calls `report(done, preview)` after every clip, and `stored(outcome)`, in the writer's
        thread, once they are on the disk. Raises AccVideoError for what went wrong while writing.
        """
        self._writer.check()
        info, source = self.dataset.info, self._sources[batch.prompt_ids]
        assert info.cutting is not None
        ids = dict(enumerate(batch.ids(SEED)))
        left = {number: id for number, id in ids.items() if not self.dataset.has(id)}
        skipped: dict[str, str] = {}
        size = info.frames, info.height, info.width
        written = 0
        try:
            if left:
                source.check_unchanged()
            clips = cut(source.path, source.scan.timing, info.cutting, size, tuple(left))
            for number, frames in clips:
                latents = self._latents(frames)
                id = left.pop(number)
                if torch.isfinite(latents).all():
                    prompt = self._prompt(source, number, frames)
                    self._writer.put(partial(self._store, id, prompt, latents))
                    written += 1
                else:
                    skipped[id] = "its latents are not finite; load the VAE in float32"
                report(len(ids) - len(left), partial(_same, latents.float()))
        except BrokenVideo as error:
            reason = str(error).replace(f"{source.path} ", "it ")
            skipped |= dict.fromkeys(left.values(), reason)
        outcome = Outcome(written, tuple(skipped), tuple(skipped.values()))
        self._writer.put(partial(stored, outcome))
        return outcome

    def not_stored(self, skipped: Mapping[str, str], total: int) -> str:
        """One sentence on the clips that could not be made."""
        id, reason = next(iter(skipped.items()))
        (first,) = _lost(list(self._sources.values()), {id: reason})
        return f"{len(skipped)} of {total} clips cannot be made; {first}"

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises AccVideoError for what went wrong."""
        self._writer.flush()

    def close(self) -> None:
        """`flush`, and put the text encoders away."""
        try:
            self._writer.close()
        finally:
            self._encoded.close()

    def _encoder(self) -> Generator[Prompt, None, None]:
        """What `_prompt` puts into `_asked`, encoded."""
        info, given = self.dataset.info, iter(self._asked.pop, None)
        yield from self._teacher.encode_each(given, info.frames, info.guidance)

    def _prompt(self, source: Source, number: int, frames: Tensor) -> Prompt:
        """The prompt of a clip; of a family without images one text serves all clips in turn."""
        begins = self._teacher.model.family.encode_image is not None
        if begins or self._last is None or self._last.text != source.text:
            self._asked.append((source.text, frames[0] if begins else None))
            self._last = next(self._encoded)
        return Prompt(source.prompt_id(number), source.text, self._last.condition)

    def _latents(self, frames: Tensor) -> Tensor:
        """Frames [F, H, W, 3] -> [1, C, T, H, W] in model space, as they are stored."""
        x = self._teacher.vae.encode(frames[None])
        return self._teacher.model.latent_spec.fill(x, len(frames))

    def _store(self, id: str, prompt: Prompt, latents: Tensor) -> None:
        info, dataset = self.dataset.info, self.dataset
        dtype = DTYPES[info.dtype]
        rounding = float(rounding_error(latents, dtype))
        stored = latents.to(dtype)
        # The condition first: a record is there once it can be learned from.
        dataset.store_prompt(prompt, info.guidance)
        if not dataset.has(id):  # another process may have been faster
            dataset.write(Trajectory(id, stored, info.times, SEED, prompt.id, 0, rounding))


def _info(teacher: Teacher, spec: IngestSpec) -> DatasetInfo:
    model = teacher.model
    return DatasetInfo(
        family=model.family.name,
        teacher=model.fingerprint,
        teacher_source=model.source,
        latent_spec=model.latent_spec,
        frames=spec.frames,
        height=spec.height,
        width=spec.width,
        time_grid=(1.0, 0.0),
        kept=(1,),
        guidance=model.family.guidance if spec.guidance is None else spec.guidance,
        seed=SEED,
        batch_size=1,
        dtype=spec.dtype,
        cutting=spec.cutting,
        versions=versions(),
    )


def _text_notes(teacher: Teacher, footage: Footage) -> tuple[str, ...]:
    texts, limit = [source.text for source in footage.sources], teacher.model.family.text_tokens
    notes = () if limit is None else too_long_notes(texts, limit, teacher.tokenizer)
    without = sum(not text for text in texts)
    if without:
        notes = (*notes, f"{without} of {len(texts)} videos have no caption and get an empty one")
    return notes


def _remove_halves(dataset: TrajectoryDataset, sources: Sequence[Source]) -> None:
    """Remove records whose condition was damaged and taken away, so that both are made anew."""
    for id in (id for source in sources for id in source.prompt_ids):
        path = dataset.record_path(record_id(SEED, id, 0))
        if path.exists() and not dataset.prompt_path(id).exists():
            with disk_errors("remove", path):
                path.unlink(missing_ok=True)


def _list(dataset: TrajectoryDataset, sources: Sequence[Source]) -> None:
    """List the clips that exist, and where they come from, the same whoever made them."""
    texts, facts = {}, {}
    for source in sources:
        there = [id for id in source.prompt_ids if dataset.has(record_id(SEED, id, 0))]
        texts |= dict.fromkeys(there, source.text)
        if there:
            facts[source.key] = source_facts(source)
    path = dataset.folder / VIDEOS_FILE
    with locked(dataset.lock_path):
        listing = read_listing(dataset.folder)
        texts = {**texts, **listing.texts}
        write_listing(dataset.folder, Listing((tuple(sorted(texts)),), texts, 1))
        known = {str(line["id"]): line for line in _read_lines(path)}
        facts = {**known, **facts}
        _write_lines(path, [facts[key] for key in sorted(facts)])


def _lost(sources: Sequence[Source], lost: Mapping[str, str]) -> list[Skipped]:
    """What was left out of videos, by reason."""
    found = []
    for source in sources:
        ids = enumerate(record_id(SEED, id, 0) for id in source.prompt_ids)
        reasons: dict[str, list[int]] = {}
        for number, id in ids:
            if id in lost:
                reasons.setdefault(lost[id], []).append(number)
        found += [Skipped(source.name, why, tuple(which)) for why, which in reasons.items()]
    return found


def _skipped_facts(one: Skipped) -> dict[str, object]:
    return {"video": one.name, "clips": list(one.clips), "reason": one.reason}


def _write_lines(path: Path, facts: Sequence[Mapping[str, object]]) -> None:
    data = "".join(f"{json.dumps(line)}\n" for line in facts).encode()
    with disk_errors("read", path):
        same = path.exists() and path.read_bytes() == data
    if not same:
        write_bytes(path, data)


def _read_lines(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    found = []
    with disk_errors("read", path):
        lines = path.read_bytes().splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):  # rot, which the next ingestion of it mends
            found.append(json.loads(line))
    return found


def _same(latents: Tensor) -> Tensor:
    return latents
