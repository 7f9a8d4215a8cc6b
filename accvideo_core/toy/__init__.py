"""The paper's one-dimensional experiment (Figure 2): why a teacher should be asked only where it
has been.

    data -> network -> training -> useless points, students -> panels -> figure

Everything is in flow coordinates: t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

from .experiment import FIGURE, run_toy
from .settings import PRESETS, ToySettings

__all__ = ["FIGURE", "PRESETS", "ToySettings", "run_toy"]
