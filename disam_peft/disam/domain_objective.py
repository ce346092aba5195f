"""What a step descends: the mean loss, or more, as a function of sums over the samples of each domain.

Shapes in this file: B samples of a micro-batch, D domains, F and G features, P places in the whole batch; ``...`` are a
statistic's own dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from disam_peft.disam.domain_sums import DomainSums, accumulation_dtype


@dataclass(frozen=True)
class Forward:
    """The result of a forward pass, where a step needs more than the losses.

    Attributes:
        loss_B: the loss of each sample that the step descends, (B,), with a graph.
        reported_B: the loss of each sample that the report shows, (B,); its graph is not used. Unset: ``loss_B``. So
            runs with different losses can be compared by one number.
        outputs: what ``DomainObjective.statistics`` reads, for example the features with their graph.
        terms: parts of ``loss_B`` that ``DomainObjective.valued`` shows one by one, (B,) each; their graph is not used.
            Always as many.
    """

    loss_B: Tensor
    reported_B: Tensor | None = None
    outputs: Any = None
    terms: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Valued:
    """An objective in numbers, at the weights of one pass.

    Attributes:
        value: J, shape ().
        terms: what is added to the loss, by name, without its weight; shape () each.
        domain_terms: numbers of each domain that belong to a term, by name; (D,) each.
    """

    value: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    domain_terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DomainsOfSamples:
    """Adds up values over the samples of each domain of a micro-batch. The sums keep their graph.

    The sums are of the accumulation dtype (float64 where there is one): a covariance that is computed from sums would
    otherwise lose its digits.

    Attributes:
        index_B: position of each sample's domain among the D domains.
        num_domains: D.
        mask_B: samples where it is False count nowhere and their values are not read; unset: all samples count.
    """

    index_B: Tensor
    num_domains: int
    mask_B: Tensor | None = None

    def sums(self, value_B: Tensor) -> Tensor:
        """``sum of value_i over the samples i of domain d``: (B, ...) to (D, ...)."""
        value_B = self._counted(value_B)
        return value_B.new_zeros(self.num_domains, *value_B.shape[1:]).index_add(0, self.index_B, value_B)

    def outer_sums(self, value_BF: Tensor, other_BG: Tensor | None = None) -> Tensor:
        """``sum of value_i other_i^T over the samples i of domain d``: (B, F) and (B, G) to (D, F, G).

        Without ``other_BG`` each is multiplied by itself.
        """
        value_BF = self._counted(value_BF)
        other_BG = value_BF if other_BG is None else self._counted(other_BG)
        ids_D1 = torch.arange(self.num_domains, device=self.index_B.device)[:, None]
        of_domain_DB1 = (ids_D1 == self.index_B).to(value_BF.dtype)[..., None]
        return (of_domain_DB1 * value_BF).mT @ other_BG

    def in_places(self, value_B: Tensor, place_B: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
        """The values one by one, each in a row of its own: what is no function of sums over domains.

        Args:
            value_B: (B, ...).
            place_B: below ``num_places``; no two samples of the whole batch, over all micro-batches and ranks, have the
                same.

        Returns:
            The values (P, ...), 0 where this micro-batch has no sample, and (D, P): 1 where the sample in place p is of
            domain d. Both add up over micro-batches and ranks.
        """
        place_B = place_B.to(self.index_B.device)
        placed = replace(self, index_B=place_B, num_domains=num_places).sums(value_B)
        cells = replace(self, index_B=self.index_B * num_places + place_B, num_domains=self.num_domains * num_places)
        taken = cells.sums(torch.ones(len(place_B), device=place_B.device))
        return placed, taken.view(self.num_domains, num_places)

    def _counted(self, value_B: Tensor) -> Tensor:
        if value_B.shape[:1] != self.index_B.shape:
            raise ValueError(
                f"a statistic is summed over {len(self.index_B)} samples, but has shape {tuple(value_B.shape)}; its "
                "first dimension must be the samples"
            )
        value_B = value_B.to(self.index_B.device, accumulation_dtype(self.index_B.device))
        if self.mask_B is None:
            return value_B
        return value_B.where(self.mask_B.view(-1, *[1] * (value_B.ndim - 1)), 0.0)


class DomainObjective:
    """The mean loss over all samples; the base of every other objective.

    An objective is ``J = sum_d m_d S_d + sum_d <a_d, T_d> + P(S, T, n)``. S_d are the sums of the losses over the
    samples of domain d, and n_d is their number. T_d are further sums, the statistics. The weights m_d of the mean and
    a_d of the statistics follow from the n_d alone. The penalty P is any differentiable function of the S_d, T_d and
    n_d. All sums are those of the whole effective batch, over all micro-batches and ranks, so the gradient of J is
    exact however the batch is divided: the step collects the sums, takes ``G_d = dJ/dS_d`` (and ``dJ/dT_d``) as plain
    numbers, and runs the backward pass of the surrogate ``sum_d <G_d, the part of S_d in this micro-batch>``. Without a
    penalty these numbers follow from the counts, and no sums have to be collected first.

    A subclass overrides what it needs: ``mean`` together with ``mean_weights`` for another mean; ``has_penalty`` and
    ``penalty`` for a penalty; ``has_statistics`` and ``statistics`` where more than the losses is summed up, with
    ``linear_weights`` where J is linear in it.
    """

    has_statistics: bool = False
    """Whether ``statistics`` gives any; the mode ``per_domain`` is not possible then."""

    def mean_weights(self, count_D: Tensor) -> Tensor:
        """m_d, (D,) or () where all are equal; 0 or a finite number for absent domains."""
        return 1.0 / count_D.sum()

    def mean(self, sums: DomainSums) -> Tensor:
        """``sum_d m_d S_d``, shape ()."""
        return sums.mean

    def linear_weights(self, count_D: Tensor, *, in_ascent: bool) -> Sequence[Tensor | None]:
        """a_d of each statistic, (D, ...) or () where all are equal; None for a statistic that the penalty alone uses.

        Args:
            in_ascent: asks for the objective that the perturbation climbs.

        Returns:
            as many as there are statistics; or none, which is None for each.
        """
        return ()

    def has_penalty(self, *, in_ascent: bool) -> bool:
        """Whether the objective is more than a linear function of the sums.

        Args:
            in_ascent: asks for the objective that the perturbation climbs, which may leave penalties out.
        """
        return False

    def penalty(self, sums: DomainSums, *, in_ascent: bool) -> Tensor:
        """P, shape (); differentiable in ``sums.sum_D`` and ``sums.statistics``. Called only if ``has_penalty``."""
        raise NotImplementedError(f"{type(self).__name__} says that it has a penalty, and must override penalty()")

    def statistics(self, outputs: Any, domains: DomainsOfSamples) -> Sequence[Tensor]:
        """T of one micro-batch: tensors that add up, always as many and of the same shapes, with a graph.

        Args:
            outputs: of the forward pass, see ``Forward``.
            domains: adds up over the samples of each domain.
        """
        return ()

    def begin_step(self, sums: DomainSums) -> None:
        """Called once in every step, with the sums of pass 1: state of the objective moves here and nowhere else.

        The sums are the same on all ranks. Where pass 1 has a penalty this call comes before it is computed. The losses
        may be infinite or NaN.
        """

    def value(self, sums: DomainSums) -> Tensor:
        """J, the value of the descended objective, shape ()."""
        value = self.linear_value(sums)
        if not self.has_penalty(in_ascent=False):
            return value
        with torch.no_grad():
            return value + self.penalty(sums, in_ascent=False)

    def valued(self, sums: DomainSums) -> Valued:
        """``value``, with the terms that a report shows one by one. Called once in a step, with the sums of pass 1."""
        return Valued(self.value(sums))

    def linear_value(self, sums: DomainSums) -> Tensor:
        """J without its penalty, shape ()."""
        value = self.mean(sums)
        weights = self.linear_weights(sums.count_D, in_ascent=False)
        for weight, statistic in zip(weights, sums.statistics, strict=len(weights) > 0):
            value = value if weight is None else value + (weight * statistic).sum()
        return value


@dataclass(frozen=True)
class Coefficients:
    """The gradient of an objective by the sums, as plain numbers.

    Attributes:
        loss_D: dJ/dS_d, (D,) or () where all are equal.
        statistics: dJ/dT_d, one tensor for each statistic, or None where it is 0; empty where it is 0 for all.
    """

    loss_D: Tensor
    statistics: tuple[Tensor | None, ...] = ()

    @classmethod
    def of_counts(cls, objective: DomainObjective, count_D: Tensor, *, in_ascent: bool) -> Coefficients:
        """Those of an objective without its penalty, which follow from the counts alone."""
        linear = objective.linear_weights(count_D, in_ascent=in_ascent)
        return cls(objective.mean_weights(count_D), tuple(linear))


def coefficients(objective: DomainObjective, sums: DomainSums, *, in_ascent: bool) -> Coefficients:
    """``dJ/dS_d`` and ``dJ/dT_d`` at the sums of the whole batch, by a small autograd over those sums alone."""
    known = Coefficients.of_counts(objective, sums.count_D, in_ascent=in_ascent)
    if not objective.has_penalty(in_ascent=in_ascent):
        return known
    leaves = [tensor.detach().requires_grad_() for tensor in (sums.sum_D, *sums.statistics)]
    with torch.enable_grad():
        penalty = objective.penalty(replace(sums, sum_D=leaves[0], statistics=tuple(leaves[1:])), in_ascent=in_ascent)
        if not penalty.requires_grad:  # a penalty that happens to be constant
            return known
        found = torch.autograd.grad(penalty, leaves, allow_unused=True)
    loss_D, *statistics = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    linear = known.statistics or (None,) * len(statistics)
    both = [g.detach() if a is None else g.detach() + a for g, a in zip(statistics, linear, strict=True)]
    return Coefficients(known.loss_D + loss_D, tuple(both))
