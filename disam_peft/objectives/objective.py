"""The objective of a recipe, put together from its loss, its mean, its penalties and its anchors.

Shapes in this file: B samples of a micro-batch, C classes, E embedding width, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.common.device import to_device
from disam_peft.config.anchors import (
    ClassFeaturesAnchorConfig,
    ImageFeaturesAnchorConfig,
    LogitsAnchorConfig,
    WeightsAnchorConfig,
)
from disam_peft.config.base import Config
from disam_peft.config.losses import (
    ContrastiveConfig,
    CrossEntropyConfig,
    FocalConfig,
    MarginSoftmaxConfig,
    SigmoidConfig,
)
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import CoralConfig, FishrConfig, GroupDROConfig, IRMConfig, MMDConfig, VRexConfig
from disam_peft.disam.domain_objective import DomainObjective, DomainsOfSamples, Forward, Valued
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.errors import UserError
from disam_peft.objectives.anchors.adapter_term import AdapterTerm
from disam_peft.objectives.anchors.base import Anchor, ModelAnchor, SampleAnchor
from disam_peft.objectives.anchors.feature_anchors import ClassFeaturesAnchor, ImageFeaturesAnchor
from disam_peft.objectives.anchors.logits_anchor import LogitsAnchor
from disam_peft.objectives.anchors.weights_anchor import WeightsAnchor
from disam_peft.objectives.base import Loss, Outputs, Penalty, Reference, StepBatch, domain_mean_weights, mixed
from disam_peft.objectives.contrastive import Contrastive
from disam_peft.objectives.coral import Coral
from disam_peft.objectives.cross_entropy import CrossEntropy, cross_entropy
from disam_peft.objectives.fishr import Fishr
from disam_peft.objectives.focal import Focal
from disam_peft.objectives.group_dro import GroupDRO
from disam_peft.objectives.irm import IRM
from disam_peft.objectives.margin_softmax import MarginSoftmax
from disam_peft.objectives.mmd import MMD
from disam_peft.objectives.no_effect import NoEffect
from disam_peft.objectives.sigmoid import Sigmoid
from disam_peft.objectives.vrex import VRex

LOSSES: dict[type[Config], Callable[[Any], Loss]] = {
    CrossEntropyConfig: CrossEntropy,
    FocalConfig: Focal,
    MarginSoftmaxConfig: MarginSoftmax,
    SigmoidConfig: Sigmoid,
    ContrastiveConfig: Contrastive,
}
PENALTIES: dict[type[Config], Callable[[Any], Penalty]] = {
    CoralConfig: Coral,
    FishrConfig: Fishr,
    GroupDROConfig: GroupDRO,
    IRMConfig: IRM,
    MMDConfig: MMD,
    VRexConfig: VRex,
}
ANCHORS: dict[type[Config], Callable[[Any], Anchor]] = {
    LogitsAnchorConfig: LogitsAnchor,
    ImageFeaturesAnchorConfig: ImageFeaturesAnchor,
    ClassFeaturesAnchorConfig: ClassFeaturesAnchor,
    WeightsAnchorConfig: WeightsAnchor,
}


class Objective(DomainObjective):
    """``mean of the losses + sum of weight * penalty + sum of weight * anchor``, the adapter's term, and their state.

    The distances of a ``SampleAnchor`` are part of the losses. That of a ``ModelAnchor`` is a statistic: its sum over
    the samples divided by their number is the distance itself, so it counts once, however the batch is divided.

    Args:
        config: of the recipe; unset: the plain mean of the cross entropy.
        penalties: built ones in the place of the config's, for penalties of one's own.
        adapter_term: what the adapter adds to the loss, see ``adapters.base.Adapter.own_term``.
        class_weight_C: factor of the loss of each sample by its class, see ``class_weights.class_weights``; unset: all
            count alike.
        seed: of what a loss draws for each step.

    Raises:
        ValueError: the config has class weights, and none are given.
    """

    def __init__(
        self,
        config: ObjectiveConfig | None = None,
        *,
        penalties: Sequence[Penalty] | None = None,
        adapter_term: AdapterTerm | None = None,
        class_weight_C: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        config = config or ObjectiveConfig()
        self._loss = LOSSES[type(config.loss)](config.loss)
        self._class_weight_C, self._seed = class_weight_C, seed
        weights: Any = getattr(config.loss, "class_weights", "none")
        if class_weight_C is None and weights != "none":
            raise ValueError(
                f"class_weights={weights!r} needs the training labels; give "
                "class_weight_C=class_weights(config.loss, labels, class_names)"
            )
        self._mean_over = config.effective_mean_over
        built = [PENALTIES[type(penalty)](penalty) for penalty in config.penalties]
        self.penalties = built if penalties is None else list(penalties)
        anchors = [ANCHORS[type(anchor)](anchor) for anchor in config.anchors]
        anchors += [] if adapter_term is None else [adapter_term]
        self._sample_anchors = [anchor for anchor in anchors if isinstance(anchor, SampleAnchor)]
        self._model_anchors = [anchor for anchor in anchors if isinstance(anchor, ModelAnchor)]
        self._steps_begun = 0
        self._no_effect = NoEffect()
        of_penalties = any(penalty.num_statistics > 0 for penalty in self.penalties)
        self._loss_has_sums = self._loss.num_statistics > 0
        self.has_statistics = self._loss_has_sums or of_penalties or bool(self._model_anchors)
        self.needs_features = (
            of_penalties or self._loss.needs_features or any(anchor.needs_features for anchor in self._sample_anchors)
        )
        """Whether something reads the image features, which a training loop normalises for nobody else."""
        self.needs_zero_shot = any(anchor.needs_zero_shot for anchor in anchors)
        """Whether something reads what zero-shot classification makes of the same images."""
        self.needs_captions = self._loss.needs_captions
        """Whether ``begin_batch`` must be called, and ``forward`` be given the features of every prompt."""

    def begin_batch(
        self,
        labels_B: Tensor,
        *,
        num_classes: int,
        templates: int = 1,
        place_B: Tensor | None = None,
        num_places: int | None = None,
        mask_B: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """To be called once in each step, before its passes and on every process, where ``needs_captions``.

        Args:
            labels_B: classes of the samples of this process, over all its micro-batches.
            num_classes, templates: how many classes there are, and captions of each.
            place_B, num_places: see ``Outputs``; may be left out where this is the whole batch.
            mask_B: the masks of the step, if it has any.
            process_group: the processes that share the batch; unset: all.
        """
        if place_B is None:
            place_B, num_places = torch.arange(len(labels_B), device=labels_B.device), len(labels_B)
        elif num_places is None:
            raise ValueError("place_B needs num_places, the number of samples in the whole batch")
        self._loss.begin_batch(
            StepBatch(
                labels_B,
                place_B,
                num_places,
                num_classes,
                templates,
                step=self._steps_begun,
                seed=self._seed,
                mask_B=mask_B,
                process_group=process_group,
            )
        )

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
        caption_features_NE: Tensor | None = None,
        other_labels_B: Tensor | None = None,
        share_B: Tensor | None = None,
        reference: Reference | None = None,
        head_bias_C: Tensor | None = None,
    ) -> Forward:
        """The losses of a forward pass, and what the penalties need of it, for ``DISAM.backward``. See ``Outputs``."""
        logits_BC = logits_BC if logits_BC.dtype.itemsize >= 4 else logits_BC.float()
        outputs = Outputs(logits_BC, labels_B, features_BE, class_features_CE, scale, bias, place_B, num_places)
        outputs = replace(
            outputs,
            head_bias_C=head_bias_C,
            caption_features_NE=caption_features_NE,
            other_labels_B=other_labels_B,
            share_B=share_B,
            reference=reference,
        )
        # runs with different losses are compared by the plain cross entropy
        is_plain = self._loss.is_cross_entropy and self._class_weight_C is None and not self._sample_anchors
        reported_B = None if is_plain else mixed(_plain_cross_entropy, outputs)
        loss_B = mixed(self._losses, outputs)
        terms = []
        for anchor in self._sample_anchors:
            distance_B = self._no_effect.of_anchor(anchor, anchor(outputs))
            loss_B = loss_B + anchor.config.weight * distance_B
            terms.append(distance_B.detach())
        return Forward(loss_B, reported_B, outputs if self.has_statistics else None, terms)

    def remember_start(self, params: Sequence[Tensor]) -> None:
        """The trained tensors as they are now are where the run starts. Call it before the first step, and before
        ``load_state_dict`` where the run goes on."""
        for anchor in self._model_anchors:
            anchor.remember_start(params)

    def _losses(self, outputs: Outputs) -> Tensor:
        """The losses (B,), weighed by their classes. Counts of samples stay what they are."""
        loss_B = self._loss(outputs)
        if self._class_weight_C is None:
            return loss_B
        if self._class_weight_C.device != loss_B.device:
            self._class_weight_C = to_device(self._class_weight_C, loss_B.device)
        return loss_B * self._class_weight_C[outputs.labels_B].to(loss_B.dtype)

    # -- a function of sums over domains ---------------------------------------------------------------------

    def mean_weights(self, count_D: Tensor) -> Tensor:
        return super().mean_weights(count_D) if self._mean_over == "samples" else domain_mean_weights(count_D)

    def mean(self, sums: DomainSums) -> Tensor:
        return sums.mean if self._mean_over == "samples" else sums.over_domains(sums.mean_of(sums.sum_D))

    def linear_weights(self, count_D: Tensor, *, in_ascent: bool) -> Sequence[Tensor | None]:
        # those of the loss and the penalties are no linear terms
        num_others = self._loss.num_statistics + sum(penalty.num_statistics for penalty in self.penalties)
        of_anchors = [
            anchor.config.weight / count_D.sum() if anchor.config.in_ascent or not in_ascent else None
            for anchor in self._model_anchors
        ]
        return [*[None] * num_others, *of_anchors]

    def has_penalty(self, *, in_ascent: bool) -> bool:
        return self._loss_has_sums or any(penalty.config.in_ascent or not in_ascent for penalty in self.penalties)

    def penalty(self, sums: DomainSums, *, in_ascent: bool, values: Sequence[Tensor] | None = None) -> Tensor:
        """See ``DomainObjective.penalty``; ``values`` of all penalties, where they are known."""
        step = max(0, self._steps_begun - 1)
        total = self._loss.value(self._with_sums_of_loss(sums)) if self._loss_has_sums else torch.zeros_like(sums.total)
        for number, (penalty, of_penalty) in enumerate(self._with_sums(sums)):
            weight = penalty.weight(step)
            if weight == 0 or (in_ascent and not penalty.config.in_ascent):
                continue
            value = penalty.value(of_penalty) if values is None else values[number]
            total = total + weight * (value - self.mean(sums) if penalty.replaces_mean else value)
        return total

    @torch.no_grad()
    def valued(self, sums: DomainSums) -> Valued:
        """``value``, and the terms by their kinds: ``value`` is the mean of the losses without anchors, plus each term
        times its weight. (A penalty that replaces the mean, groupdro, stands in its place where its weight is 1.)"""
        found = list(self._with_sums(sums))
        values = [penalty.value(of_penalty) for penalty, of_penalty in found]
        value = self.linear_value(sums)
        if self.has_penalty(in_ascent=False):
            value = value + self.penalty(sums, in_ascent=False, values=values)
        kinds = [getattr(penalty.config, "kind", type(penalty).__name__) for penalty in self.penalties]
        terms = dict(zip(kinds, values, strict=True))
        for anchor, sum_D in zip(self._sample_anchors, sums.terms, strict=len(sums.terms) > 0):
            terms[anchor.config.kind] = self.mean(replace(sums, sum_D=sum_D))
        first = len(sums.statistics) - len(self._model_anchors)
        for number, model_anchor in enumerate(self._model_anchors):
            terms[model_anchor.config.kind] = sums.statistics[first + number].sum() / sums.total
        of_domains = {
            f"{kind}_{name}": value_D
            for kind, (penalty, of_penalty) in zip(kinds, found, strict=True)
            for name, value_D in penalty.domain_values(of_penalty).items()
        }
        return Valued(value, terms, of_domains)

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        found = list(self._loss.statistics(outputs, domains))
        for penalty in self.penalties:
            statistics = tuple(penalty.statistics(outputs, domains))
            if len(statistics) != penalty.num_statistics:
                raise ValueError(
                    f"{type(penalty).__name__}.statistics gave {len(statistics)} tensors, but num_statistics is "
                    f"{penalty.num_statistics}; both must agree"
                )
            self._no_effect.of_penalty(penalty, statistics)
            found += statistics
        for anchor in self._model_anchors:
            distance = self._no_effect.of_anchor(anchor, anchor.value(outputs))
            found.append(domains.sums(distance.expand(len(outputs.labels_B))))
        return found

    def begin_step(self, sums: DomainSums) -> None:
        with torch.no_grad():
            for penalty, of_penalty in self._with_sums(sums):
                penalty.begin_step(of_penalty)
        self._steps_begun += 1

    def _with_sums_of_loss(self, sums: DomainSums) -> DomainSums:
        return replace(sums, statistics=sums.statistics[: self._loss.num_statistics])

    def _with_sums(self, sums: DomainSums) -> Iterator[tuple[Penalty, DomainSums]]:
        """Each penalty with the sums that it may see: its own statistics and those of the losses."""
        start = self._loss.num_statistics
        for penalty in self.penalties:
            stop = start + penalty.num_statistics
            yield penalty, replace(sums, statistics=sums.statistics[start:stop])
            start = stop

    # -- state -----------------------------------------------------------------------------------------------

    def prepare(self, train_count_A: Tensor) -> None:
        """Tell the penalties once, before training, how many samples the domains 0, 1, ... have in the training set."""
        for penalty in self.penalties:
            penalty.prepare(train_count_A.to(torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run could not know: how many steps have begun, and the state of each term."""
        states = {type(penalty).__name__: dict(penalty.state_dict()) for penalty in self.penalties}
        of_anchors = {anchor.config.kind: dict(anchor.state_dict()) for anchor in self._model_anchors}
        return {"steps_begun": self._steps_begun, "penalties": states, "anchors": of_anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            UserError: it is the state of an objective with other penalties or anchors.
        """
        here, saved = [type(penalty).__name__ for penalty in self.penalties], list(state["penalties"])
        if here != saved:
            raise UserError(f"its penalties differ (here {here}; saved {saved})")
        of_anchors = state.get("anchors", {})  # 0.1 had none
        here, saved = [anchor.config.kind for anchor in self._model_anchors], list(of_anchors)
        if here != saved:
            raise UserError(f"its anchors differ (here {here}; saved {saved})")
        for anchor in self._model_anchors:
            anchor.load_state_dict(of_anchors[anchor.config.kind])
        self._steps_begun = int(state["steps_begun"])
        for penalty in self.penalties:
            penalty.load_state_dict(state["penalties"][type(penalty).__name__])


def _plain_cross_entropy(outputs: Outputs) -> Tensor:
    return cross_entropy(outputs.logits_BC.detach(), outputs.labels_B)
