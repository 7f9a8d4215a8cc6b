"""Names that come from outside (datasets, runs, students) and the paths they may reach."""

from __future__ import annotations

from pathlib import Path

from .errors import AccVideoError

MAX_LENGTH = 100
_FORBIDDEN = set('/\\:*?"<>|')
_NUMBERED = {f"{device}{digit}" for device in ("COM", "LPT") for digit in range(1, 10)}
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | _NUMBERED


def safe_name(name: str, what: str = "name") -> str:
    """`name` itself, after checking that it names one file or folder on every system.

    Raises AccVideoError for anything that could leave a folder or mean something else on another
    system: separators, drive letters, leading dots, control characters, reserved names.
    """
    fault = _fault(name)
    if fault:
        shown = ascii(name) if len(str(name)) <= MAX_LENGTH else ascii(str(name)[:30]) + "..."
        raise AccVideoError(
            f"{what} {shown} {fault}; use a plain name such as 'my_clips', without folders"
        )
    return name


def child(root: Path, name: str, what: str = "name") -> Path:
    """The path `root`/`name`, resolved, after checking that it stays inside `root`.

    Symbolic links are followed: one that leads out of `root` is refused.
    """
    base = root.resolve()
    path = base / safe_name(name, what)
    try:
        resolved = path.resolve()
        inside = resolved != base and resolved.is_relative_to(base)
    except (OSError, RuntimeError):  # a loop of links
        resolved, inside = path, False
    if not inside:
        raise AccVideoError(
            f"{what} {ascii(name)} leads out of {base} through a link; choose another name"
        )
    return resolved


def _fault(name: object) -> str | None:
    """What is wrong with a name, to be read after it, or None."""
    if not isinstance(name, str):
        return "is not text"
    if not name.strip():
        return "is empty"
    # 200 bytes leave room for the suffixes that files get, within the usual limit of 255.
    if len(name) > MAX_LENGTH or len(name.encode(errors="replace")) > 2 * MAX_LENGTH:
        return f"is too long (at most {MAX_LENGTH} characters)"
    if not name.isprintable():
        return "holds control or invisible characters"
    if name.startswith("."):
        return "begins with a dot"
    bad = sorted(_FORBIDDEN & set(name))
    if bad:
        return f"holds {' '.join(bad)}"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space or ends with a dot"
    if name.split(".")[0].strip().upper() in _RESERVED:
        return "is reserved on Windows"
    return None
