"""The passes of a step: each leaves one gradient of the whole effective batch in ``p.grad``.

Shapes in this file: M micro-batches of this rank, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disam_peft.disam.ascent import VarianceForm, VarianceOver, VarianceScale, ascent_weights, entropic_weights
from disam_peft.disam.domain_objective import Coefficients, DomainObjective, coefficients
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.disam.micro_batches import SEVERAL, EffectiveBatch, MicroBatchLosses
from disam_peft.disam.ranks import Ranks
from disam_peft.disam.sharding import is_sharded

Mode = Literal["auto", "two_phase", "per_domain"]
AscentMode = Literal["mean", "two_phase", "per_domain"]

# Above this, ``auto`` does not keep one gradient per domain. LoRA of rank 16 on ViT-L/14 in four domains: 66 MiB.
MAX_STORED_GRADIENT_BYTES = 256 * 2**20


class LossScale:
    """Sees by which factor ``backward`` multiplied a loss (a gradient scaler's, for one), without asking anybody.

    Attributes:
        seen: the factor of the last loss, shape (); None before the first, or where no graph led on from a loss.
    """

    seen: Tensor | None = None

    def watch(self, loss: Tensor) -> Tensor:
        """``loss`` itself."""

        def remember(gradient: Tensor) -> None:
            self.seen = gradient.detach()

        loss.register_hook(remember)
        return loss

    def at_scale_1(self, value: Tensor) -> Tensor:
        """``value``, which is as large as the scaled loss made it, without that factor."""
        return value if self.seen is None else value / self.seen.to(value)


@dataclass(frozen=True)
class FirstPass:
    """The result of pass 1, beside the gradient in ``p.grad``.

    Attributes:
        sums: sums at w, over all ranks.
        weight_D: c_d, the weight of each sample's loss in the gradient.
        plain_weight_D: c_d of the objective without the variance term, (D,) or () where all are equal.
        mode: how it was computed.
        plain_gradients: of the objective without the variance term, over all ranks, one for each parameter; None if
            nobody asked.
    """

    sums: DomainSums
    weight_D: Tensor
    plain_weight_D: Tensor
    mode: AscentMode
    plain_gradients: list[Tensor | None] | None = None


@dataclass(frozen=True)
class Target:
    """The function whose gradient a pass computes: the objective minus ``variance_weight`` times Var(L_d).

    Attributes:
        in_ascent: it is the function that the perturbation climbs.
        variance_over, variance_scale: see ``ascent_weights``.
        variance_form: ``entropic``: ``variance_weight`` is the tau of ``entropic_weights``.
    """

    variance_weight: float
    in_ascent: bool
    variance_over: VarianceOver = "domains"
    variance_scale: VarianceScale = "absolute"
    variance_form: VarianceForm = "variance"


class Passes:
    """The passes over one batch.

    Args:
        params: whose gradients are wanted.
        batch: this rank's part of the batch.
        ranks: who shares the batch.
        objective: what is descended.
        backward: called with a scalar loss.
        loss_scale: tells by which factor ``backward`` multiplied the last loss; None before the first.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        batch: EffectiveBatch,
        ranks: Ranks,
        objective: DomainObjective,
        backward: Callable[[Tensor], object],
        loss_scale: Callable[[], Tensor | None],
    ) -> None:
        self._params, self._batch, self._ranks, self._objective = params, batch, ranks, objective
        self._backward, self._loss_scale = backward, loss_scale
        self._weighing: AscentMode = "two_phase"  # for a gradient whose weights depend on all losses

    def first(self, target: Target, mode: Mode, *, with_plain_gradients: bool) -> FirstPass:
        """Pass 1, in a mode; ``auto`` takes the cheapest one that is possible."""
        if mode == "two_phase":
            return self._two_phase(target, with_plain_gradients, begins=True)
        count_MD = self._batch.counts()
        num_mixed = (count_MD.count_nonzero(dim=1) > 1).sum()
        # one collective; what is decided on its result is decided alike on every rank
        reduced = self._ranks.summed(torch.cat([count_MD.sum(0), num_mixed.to(count_MD).reshape(1)]))
        count_D, num_mixed = reduced[:-1], reduced[-1]
        depends_on_sums = target.variance_weight != 0 or self._objective.has_penalty(in_ascent=target.in_ascent)
        if depends_on_sums or mode == "per_domain" or self._objective.has_penalty(in_ascent=False):
            self._weighing = self._chosen(mode, num_mixed)
        if mode == "auto" and not depends_on_sums:
            sums = self._one_phase(count_D, in_ascent=target.in_ascent)
            self._objective.begin_step(sums)
            weight_D = ascent_weights(sums.mean_D, sums.count_D, 0.0, self._objective.mean_weights(sums.count_D))
            plain = [p.grad for p in self._params] if with_plain_gradients else None
            return FirstPass(sums, weight_D, weight_D, "mean", plain)
        if self._weighing == "per_domain":
            return self._per_domain(target, count_D.sum(), with_plain_gradients, begins=True)
        return self._two_phase(target, with_plain_gradients, begins=True)

    def second(self, count_D: Tensor) -> DomainSums:
        """Pass 2: the gradient of the objective at the weights as they are now.

        Args:
            count_D: the samples of all ranks.
        """
        if not self._objective.has_penalty(in_ascent=False):
            return self._one_phase(count_D, in_ascent=False)
        target = Target(0.0, in_ascent=False)
        if self._weighing == "per_domain":
            return self._per_domain(target, count_D.sum(), False, begins=False).sums
        return self._two_phase(target, False, begins=False).sums

    def _one_phase(self, count_D: Tensor, *, in_ascent: bool) -> DomainSums:
        """The gradient of an objective whose weights follow from the counts: one forward for each micro-batch."""
        known = Coefficients.of_counts(self._objective, count_D, in_ascent=in_ascent)
        sums: DomainSums | None = None
        with self._ranks.no_sync():
            for micro_batch in self._batch.micro_batches:
                losses = micro_batch.losses()
                sums = _total(sums, losses.sums())
                self._weighted_backward(losses, known.loss_D, known.statistics)
                del losses  # with its graph, before the next one is built
        self._ranks.add_up_gradients_(self._params)
        assert sums is not None  # there is always a micro-batch
        return self._ranks.all_sums(sums)

    def _two_phase(self, target: Target, with_plain_gradients: bool, *, begins: bool) -> FirstPass:
        """All sums first, without a graph, since every weight depends on all of them; then the weighted gradients.

        The last micro-batch keeps its graph in between. So one micro-batch costs one forward, and M cost 2 M - 1.
        """
        *others, last = self._batch.micro_batches
        plain = _PlainGradients(self._params, self._loss_scale()) if with_plain_gradients else None
        with self._ranks.no_sync():
            sums: DomainSums | None = None
            for micro_batch in others:
                sums = _total(sums, micro_batch.sums_alone())
            losses = last.losses()
            sums = self._ranks.all_sums(_total(sums, losses.sums()))
            weight_D, wanted = self._weights(target, sums, begins=begins)

            def backward(losses: MicroBatchLosses) -> None:
                if plain is not None:
                    plain.add(losses.weighted(wanted.loss_D, wanted.statistics, 1))
                self._weighted_backward(losses, weight_D, wanted.statistics)

            backward(losses)
            del losses
            for micro_batch in others:
                backward(micro_batch.losses())
        self._ranks.add_up_gradients_(self._params)
        return FirstPass(
            sums,
            weight_D,
            wanted.loss_D,
            "two_phase",
            None if plain is None else self._ranks.added_up(self._params, plain.gradients),
        )

    def _per_domain(self, target: Target, total: Tensor, with_plain_gradients: bool, *, begins: bool) -> FirstPass:
        """One forward for each micro-batch, all of whose samples are of one domain: G_d, the gradient of S_d, is kept
        for each domain (here over N, as in any other pass, so that a loss scale suits both) and weighted at the end."""
        gradients: dict[int, list[Tensor | None]] = {}
        sums: DomainSums | None = None
        with self._ranks.no_sync():
            for micro_batch, domain in zip(self._batch.micro_batches, self._batch.single_domains(), strict=True):
                # the backward adds to what is there: to this domain's
                self._set_gradients(gradients.get(domain, [None] * len(self._params)))
                losses = micro_batch.losses()
                sums = _total(sums, losses.sums())
                self._weighted_backward(losses, 1.0 / total)
                gradients[domain] = [p.grad for p in self._params]
                del losses
        assert sums is not None  # there is always a micro-batch
        sums = self._ranks.all_sums(sums)
        weight_D, wanted = self._weights(target, sums, begins=begins)
        plain: list[Tensor | None] | None = None
        if with_plain_gradients:
            plain = self._ranks.added_up(
                self._params, _combined(gradients, (total * wanted.loss_D).expand_as(weight_D))
            )
        self._set_gradients(_combined(gradients, total * weight_D))
        self._ranks.add_up_gradients_(self._params)
        return FirstPass(sums, weight_D, wanted.loss_D, "per_domain", plain)

    # -- details ---------------------------------------------------------------------------------------------

    def _weights(self, target: Target, sums: DomainSums, *, begins: bool) -> tuple[Tensor, Coefficients]:
        """c_d, (D,), and the coefficients of the objective without the variance term."""
        if begins:
            self._objective.begin_step(sums)
        wanted = coefficients(self._objective, sums, in_ascent=target.in_ascent)
        means = sums.mean_D, sums.count_D, target.variance_weight
        if target.variance_form == "variance" or target.variance_weight == 0:
            weight_D = ascent_weights(*means, wanted.loss_D, target.variance_over, target.variance_scale)
        else:
            mean_D = self._objective.mean_weights(sums.count_D)
            weight_D = entropic_weights(*means, mean_D) + (wanted.loss_D - mean_D) * sums.present_D
        return weight_D, wanted

    def _chosen(self, mode: Mode, num_mixed: Tensor) -> AscentMode:
        """How gradients are computed whose weights depend on all losses; the same on every rank.

        Raises:
            ValueError: ``per_domain`` is asked for and not possible.
        """
        # of several ranks each must decide on what is reduced, and wait for it
        mixed = self._batch.single_domains().count(SEVERAL) if self._ranks.size == 1 else int(num_mixed)
        obstacle = self._obstacle_to_gradients_per_domain(mixed)
        if mode == "per_domain" and obstacle is not None:
            raise ValueError(f"mode='per_domain' is not possible: {obstacle}; use mode='two_phase', or 'auto'")
        num_domains = len(self._batch.ids_D)
        stored_bytes = num_domains * sum(p.numel() * p.element_size() for p in self._params)
        fits = mode == "per_domain" or stored_bytes <= MAX_STORED_GRADIENT_BYTES
        return "per_domain" if obstacle is None and fits else "two_phase"

    def _obstacle_to_gradients_per_domain(self, num_mixed: int) -> str | None:
        if num_mixed > 0:
            return f"{num_mixed} micro-batches (over all ranks) hold samples of several domains"
        if self._objective.has_statistics:
            return "the objective depends on more sums than those of the losses"
        if any(is_sharded(p) for p in self._params):
            return "the parameters are sharded, and their gradients are added up over the ranks as they come"
        if self._ranks.size > 1 and not self._ranks.reduces_here:
            return "a wrapper adds up the gradients of different domains over the ranks; hand over its no_sync"
        return None

    def _weighted_backward(
        self, losses: MicroBatchLosses, weight_D: Tensor, statistics_weights: Sequence[Tensor | None] = ()
    ) -> None:
        """Gradient of this rank's share of the surrogate."""
        self._backward(losses.weighted(weight_D, statistics_weights, self._ranks.loss_factor))

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self._params, gradients, strict=True):
            p.grad = gradient


class _PlainGradients:
    """Gradients beside ``p.grad``, added up over the micro-batches of this rank; each graph is kept.

    Under a loss scaler unscaled half-precision gradients may vanish: the ``scale`` of the last step, if any, keeps
    them. Only their direction is of use.
    """

    def __init__(self, params: Sequence[Tensor], scale: Tensor | None) -> None:
        self._params, self._scale = params, scale
        self.gradients: list[Tensor | None] = [None] * len(params)

    def add(self, loss: Tensor) -> None:
        scale = torch.ones_like(loss) if self._scale is None else self._scale.to(loss)
        gradients = torch.autograd.grad(loss, self._params, scale, retain_graph=True, allow_unused=True)
        self.gradients = _added(self.gradients, gradients)


def _total(some: DomainSums | None, more: DomainSums) -> DomainSums:
    return more if some is None else some + more


@torch.no_grad()
def _added(some: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [a if b is None else b if a is None else a + b for a, b in zip(some, more, strict=True)]


@torch.no_grad()
def _combined(gradients: dict[int, list[Tensor | None]], factor_D: Tensor) -> list[Tensor | None]:
    """Weighted sum over the domains, parameter by parameter; None where no domain has a gradient."""
    combined: list[Tensor | None] = [None] * len(next(iter(gradients.values())))
    for domain, of_domain in gradients.items():
        weighted = [None if g is None else g * factor_D[domain].to(g) for g in of_domain]
        combined = _added(combined, weighted)
    return combined
