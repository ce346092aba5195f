"""The passes of a step: each leaves one gradient of the whole effective batch in ``p.grad``.

Shapes in this file: B samples of a micro-batch, M micro-batches of this rank, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disam_peft.disam.ascent import ascent_weights
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.disam.micro_batches import SEVERAL, EffectiveBatch, MicroBatch
from disam_peft.disam.ranks import Ranks
from disam_peft.disam.sharding import is_sharded

Mode = Literal["auto", "two_phase", "per_domain"]
AscentMode = Literal["mean", "two_phase", "per_domain"]

# Above this, ``auto`` does not keep one gradient per domain. LoRA of rank 16 on ViT-L/14 in four domains: 66 MiB.
MAX_STORED_GRADIENT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Ascent:
    """What pass 1 found, beside the ascent gradient in ``p.grad``.

    Attributes:
        sums: sums of losses at w, over all ranks.
        weight_D: c_d.
        mode: how it was computed.
        plain_gradients: of the mean loss over all ranks, one for each parameter; None if nobody asked.
    """

    sums: DomainSums
    weight_D: Tensor
    mode: AscentMode
    plain_gradients: list[Tensor | None] | None = None


class Passes:
    """The passes over one batch.

    Args:
        params: whose gradients are wanted.
        batch: this rank's part of the batch.
        ranks: who shares the batch.
        backward: called with a scalar loss.
        loss_scale: tells by which factor ``backward`` multiplied the last loss; None before the first.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        batch: EffectiveBatch,
        ranks: Ranks,
        backward: Callable[[Tensor], object],
        loss_scale: Callable[[], Tensor | None],
    ) -> None:
        self._params, self._batch, self._ranks = params, batch, ranks
        self._backward, self._loss_scale = backward, loss_scale

    def mean(self, total: Tensor) -> DomainSums:
        """The gradient of the mean over the ``total`` samples of all ranks; its weights need no loss."""
        sums = self._batch.no_sums()
        with self._ranks.no_sync():
            for micro_batch in self._batch.micro_batches:
                loss_B = micro_batch.losses()
                sums = sums + micro_batch.sums(loss_B)
                self._weighted_backward(loss_B, _each(1.0 / total, loss_B))
                del loss_B  # with its graph, before the next one is built
        self._ranks.add_up_gradients_(self._params)
        return self._ranks.all_sums(sums)

    def ascent(self, variance_weight: float, mode: Mode, *, with_plain_gradients: bool) -> Ascent:
        """The gradient of ``L - lambda * Var(L_d)``, in a mode; ``auto`` takes the cheapest one that is possible."""
        if mode == "two_phase":
            return self._two_phase(variance_weight, with_plain_gradients)
        count_MD = self._batch.counts()
        num_mixed = (count_MD.count_nonzero(dim=1) > 1).sum()
        # one collective; what is decided on its result is decided alike on every rank
        *count_D, num_mixed = self._ranks.summed(torch.cat([count_MD.sum(0), num_mixed.to(count_MD).reshape(1)]))
        total = torch.stack(count_D).sum()
        if mode == "auto" and variance_weight == 0:
            sums = self.mean(total)
            plain = [p.grad for p in self._params] if with_plain_gradients else None
            return Ascent(sums, ascent_weights(sums.mean_D, sums.count_D, 0.0), "mean", plain)
        domain_M = self._batch.single_domains()
        # of several ranks each must decide on what is reduced, and wait for it
        mixed = domain_M.count(SEVERAL) if self._ranks.size == 1 else int(num_mixed)
        obstacle = self._obstacle_to_gradients_per_domain(mixed)
        if mode == "per_domain" and obstacle is not None:
            raise ValueError(f"mode='per_domain' is not possible: {obstacle}; use mode='two_phase', or 'auto'")
        stored_bytes = len(count_D) * sum(p.numel() * p.element_size() for p in self._params)
        if obstacle is None and (mode == "per_domain" or stored_bytes <= MAX_STORED_GRADIENT_BYTES):
            return self._per_domain(variance_weight, total, domain_M, with_plain_gradients)
        return self._two_phase(variance_weight, with_plain_gradients)

    def _two_phase(self, variance_weight: float, with_plain_gradients: bool) -> Ascent:
        """All losses first, without a graph, since every weight hangs on all of them; then the weighted gradients.

        The last micro-batch keeps its graph in between. So one micro-batch costs one forward, and M cost 2 M - 1.
        """
        *others, last = self._batch.micro_batches
        plain = _PlainGradients(self._params, self._loss_scale()) if with_plain_gradients else None
        with self._ranks.no_sync():
            sums = self._batch.no_sums()
            for micro_batch in others:
                sums = sums + micro_batch.sums(micro_batch.values())
            loss_B = last.losses()
            sums = self._ranks.all_sums(sums + last.sums(loss_B))
            weight_D = ascent_weights(sums.mean_D, sums.count_D, variance_weight)

            def backward(micro_batch: MicroBatch, loss_B: Tensor) -> None:
                if plain is not None:
                    plain.add(torch.dot(_each(1.0 / sums.total, loss_B).to(loss_B.dtype), loss_B))
                self._weighted_backward(loss_B, weight_D[micro_batch.index_B])

            backward(last, loss_B)
            del loss_B
            for micro_batch in others:
                backward(micro_batch, micro_batch.losses())
        self._ranks.add_up_gradients_(self._params)
        return Ascent(
            sums, weight_D, "two_phase", None if plain is None else self._ranks.added_up(self._params, plain.gradients)
        )

    def _per_domain(
        self, variance_weight: float, total: Tensor, domain_M: Sequence[int], with_plain_gradients: bool
    ) -> Ascent:
        """One forward for each micro-batch, all of whose samples are of one domain: G_d, the gradient of S_d, is kept
        for each domain (here over N, as in any other pass, so that a loss scale suits both) and weighted at the end."""
        gradients: dict[int, list[Tensor | None]] = {}
        sums = self._batch.no_sums()
        with self._ranks.no_sync():
            for micro_batch, domain in zip(self._batch.micro_batches, domain_M, strict=True):
                # the backward adds to what is there: to this domain's
                self._set_gradients(gradients.get(domain, [None] * len(self._params)))
                loss_B = micro_batch.losses()
                sums = sums + micro_batch.sums(loss_B)
                self._weighted_backward(loss_B, _each(1.0 / total, loss_B))
                gradients[domain] = [p.grad for p in self._params]
                del loss_B
        sums = self._ranks.all_sums(sums)
        weight_D = ascent_weights(sums.mean_D, sums.count_D, variance_weight)
        plain: list[Tensor | None] | None = None
        if with_plain_gradients:
            plain = self._ranks.added_up(self._params, _combined(gradients, torch.ones_like(weight_D)))
        self._set_gradients(_combined(gradients, total * weight_D))
        self._ranks.add_up_gradients_(self._params)
        return Ascent(sums, weight_D, "per_domain", plain)

    # -- details ---------------------------------------------------------------------------------------------

    def _obstacle_to_gradients_per_domain(self, num_mixed: int) -> str | None:
        if num_mixed > 0:
            return f"{num_mixed} micro-batches (over all ranks) hold samples of several domains"
        if any(is_sharded(p) for p in self._params):
            return "the parameters are sharded, and their gradients are added up over the ranks as they come"
        if self._ranks.size > 1 and not self._ranks.reduces_here:
            return "a wrapper adds up the gradients of different domains over the ranks; hand over its no_sync"
        return None

    def _weighted_backward(self, loss_B: Tensor, weight_B: Tensor) -> None:
        """Gradient of this rank's share of ``sum_i weight_i l_i``; the weights are numbers, no graph runs through."""
        self._backward(torch.dot((weight_B * self._ranks.loss_factor).to(loss_B.dtype), loss_B))

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


def _each(number: Tensor, loss_B: Tensor) -> Tensor:
    return number.expand(len(loss_B))


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
