"""The one exception a user is meant to read."""

from __future__ import annotations


class AccVideoError(ValueError):
    """What the user asked for cannot be done as asked.

    The message is one sentence that names what is wrong, the value that was given, and the remedy.
    Terminal and ComfyUI show it as it is, without a traceback; every other exception is a bug.
    """
