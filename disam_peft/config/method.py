"""Which gradient the optimizer gets: ERM, SAM or DISAM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disam_peft.config.base import Config


class MethodConfig(Config):
    """The gradient that the optimizer gets. So that methods can be swapped by ``method.name=...`` alone, ``rho`` and
    ``variance_weight`` may stand in any recipe; erm uses neither, sam only the first."""

    name: Literal["erm", "sam", "disam"] = "disam"
    rho: float = Field(default=0.05, ge=0)
    """Radius of the perturbation, in units of the norm of the trained weights."""
    variance_weight: float = Field(default=0.1, ge=0)
    """lambda in L - lambda * Var(per-domain losses); the paper finds 0.1 to 0.7 stable."""
    adaptive: bool = False
    """ASAM's scale-invariant perturbation; needs a larger rho (0.5 to 2)."""

    @property
    def effective_rho(self) -> float:
        return 0.0 if self.name == "erm" else self.rho

    @property
    def effective_variance_weight(self) -> float:
        return self.variance_weight if self.name == "disam" else 0.0
