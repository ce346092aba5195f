"""Whether a method could act at all: DISAM whose weights are SAM's, a perturbation out of proportion, a loss at zero.

Counted on the device, and read once, at the end of the run. D domains.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import CombinedConfig, LpFtConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.disam.step_report import StepReport
from disam_peft.errors import Notice
from disam_peft.training.optimizers import learning_rate_factor

LEAST_SHIFT = 0.01
"""A smaller relative change of every domain's weight leaves SAM's perturbation as it is."""
WANTED_SHIFT = 0.1
"""Which lambda is proposed: the one that would have changed a weight by this share."""
ROUNDING = 1e-6
"""A change below may be one of rounding, and no lambda is computed from it."""
LEAST_RADIUS = 0.01
"""A smaller rho, as a share of the norm of the trained weights, hardly moves them."""
FIRST_RADIUS = 0.05
"""Which rho is proposed to begin a search at, as a share of that norm."""
PUBLISHED_RHO = 0.05
"""Of whole towers: the rho of ``recipes/paper``."""
ZERO_LOSS = 0.01
"""Nats. A mean loss below is that of samples which are classified with a probability of 0.99."""


class IdleMethod:
    """Notes, at most one of each kind in a run, that its method changed nothing, or had nothing to change.

    The domain weights: the largest ``|w_d - v_d| / |v_d|`` over all domains and all perturbed steps that were taken,
    where w_d are the weights in the ascent and v_d those without the variance, n_d/N for the mean over samples. It
    grows with lambda in proportion (nearly so in the entropic form), which makes the lambda that is proposed.

    The radius: the largest rho of the run against the Euclidean norm of all trained tensors together. With
    ``rho_factors`` a note is given where it holds for every gradient. An adaptive perturbation has a rho of another
    unit and is not judged. Whether rho is too small is not judged either where pretrained weights are trained
    (``full``, ``lp_ft``, ``ln_tuning``): their norm is large from the start, and a whole tower of the demo CLIP learned
    nothing any more with a rho of 0.6 % of it.

    The loss: the number of steps whose mean loss is below ``ZERO_LOSS``, for all methods.

    Args:
        num_domains: how many the training samples have.
        device: where the reports of the steps are.
    """

    def __init__(self, method: MethodConfig, config: TrainConfig, num_domains: int, device: torch.device) -> None:
        self._method, self._config = method, config
        self._has_variance = method.effective_variance_weight > 0 and num_domains > 1
        self._shift = torch.zeros((), device=device)
        self._steps_at_zero = torch.zeros((), dtype=torch.int64, device=device)
        self._radius_is_said = False

    def count(self, report: StepReport, *, is_perturbed: bool) -> None:
        """A step that was taken; its report is of the whole batch, over all micro-batches and ranks."""
        self._steps_at_zero = self._steps_at_zero + (report.loss < ZERO_LOSS)
        if is_perturbed and self._has_variance:
            plain_D = report.plain_domain_weights
            # 0 / 0 of an absent domain is no change; from a weight of 0 every change is a large one
            shift_D = ((report.domain_weights - plain_D).abs() / plain_D.abs()).nan_to_num(nan=0.0, posinf=torch.inf)
            self._shift = torch.maximum(self._shift, shift_D.amax().to(self._shift))

    def notice_at_the_start(self, params: Sequence[Tensor], adapter: Config | None) -> None:
        """Before the first step: a perturbation larger than the weights. Tensors that start at 0 tell nothing yet."""
        norm = _norm(params)
        if norm > 0:
            self._notice_large_radius(norm, "start", adapter)

    def notice_at_the_end(self, params: Sequence[Tensor], adapter: Config | None, steps: int) -> None:
        """
        Args:
            params: the trained tensors after the last step.
            adapter: the adapter whose tensors they are.
            steps: how many steps were taken.
        """
        if self._has_variance:
            self._notice_small_shift(float(self._shift))
        norm = _norm(params)
        self._notice_large_radius(norm, "end", adapter)
        if _has_new_tensors_alone(adapter):
            self._notice_small_radius(norm)
        at_zero = int(self._steps_at_zero)
        if at_zero > steps / 2:
            _say(
                f"the mean training loss was below {ZERO_LOSS:g} nats in {at_zero} of {steps} steps: there, nothing is "
                "left to learn, or for a perturbation to flatten. Take fewer train.steps, more images or more "
                "augmentation, an anchor (objective.anchors=logits) or label smoothing"
            )

    def _notice_small_shift(self, shift: float) -> None:
        if not 0 < shift < LEAST_SHIFT:  # 0: no step had a perturbation, or a second domain
            return
        method, factor = self._method, WANTED_SHIFT / shift
        if shift < ROUNDING:
            proposal = "Take"
        else:
            times = f"a method.variance_weight that is {factor:.2g} times as large"
            fixed = f"method.variance_weight={method.effective_variance_weight * factor:.2g}"
            more = times if method.changes_in("variance_weight") else fixed
            proposal = f"With {more} the largest change would be about {_percent(WANTED_SHIFT)}; or take"
        _say(
            f"in no step did the variance change a domain's weight in the ascent by more than {_percent(shift)} of it: "
            f"the run was {method.descent.upper()} for all practical purposes, at the same cost. {proposal} "
            f"method.name={method.descent}"
        )

    def _notice_large_radius(self, norm: float, when: str, adapter: Config | None) -> None:
        least = self._radius * min([1.0, *self._method.rho_factors.values()])
        if least > norm and not self._radius_is_said:
            self._radius_is_said = True
            first = _first_radius(norm) if _has_new_tensors_alone(adapter) else f"the published {PUBLISHED_RHO:g}"
            _say(
                f"method.rho={self._radius:g} is above the norm of all trained weights together, {norm:.3g} at the "
                f"{when} of the run: the perturbation leaves the neighbourhood in which the weights are worth "
                f"something. Begin a search by source validation at {first}"
            )

    def _notice_small_radius(self, norm: float) -> None:
        most = self._radius * max([1.0, *self._method.rho_factors.values()])
        if 0 < most < LEAST_RADIUS * norm:
            _say(
                f"method.rho={self._radius:g} is {_percent(self._radius / norm)} of the norm of all trained weights "
                f"together, {norm:.3g} at the end of the run: the perturbation hardly moves them. Begin a search by "
                f"source validation at {_first_radius(norm)}"
            )

    @cached_property
    def _radius(self) -> float:
        """The largest rho of all steps; 0 where nothing is perturbed, or the unit of rho is another one."""
        method, config = self._method, self._config
        if method.adaptive:
            return 0.0
        if not method.changes:
            return method.effective_rho
        rates = (learning_rate_factor(config, step) for step in range(config.steps))
        return max(method.rho_in_step(step, config.steps, rate) for step, rate in enumerate(rates))

    def state_dict(self) -> dict[str, Any]:
        return {"shift": self._shift, "steps_at_zero": self._steps_at_zero}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from there; None is the state of a version that did not count."""
        if state is None:  # its steps may have changed the weights, and nothing is said of what was not seen
            self._shift = torch.full_like(self._shift, torch.inf)
        else:
            self._shift = state["shift"].to(self._shift)
            self._steps_at_zero = state["steps_at_zero"].to(self._steps_at_zero)


def _has_new_tensors_alone(adapter: Config | None) -> bool:
    """Whether no trained tensor has the size of pretrained weights."""
    if isinstance(adapter, CombinedConfig):
        return all(map(_has_new_tensors_alone, adapter.parts))
    is_norms = isinstance(adapter, PeftAdapterConfig) and adapter.method == "ln_tuning"
    is_part = isinstance(adapter, LoraAdapterConfig) and adapter.keeps_start
    return not (isinstance(adapter, FullConfig | LpFtConfig) or is_norms or is_part)


def _norm(params: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([p.detach() for p in params]))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _first_radius(norm: float) -> str:
    return f"about method.rho={FIRST_RADIUS * norm:.2g} ({_percent(FIRST_RADIUS)} of the norm)"


def _say(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=4)
