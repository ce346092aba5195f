"""What a step descends: the mean loss, or more, as a function of sums over the samples of each domain.

Shapes in this file: B samples of a micro-batch, D domains, F features; ``...`` are a statistic's own dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """

    loss_B: Tensor
    reported_B: Tensor | None = None
    outputs: Any = None


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

    def outer_sums(self, value_BF: Tensor) -> Tensor:
        """``sum of value_i value_i^T over the samples i of domain d``: (B, F) to (D, F, F)."""
        value_BF = self._counted(value_BF)
        ids_D1 = torch.arange(self.num_domains, device=self.index_B.device)[:, None]
        of_domain_DB1 = (ids_D1 == self.index_B).to(value_BF.dtype)[..., None]
        return (of_domain_DB1 * value_BF).mT @ value_BF

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

    An objective is ``J = sum_d m_d S_d + P(S, T, n)``. S_d are the sums of the losses over the samples of domain d, and
    n_d is their number. The weights m_d of the mean follow from the n_d alone. The penalty P is any differentiable
    function of the S_d, the n_d and of further sums T_d, the statistics. All sums are those of the whole effective
    batch, over all micro-batches and ranks, so the gradient of J is exact however the batch is divided: the step
    collects the sums, takes ``G_d = dP/dS_d`` (and ``dP/dT_d``) as plain numbers, and runs the backward pass of the
    surrogate ``sum_d <G_d, the part of S_d in this micro-batch>``.

    A subclass overrides what it needs: ``mean`` together with ``mean_weights`` for another mean; ``has_penalty`` and
    ``penalty`` for a penalty; ``has_statistics`` and ``statistics`` where the penalty depends on more than the losses.
    """

    has_statistics: bool = False
    """Whether ``statistics`` gives any; the mode ``per_domain`` is not possible then."""

    def mean_weights(self, count_D: Tensor) -> Tensor:
        """m_d, (D,) or () where all are equal; 0 or a finite number for absent domains."""
        return 1.0 / count_D.sum()

    def mean(self, sums: DomainSums) -> Tensor:
        """``sum_d m_d S_d``, shape ()."""
        return sums.mean

    def has_penalty(self, *, in_ascent: bool) -> bool:
        """Whether the objective is more than the mean.

        Args:
            in_ascent: asks for the objective that the perturbation climbs, which may leave penalties out.
        """
        return False

    def penalty(self, sums: DomainSums, *, in_ascent: bool) -> Tensor:
        """P, shape (); differentiable in ``sums.sum_D`` and ``sums.statistics``. Called only if ``has_penalty``."""
        raise NotImplementedError(f"{type(self).__name__} says that it has a penalty, and must override penalty()")

    def statistics(self, outputs: Any, domains: DomainsOfSamples) -> Sequence[Tensor]:
        """T of one micro-batch: tensors (D, ...), always as many and of the same shapes, with a graph.

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
        if not self.has_penalty(in_ascent=False):
            return self.mean(sums)
        with torch.no_grad():
            return self.mean(sums) + self.penalty(sums, in_ascent=False)


@dataclass(frozen=True)
class Coefficients:
    """The gradient of an objective by the sums, as plain numbers.

    Attributes:
        loss_D: dJ/dS_d, (D,) or () where all are equal.
        statistics: dJ/dT_d, one tensor for each statistic; empty where there is no penalty.
    """

    loss_D: Tensor
    statistics: tuple[Tensor, ...] = ()


def coefficients(objective: DomainObjective, sums: DomainSums, *, in_ascent: bool) -> Coefficients:
    """``dJ/dS_d`` and ``dJ/dT_d`` at the sums of the whole batch, by a small autograd over those sums alone."""
    mean_D = objective.mean_weights(sums.count_D)
    if not objective.has_penalty(in_ascent=in_ascent):
        return Coefficients(mean_D)
    leaves = [tensor.detach().requires_grad_() for tensor in (sums.sum_D, *sums.statistics)]
    with torch.enable_grad():
        penalty = objective.penalty(replace(sums, sum_D=leaves[0], statistics=tuple(leaves[1:])), in_ascent=in_ascent)
        if not penalty.requires_grad:  # a penalty that happens to be constant
            return Coefficients(mean_D)
        found = torch.autograd.grad(penalty, leaves, allow_unused=True)
    loss_D, *statistics = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    return Coefficients(mean_D + loss_D, tuple(g.detach() for g in statistics))
