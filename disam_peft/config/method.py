"""Which gradient the optimizer gets: ERM, SAM or DISAM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer

from disam_peft.config.base import Config

NotNegative = Annotated[float, Field(ge=0)]


class LinearConfig(Config):
    """A setting that changes evenly over the steps of a run: ``{kind: linear, from: 0, to: 0.1}``."""

    kind: Literal["linear"] = "linear"
    start: NotNegative = Field(alias="from")
    """The value in the first step; it is written ``from``."""
    to: NotNegative
    """The value in the last step."""

    @model_serializer
    def _as_it_is_written(self) -> dict[str, Any]:
        return {"kind": self.kind, "from": self.start, "to": self.to}


Scheduled = NotNegative | LinearConfig
"""A number for the whole run, or one that changes over its steps."""


def value_in_step(setting: float | LinearConfig, step: int, steps: int) -> float:
    """The value of a setting in step ``step`` of ``steps``, which counts from 0."""
    if not isinstance(setting, LinearConfig):
        return setting
    share = step / (steps - 1) if steps > 1 else 0.0
    return (1 - share) * setting.start + share * setting.to


class MethodConfig(Config):
    """Which gradient the optimizer gets: that of the loss itself (``erm``), that at the perturbed weights (``sam``), or
    that at weights perturbed along L - lambda * Var(per-domain losses) (``disam``).

    ``rho`` and ``variance_weight`` may stand in every recipe, so that ``method.name=...`` alone swaps the method: erm
    uses neither, and sam only ``rho``. Both may change over the run: ``rho: {kind: linear, from: 0.1, to: 0.02}``.
    """

    name: Literal["erm", "sam", "disam"] = "disam"
    rho: Scheduled = 0.05
    """Radius of the perturbation: the Euclidean norm of the change of all trained weights together."""
    variance_weight: Scheduled = 0.1
    """lambda in L - lambda * Var(per-domain losses); the paper finds 0.1 to 0.7 stable."""
    variance_over: Literal["domains", "samples"] = "domains"
    """How domains count in the variance of disam: all alike (``domains``, the paper), or each by its number of images
    in the batch (``samples``, the code that its authors published). The same with ``train.sampling: balanced`` where
    the batch divides evenly."""
    adaptive: bool = False
    """ASAM's scale-invariant perturbation; needs a larger rho (0.5 to 2)."""

    def rho_in_step(self, step: int, steps: int) -> float:
        """The radius in step ``step`` of ``steps``, which counts from 0; 0 for erm."""
        return 0.0 if self.name == "erm" else value_in_step(self.rho, step, steps)

    def variance_weight_in_step(self, step: int, steps: int) -> float:
        """The lambda in step ``step`` of ``steps``, which counts from 0; 0 for erm and sam."""
        return value_in_step(self.variance_weight, step, steps) if self.name == "disam" else 0.0

    @property
    def changes(self) -> bool:
        """Whether a setting that the method uses changes over the run."""
        used = {"erm": [], "sam": [self.rho], "disam": [self.rho, self.variance_weight]}[self.name]
        return any(isinstance(setting, LinearConfig) for setting in used)

    @property
    def effective_rho(self) -> float:
        """The largest radius that the method uses; 0 for erm."""
        return 0.0 if self.name == "erm" else largest(self.rho)

    @property
    def effective_variance_weight(self) -> float:
        """The largest lambda that the method uses; 0 for erm and sam."""
        return largest(self.variance_weight) if self.name == "disam" else 0.0


def largest(setting: float | LinearConfig) -> float:
    """The largest value that a setting takes in a run."""
    return max(setting.start, setting.to) if isinstance(setting, LinearConfig) else setting
