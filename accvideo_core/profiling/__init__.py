"""Where the time of sampling one clip goes, beside what its device can do."""

from __future__ import annotations

from .peaks import Peaks, measure_peaks
from .profiler import profile
from .report import Part, Profile
from .run import Job

__all__ = ["Job", "Part", "Peaks", "Profile", "measure_peaks", "profile"]
