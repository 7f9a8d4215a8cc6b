"""AccVideo: record a video diffusion model's trajectories and distil a few-step student from them.

This package is the library under the ComfyUI nodes. It knows nothing of ComfyUI, and importing it
loads neither torch nor diffusers: every sub-module brings in what it needs when it is asked for.
"""

from __future__ import annotations

__version__ = "0.1.0"
