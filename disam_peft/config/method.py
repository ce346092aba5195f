"""Which gradient the optimizer gets: ERM, SAM or DISAM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disam_peft.config.base import Config


class MethodConfig(Config):
    """Which gradient the optimizer gets: that of the loss itself (``erm``), that at the perturbed weights (``sam``), or
    that at weights perturbed along L - lambda * Var(per-domain losses) (``disam``).

    ``rho`` and ``variance_weight`` may stand in every recipe, so that ``method.name=...`` alone swaps the method: erm
    uses neither, and sam only ``rho``.
    """

    name: Literal["erm", "sam", "disam"] = "disam"
    rho: float = Field(default=0.05, ge=0)
    """Radius of the perturbation: the Euclidean norm of the change of all trained weights together."""
    variance_weight: float = Field(default=0.1, ge=0)
    """lambda in L - lambda * Var(per-domain losses); the paper finds 0.1 to 0.7 stable."""
    adaptive: bool = False
    """ASAM's scale-invariant perturbation; needs a larger rho (0.5 to 2)."""

    @property
    def effective_rho(self) -> float:
        """The radius that the method uses; 0 for erm."""
        return 0.0 if self.name == "erm" else self.rho

    @property
    def effective_variance_weight(self) -> float:
        """The lambda that the method uses; 0 for erm and sam."""
        return self.variance_weight if self.name == "disam" else 0.0
