"""The methods beside AccVideo's own: what each lets one choose, in a record of its own.

A recipe that holds one of these records is a recipe of that method; `methods.py` has the rest of
it. Each point that a paper leaves open is a field, with our default and its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import AccVideoError


@dataclass(frozen=True, slots=True)
class SfvSpec:
    """SF-V (arXiv 2406.04324, version 2): adversarial training against real latents, one step."""

    title: ClassVar[str] = "SF-V"
    has_heads: ClassVar[bool] = True

    levels: int = 4
    """T_g: levels of the noise grid (Eq. 5). The student is trained at all but the lowest, each
    equally often, and sampled from the highest."""
    sigma_min: float = 0.002
    """Lowest level of the grid; not told, Stable Video Diffusion's own."""
    sigma_max: float = 700.0
    """Highest level, at which the state is taken to be noise alone, as sampling starts; not told,
    Stable Video Diffusion's own."""
    rho: float = 7.0
    """Exponent of the grid; not told, that of EDM and Stable Video Diffusion."""
    judged_levels: int = 1000
    """T_d: levels of the grid on which real and generated latents are noised for the heads."""
    p_mean: float = -1.0
    """P_mean of Eq. 7: mean of log sigma' at which the heads judge, the published one. At -2 the
    heads win at once, from 0 on they teach less and less."""
    p_std: float = -1.0
    """P_std of Eq. 7, the published one. Its sign cancels in the normalisation; the size counts."""
    recon_weight: float = 0.1
    """lambda of the reconstruction loss (Eq. 10), where `adv_weight` of the recipe is 1."""
    recon_norm: str = "mean"
    """What the pseudo-Huber loss (Eq. 9) is taken of: the root of the "mean" square, so that one
    lambda suits every size, or the norm as it is written ("sum"), which in a clip of 768 x 448
    pixels would be 500 times as large and drown the other term. The paper does not say."""
    huber_c: float = 1e-3
    """c of Eq. 9; not told. A small one makes it the distance itself but at its lowest point."""
    head_noise: bool = True
    """Tell the heads sigma' beside prompt and frame: Sec. 3.3 names image and sigma', Fig. 3 image
    and frame, and here heads get all three."""

    def __post_init__(self) -> None:
        _at_least(self, "sf_v", 2, "levels", "judged_levels")
        _positive(self, "sf_v", "sigma_min", "sigma_max", "rho", "huber_c")
        _at_least(self, "sf_v", 0, "recon_weight")
        if not self.sigma_min < self.sigma_max:
            raise AccVideoError(
                f"recipe.sf_v.sigma_min is {self.sigma_min}; it must be below sigma_max "
                f"{self.sigma_max}"
            )
        if not abs(self.p_std) > 0:
            raise AccVideoError("recipe.sf_v.p_std is 0; a deviation of log sigma' is 1 or -1")
        if self.recon_norm not in ("mean", "sum"):
            raise AccVideoError(
                f"recipe.sf_v.recon_norm is {self.recon_norm!r}; choose one of mean, sum"
            )


@dataclass(frozen=True, slots=True)
class LaddSpec:
    """LADD (arXiv 2403.12015), as SF-V compares with it: with SF-V's heads."""

    title: ClassVar[str] = "LADD"
    has_heads: ClassVar[bool] = True

    mean: float = 1.0
    """m of the logit-normal times at which the heads judge; larger ones look at composition."""
    std: float = 1.0
    """s of that distribution."""
    head_noise: bool = True
    """Tell the heads the time at which they judge."""

    def __post_init__(self) -> None:
        _positive(self, "ladd", "std")


@dataclass(frozen=True, slots=True)
class UfogenSpec:
    """UFOGen (arXiv 2311.09257), as SF-V compares with it: with SF-V's heads."""

    title: ClassVar[str] = "UFOGen"
    has_heads: ClassVar[bool] = True

    recon_weight: float = 1.0
    """gamma of the squared distance to the clean latents; the paper's weights per time are not
    told."""
    head_noise: bool = True
    """Tell the heads the time at which they judge, as t - 1 is an argument of UFOGen's."""

    def __post_init__(self) -> None:
        _at_least(self, "ufogen", 0, "recon_weight")


@dataclass(frozen=True, slots=True)
class ConsistencySpec:
    """Latent consistency distillation in AnimateLCM's setting (arXiv 2402.00769, 2310.04378)."""

    title: ClassVar[str] = "consistency"
    has_heads: ClassVar[bool] = False

    steps: int = 1000
    """N: steps of the family's time grid on which neighbouring points must agree."""
    skip: int = 20
    """k: grid steps that the teacher's solver takes at once. 20 of 1000 is LCM's and AnimateLCM's
    50-step grid; more learns faster and less exactly."""
    cfg: float | None = None
    """Classifier-free guidance of the teacher's step; None takes the dataset's own, of real videos
    the family's official one. LCM draws it and tells the student; ours has no input for it."""
    huber_c: float = 1e-3
    """c of the pseudo-Huber distance, taken per element as in LCM's code."""

    def __post_init__(self) -> None:
        _at_least(self, "consistency", 1, "steps", "skip")
        _positive(self, "consistency", "huber_c")
        if self.skip > self.steps:
            raise AccVideoError(
                f"recipe.consistency.skip is {self.skip}, more than its {self.steps} steps; "
                "choose fewer"
            )
        if self.cfg is not None and not self.cfg >= 1:
            raise AccVideoError(
                f"recipe.consistency.cfg is {self.cfg}; it must be at least 1, which is no guidance"
            )


Spec = SfvSpec | LaddSpec | UfogenSpec | ConsistencySpec
SPECS: dict[str, type[Spec]] = {
    "sf_v": SfvSpec,
    "ladd": LaddSpec,
    "ufogen": UfogenSpec,
    "consistency": ConsistencySpec,
}
"""By the recipe's field."""


def _at_least(spec: object, called: str, low: float, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not value >= low:
            raise AccVideoError(f"recipe.{called}.{name} is {value}; it must be at least {low}")


def _positive(spec: object, called: str, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if not 0 < value < float("inf"):
            raise AccVideoError(f"recipe.{called}.{name} is {value}; it must be positive")
