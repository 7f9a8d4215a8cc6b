"""Claims: which process is at work on which batch, so that several share a recording.

A claim is a file in the dataset's hidden folder `.claims`, made with O_EXCL. It says who holds it
and for how many seconds after its last change, which its holder renews. It is void when that time
has passed, and at once when a holder on the same machine has died; then anybody may take it over.

A claim saves work and is never a condition of correctness: two processes that compute the same
record write the same bytes under the same name. So no clock has to be right. Ages are told by the
clock of the disk alone, and where that jumps, too, a batch is computed twice or waits a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import AccVideoError
from ..files import disk_errors, disk_time, read_json, write_json

if TYPE_CHECKING:
    from .record import Batch

SECONDS = 900.0
"""How long a claim holds unless it is renewed: longer than any teacher's step takes."""

FOLDER = ".claims"


class Claims:
    """The claims of one process on batches of the dataset in `folder`."""

    def __init__(self, folder: Path, owner: str = "", seconds: float | None = None) -> None:
        self._folder = folder / FOLDER
        self._owner = f"{owner or platform.node()} {os.getpid()} {uuid.uuid4().hex}"
        self._seconds = SECONDS if seconds is None else seconds
        self._machine = _machine()
        self._held: dict[Path, BinaryIO] = {}
        self._guard = threading.Lock()  # the writer's thread releases, the other one renews
        self._renewed = time.monotonic()
        with disk_errors("write", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._begun = disk_time(self._folder)

    def take(self, batch: Batch) -> bool:
        """Claim a batch, also one whose claim is void. False when somebody else is at work."""
        path = self._path(batch)
        with disk_errors("write", path):
            return self.holds(batch) or self._make(path) or (self._bury(path) and self._make(path))

    def holds(self, batch: Batch) -> bool:
        """Whether the claim is still this process' own."""
        path = self._path(batch)
        with self._guard:
            return path in self._held and _same(path, self._held[path])

    def renew(self) -> None:
        """Let all claims hold from now on; call it as often as you like."""
        now = time.monotonic()
        if now - self._renewed < self._seconds / 4:
            return
        self._renewed = now
        with self._guard:
            for path, file in self._held.items():
                # One that was taken over is another's now, and not to be prolonged.
                with contextlib.suppress(OSError):
                    if _same(path, file):
                        os.utime(path)

    def release(self, batch: Batch) -> None:
        """Give a batch back, done or not."""
        self._release(self._path(batch))

    def note(self, batch: Batch, skipped: Mapping[str, str]) -> None:
        """Leave word of records that cannot be made: id and reason."""
        write_json(self._note_path(batch), dict(skipped))

    def noted(self, batch: Batch) -> dict[str, str]:
        """What other processes noted since this one began; older notes are worth a new try."""
        path = self._note_path(batch)
        try:
            if path.stat().st_mtime < self._begun:
                return {}
            return {str(id): str(reason) for id, reason in read_json(path).items()}
        except (OSError, AccVideoError, AttributeError):
            return {}  # no note, or none that can be read: then the batch is tried again

    def close(self) -> None:
        """Give everything back, and clear away claims that are void."""
        for path in list(self._held):
            self._release(path)
        with contextlib.suppress(OSError):
            for path in self._folder.glob("*.claim"):
                self._bury(path)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def _path(self, batch: Batch) -> Path:
        key = hashlib.sha256(f"{batch.sample} {' '.join(batch.prompt_ids)}".encode()).hexdigest()
        return self._folder / f"{key[:32]}.claim"

    def _note_path(self, batch: Batch) -> Path:
        return self._path(batch).with_suffix(".skipped")

    def _make(self, path: Path) -> bool:
        """Make the claim's file, unless there is one."""
        try:
            file = open(path, "x+b", buffering=0)
        except FileExistsError:
            return False
        # Where nobody could see that this process has died, only time makes the claim void.
        machine = self._machine if _lock(file) else ""
        says = {"owner": self._owner, "machine": machine, "seconds": self._seconds}
        try:
            file.write(json.dumps({**says, "number": uuid.uuid4().hex}).encode())
        except OSError:
            file.close()
            path.unlink()
            raise
        with self._guard:
            self._held[path] = file
        return True

    def _bury(self, path: Path) -> bool:
        """Remove a void claim. True when there is none any more, False when it is alive."""
        try:
            with open(path, "r+b") as file:
                data = file.read()
                if self._alive(data, file):
                    return False
            grave = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            os.rename(path, grave)  # of several that come at once, one succeeds
        except FileNotFoundError:
            return True
        except PermissionError:  # Windows, while its holder lives
            return False
        stolen = grave.read_bytes() != data  # another's, made just now in the void one's place
        with contextlib.suppress(OSError):
            if stolen:
                os.link(grave, path)
            grave.unlink()
        return not stolen

    def _alive(self, data: bytes, file: BinaryIO) -> bool:
        says = _parse(data)
        seconds = says.get("seconds")
        seconds = seconds if isinstance(seconds, (int, float)) else self._seconds
        # A claim from the future is of a clock that was set back since.
        if abs(disk_time(self._folder) - os.fstat(file.fileno()).st_mtime) >= seconds:
            return False
        return says.get("machine") != self._machine or not _lock(file)

    def _release(self, path: Path) -> None:
        with self._guard:
            file = self._held.pop(path, None)
        if file is None:
            return
        with file, contextlib.suppress(OSError):
            if _same(path, file):
                # Before it is closed, or somebody would see a dead holder's claim.
                with contextlib.suppress(PermissionError):
                    path.unlink()
                    return
                file.close()  # Windows removes no open file
                path.unlink()


def _machine() -> str:
    """What processes have in common that can see each other's locks; new with every start."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def _same(path: Path, file: BinaryIO) -> bool:
    """Whether `path` is still the open `file`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _parse(data: bytes) -> dict[str, Any]:
    """A claim's content; a claim that is just being made has none yet."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lock(file: BinaryIO) -> bool:
    """Lock an open file unless another process has; the system unlocks it when its holder dies."""
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_on_windows(file: BinaryIO) -> bool:
    import msvcrt

    try:
        file.seek(2**30)  # far from what is read: Windows lets nobody read what is locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    finally:
        file.seek(0)
    return True
