"""The objective of a recipe, put together from its loss, its mean and its penalties.

Shapes in this file: B samples of a micro-batch, C classes, E embedding width, D domains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disam_peft.config.base import Config
from disam_peft.config.objective import CrossEntropyConfig, ObjectiveConfig, VRexConfig
from disam_peft.disam.domain_objective import DomainObjective, DomainsOfSamples, Forward
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.errors import UserError
from disam_peft.objectives.base import Loss, Outputs, Penalty, domain_mean_weights, mixed
from disam_peft.objectives.cross_entropy import CrossEntropy, cross_entropy
from disam_peft.objectives.vrex import VRex

LOSSES: dict[type[Config], Callable[[Any], Loss]] = {CrossEntropyConfig: CrossEntropy}
PENALTIES: dict[type[Config], Callable[[Any], Penalty]] = {VRexConfig: VRex}


class Objective(DomainObjective):
    """``mean of the losses + sum of weight * penalty``, and the state of the penalties.

    Args:
        config: of the recipe; unset: the plain mean of the cross entropy.
        penalties: built ones in the place of the config's, for penalties of one's own.
    """

    def __init__(self, config: ObjectiveConfig | None = None, *, penalties: Sequence[Penalty] | None = None) -> None:
        config = config or ObjectiveConfig()
        self._loss = LOSSES[type(config.loss)](config.loss)
        self._mean_over = config.effective_mean_over
        built = [PENALTIES[type(penalty)](penalty) for penalty in config.penalties]
        self.penalties = built if penalties is None else list(penalties)
        self._steps_begun, self._warned = 0, False
        self.has_statistics = any(penalty.num_statistics > 0 for penalty in self.penalties)
        self.needs_features = self.has_statistics or self._loss.needs_features
        """Whether something reads the image features, which a training loop normalises for nobody else."""

    def forward(
        self,
        logits_BC: Tensor,
        labels_B: Tensor,
        features_BE: Tensor | None = None,
        *,
        class_features_CE: Tensor | None = None,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        place_B: Tensor | None = None,
        num_places: int | None = None,
        other_labels_B: Tensor | None = None,
        share_B: Tensor | None = None,
    ) -> Forward:
        """The losses of a forward pass, and what the penalties need of it, for ``DISAM.backward``. See ``Outputs``."""
        logits_BC = logits_BC if logits_BC.dtype.itemsize >= 4 else logits_BC.float()
        outputs = Outputs(logits_BC, labels_B, features_BE, class_features_CE, scale, bias, place_B, num_places)
        outputs = replace(outputs, other_labels_B=other_labels_B, share_B=share_B)
        # runs with different losses are compared by the plain cross entropy
        reported_B = None if self._loss.is_cross_entropy else mixed(_plain_cross_entropy, outputs)
        return Forward(mixed(self._loss, outputs), reported_B, outputs if self.has_statistics else None)

    # -- a function of sums over domains ---------------------------------------------------------------------

    def mean_weights(self, count_D: Tensor) -> Tensor:
        return super().mean_weights(count_D) if self._mean_over == "samples" else domain_mean_weights(count_D)

    def mean(self, sums: DomainSums) -> Tensor:
        return sums.mean if self._mean_over == "samples" else sums.over_domains(sums.mean_of(sums.sum_D))

    def has_penalty(self, *, in_ascent: bool) -> bool:
        return any(penalty.config.in_ascent or not in_ascent for penalty in self.penalties)

    def penalty(self, sums: DomainSums, *, in_ascent: bool) -> Tensor:
        step = max(0, self._steps_begun - 1)
        terms = [
            penalty.weight(step) * penalty.value(of_penalty)
            for penalty, of_penalty in self._with_sums(sums)
            if penalty.config.in_ascent or not in_ascent
        ]
        return torch.stack(terms).sum()

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        found: list[Tensor] = []
        for penalty in self.penalties:
            statistics = tuple(penalty.statistics(outputs, domains))
            if len(statistics) != penalty.num_statistics:
                raise ValueError(
                    f"{type(penalty).__name__}.statistics gave {len(statistics)} tensors, but num_statistics is "
                    f"{penalty.num_statistics}; both must agree"
                )
            if torch.is_grad_enabled() and statistics and not any(tensor.requires_grad for tensor in statistics):
                self._warn_of_no_effect(penalty)
            found += statistics
        return found

    def _warn_of_no_effect(self, penalty: Penalty) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the penalty {type(penalty).__name__} depends on nothing that is trained here (with this adapter the "
                "image features are frozen), so it has no effect; remove it, or train an adapter of the image tower",
                stacklevel=2,
            )

    def begin_step(self, sums: DomainSums) -> None:
        with torch.no_grad():
            for penalty, of_penalty in self._with_sums(sums):
                penalty.begin_step(of_penalty)
        self._steps_begun += 1

    def _with_sums(self, sums: DomainSums) -> Iterator[tuple[Penalty, DomainSums]]:
        """Each penalty with the sums that it may see: its own statistics and those of the losses."""
        start = 0
        for penalty in self.penalties:
            stop = start + penalty.num_statistics
            yield penalty, replace(sums, statistics=sums.statistics[start:stop])
            start = stop

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from step to step: how many steps have begun, and the state of each penalty."""
        states = {type(penalty).__name__: dict(penalty.state_dict()) for penalty in self.penalties}
        return {"steps_begun": self._steps_begun, "penalties": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            UserError: it is the state of an objective with other penalties.
        """
        here, saved = [type(penalty).__name__ for penalty in self.penalties], list(state["penalties"])
        if here != saved:
            raise UserError(f"its penalties differ (here {here}; saved {saved})")
        self._steps_begun = int(state["steps_begun"])
        for penalty in self.penalties:
            penalty.load_state_dict(state["penalties"][type(penalty).__name__])


def _plain_cross_entropy(outputs: Outputs) -> Tensor:
    return cross_entropy(outputs.logits_BC.detach(), outputs.labels_B)


def build_objective(config: ObjectiveConfig, source_domains: Sequence[str], steps: int) -> Objective:
    """The objective of a run, with a warning for each setting that has no effect in it.

    Args:
        source_domains: those that the training data holds.
        steps: of the run.
    """
    objective = Objective(config)
    for penalty, built in zip(config.penalties, objective.penalties, strict=True):
        if len(source_domains) == 1:
            warnings.warn(
                f"objective.penalties has {penalty.kind!r}, but there is one source domain ({source_domains[0]!r}): a "
                "penalty that compares domains is 0 then; add a domain, or remove the penalty",
                stacklevel=2,
            )
        if built.weight(steps - 1) != penalty.weight:
            warnings.warn(
                f"the penalty {penalty.kind!r} still has the weight {built.weight(steps - 1):g} in the last of "
                f"train.steps={steps} steps, and never weight={penalty.weight:g}; lower its anneal, or train longer",
                stacklevel=2,
            )
    return objective
