"""Which gradient the optimizer gets: ERM, SAM, GSAM or SAGM, the last three also on DISAM's ascent."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from disam_peft.config.base import Config
from disam_peft.config.schedules import NotNegative, ScheduleConfig, Scheduled, largest, value_in_step

PUBLISHED_ALPHA = {"sam": 0.0, "gsam": 0.4, "sagm": 0.001}
"""What ``alpha`` is where a recipe does not say."""


class MethodConfig(Config):
    """Which gradient the optimizer gets: that of the loss itself (``erm``), that at the perturbed weights (``sam``), or
    that at weights perturbed along L - lambda * Var(per-domain losses) (``disam``).

    ``gsam`` takes away a part of the gradient at the unperturbed weights, g1, and ``sagm`` takes the mean of both;
    ``disam_gsam`` and ``disam_sagm`` do the same on DISAM's ascent, whose gradient is g1 then.

    All settings may stand in every recipe, so that ``method.name=...`` alone swaps the method: erm uses none of them,
    and sam no variance. rho and lambda may change over the run: ``rho: {kind: linear, from: 0.1, to: 0.02}``.
    """

    name: Literal["erm", "sam", "disam", "gsam", "sagm", "disam_gsam", "disam_sagm"] = "disam"
    rho: Scheduled = 0.05
    """Radius of the perturbation: the Euclidean norm of the change of all trained weights together. A number, or one
    that changes over the steps: ``{kind: linear, from: 0.1, to: 0.02}``, ``{kind: cosine, from: 0.1, to: 0.02}``,
    ``{kind: follow_lr, max: 0.1, min: 0.02}`` (GSAM's rule), ``{kind: constant, value: 0.1, warmup_steps: 100}``."""
    variance_weight: Scheduled = 0.1
    """lambda in L - lambda * Var(per-domain losses); the paper finds 0.1 to 0.7 stable. In the entropic form it is tau.
    It may change over the steps like rho."""
    variance_over: Literal["domains", "samples"] = "domains"
    """How domains count in the variance of disam: all alike (``domains``, the paper), or each by its number of images
    in the batch (``samples``, the code that its authors published). The same with ``train.sampling: balanced`` where
    the batch divides evenly."""
    variance_scale: Literal["absolute", "relative"] = "absolute"
    """``relative``: lambda is divided by the mean loss of the batch, so that it means the same at the start of a run,
    where losses and their differences are large, and at its end."""
    variance_form: Literal["variance", "entropic"] = "variance"
    """``entropic``: in place of the variance, the domain weights of the ascent are a softmax of
    ``log(n_d/N) - tau L_d / mean loss``, so that none is ever negative. tau is ``variance_weight``; small values are
    those of a relative lambda of tau / 2 over samples."""
    adaptive: bool = False
    """ASAM's scale-invariant perturbation; needs a larger rho (0.5 to 2)."""
    alpha: NotNegative | None = None
    """Of gsam: how much of the part of g1 that is orthogonal to the gradient at the perturbed weights is taken away.
    Of sagm: how far the perturbation goes back along the gradient. Unset: 0.4 for gsam (the example of its authors'
    code, github.com/juntang-zhuang/GSAM), 0.001 for sagm (its authors' code for PACS, VLCS and TerraIncognita; for
    OfficeHome and DomainNet they have 0.0005). The adaptive form has the same."""
    start: float = Field(default=0.0, alias="from", ge=0, lt=1)
    """The share of the run after which weights are perturbed; it is written ``from``. ``from: 0.5`` perturbs in the
    last half alone. Before, a step takes the plain gradient, in one pass."""
    every: int = Field(default=1, ge=1)
    """Weights are perturbed in every n-th step alone, beginning with the first one that ``from`` allows. The others
    take the plain gradient, in one pass."""
    rho_factors: dict[str, NotNegative] = Field(default={})
    """Patterns of names of trained tensors -> by which rho is multiplied there, for example ``{"*lora_A*": 0.5}``. The
    norm of the gradient that the perturbation is divided by stays the one over all tensors. Each tensor may match one
    pattern; those that match none have 1. ``disam-peft train --dry-run --verbose`` lists the names."""

    @model_serializer(mode="wrap")
    def _as_it_is_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"from" if key == "start" else key: value for key, value in dump(self).items()}

    @property
    def has_variance(self) -> bool:
        """Whether the ascent has a variance term."""
        return self.name.startswith("disam")

    @property
    def descent(self) -> Literal["sam", "gsam", "sagm"]:
        """What becomes of the gradients of both passes, see ``DISAM``."""
        if self.name in ("gsam", "disam_gsam"):
            return "gsam"
        return "sagm" if self.name in ("sagm", "disam_sagm") else "sam"

    @property
    def effective_alpha(self) -> float:
        """The alpha that the method uses; 0 where it uses none."""
        published = PUBLISHED_ALPHA[self.descent]
        return published if self.alpha is None or self.descent == "sam" else self.alpha

    def first_perturbed_step(self, steps: int) -> int:
        """The first step that ``from`` allows to perturb, counted from 0; ``steps`` where it allows none."""
        # rounded: 0.07 of 100 steps are 7, although 0.07 * 100 is a little more
        return math.ceil(round(self.start * steps, 9))

    def rho_in_step(self, step: int, steps: int, rate: float = 1.0) -> float:
        """The radius in step ``step`` of ``steps``, which counts from 0; 0 for erm and in steps that perturb nothing.

        Args:
            rate: the learning rate of that step as a share of the highest one.
        """
        if self.name == "erm":
            return 0.0
        first = self.first_perturbed_step(steps)
        if step < first or (step - first) % self.every:
            return 0.0
        return value_in_step(self.rho, step, steps, rate)

    def variance_weight_in_step(self, step: int, steps: int, rate: float = 1.0) -> float:
        """The lambda in step ``step`` of ``steps``, which counts from 0; 0 for methods without a variance."""
        return value_in_step(self.variance_weight, step, steps, rate) if self.has_variance else 0.0

    def changes_in(self, setting: Literal["rho", "variance_weight"]) -> bool:
        """Whether the method uses this setting, and it changes over the run."""
        is_used = self.has_variance if setting == "variance_weight" else self.name != "erm"
        return is_used and isinstance(getattr(self, setting), ScheduleConfig)

    @property
    def changes(self) -> bool:
        """Whether what a step does changes over the run: its rho, its lambda, or whether it perturbs at all."""
        skips = self.name != "erm" and self.skips_steps
        return skips or self.changes_in("rho") or self.changes_in("variance_weight")

    @property
    def skips_steps(self) -> bool:
        """Whether ``from`` or ``every`` leave steps without a perturbation."""
        return self.start > 0 or self.every > 1

    @property
    def effective_rho(self) -> float:
        """The largest radius that the method uses; 0 for erm."""
        return 0.0 if self.name == "erm" else largest(self.rho)

    @property
    def effective_variance_weight(self) -> float:
        """The largest lambda that the method uses; 0 for methods without a variance."""
        return largest(self.variance_weight) if self.has_variance else 0.0
