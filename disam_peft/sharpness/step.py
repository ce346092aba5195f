"""The two-pass gradient: plain (ERM), sharpness-aware (SAM) and domain-inspired sharpness-aware (DISAM).

Shapes in this file: B samples, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.sharpness.domains import (
    DomainSums,
    all_reduced,
    ascent_weights,
    domain_index,
    domain_sums,
    union_of_ids,
)
from disam_peft.sharpness.perturbation import AscentDirection, by_device_and_dtype, restored
from disam_peft.sharpness.reduction import check_replicas_agree, reduce_gradients_
from disam_peft.sharpness.rng import RandomState

PerSampleLoss = Callable[[], Tensor]


@dataclass(frozen=True)
class StepReport:
    """What one step saw. Tensors, detached and still on the device: reading one may wait for the device.

    Attributes:
        loss: mean loss at w over the (global) batch, shape ().
        perturbed_loss: mean loss at w + e; equals ``loss`` where there was no second pass.
        domain_ids: (D,) int64, ascending.
        domain_counts: (D,) samples per domain; 0 for a domain that is absent from the batch.
        domain_losses: (D,) mean loss per domain at w; NaN for an absent domain.
        domain_weights: (D,) w_d = n_d c_d, which sum to one; n_d / N for ERM and SAM. Negative: see ``ascent_weights``.
        ascent_norm: norm of the ascent gradient over the trained parameters (adaptive: of |w| g), at loss scale 1,
            shape (); 0 where there was no ascent.
        is_finite: shape (), bool: losses and ascent gradient of this step are finite, on every rank. If False the
            gradients hold NaN (a loss scaler skips and backs off by itself); without a scaler, skip the step.
        ascent_cosine: cosine between the ascent direction and plain SAM's on the same batch, shape (); None unless
            asked for.
    """

    loss: Tensor
    perturbed_loss: Tensor
    domain_ids: Tensor
    domain_counts: Tensor
    domain_losses: Tensor
    domain_weights: Tensor
    ascent_norm: Tensor
    is_finite: Tensor
    ascent_cosine: Tensor | None = None


@dataclass
class _LossScale:
    """Sees by which factor ``backward`` multiplied a loss (a gradient scaler's, for one), without asking anybody."""

    seen: Tensor | None = field(default=None)

    def watch(self, loss: Tensor) -> Tensor:
        def remember(gradient: Tensor) -> None:
            self.seen = gradient.detach()

        loss.register_hook(remember)
        return loss


class DISAM:
    """Replaces ``loss.backward()``: leaves the domain-inspired sharpness-aware gradient in ``p.grad``.

    Over the batch's N samples, pass 1 takes the gradient g of ``L - lambda * Var(L_d)`` at w, where L_d are the mean
    losses of the K domains present and Var is their population variance. Pass 2 takes the gradient of L at
    ``w + rho g / ||g||``. Then the weights are w again, bit for bit, and any optimizer can step. A batch that holds
    one domain gives plain SAM. (Zhang et al., ICLR 2024, arXiv 2405.18861.)

    .. code-block:: python

        disam = DISAM(model.parameters(), rho=0.05, variance_weight=0.1)
        for images, labels, domains in loader:
            report = disam.backward(lambda: cross_entropy(model(images), labels, reduction="none"), domains)
            optimizer.step()

    Args:
        params: the parameters that are trained; those that require no gradient are left out. Others that take part in
            the loss are not perturbed.
        rho: radius of the perturbation, in units of the weights' norm; 0 is the plain gradient, in one pass.
        variance_weight: lambda; 0 is SAM.
        adaptive: ASAM's perturbation, ``rho w^2 g / || |w| g ||``; rho is then usually 10 to 40 times larger.
        num_domains: the ids are 0..num_domains-1. Optional; with it a step needs no synchronisation with the device
            and, over several ranks, one collective less.
        backward: called as ``backward(loss)`` in place of ``loss.backward()``, for example ``accelerator.backward``.
            Gradients of other leaves than ``params`` are then those of both passes added up.
        reduce_gradients: with torch.distributed initialised, add up the gradients over the ranks here. For models
            *without* a wrapper; False leaves that to DistributedDataParallel around the model.
        ascent_cosine: report the cosine between the ascent direction and plain SAM's, for a second backward in pass 1.
        process_group: the ranks that share a batch; the default is all.

    Raises:
        ValueError: rho or variance_weight negative or not finite; no parameter that requires a gradient; a parameter
            that is no leaf, appears twice, or is float16 or bfloat16 (too coarse for w + e: keep what is trained in
            float32 and use autocast).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        rho: float = 0.05,
        variance_weight: float = 0.1,
        adaptive: bool = False,
        *,
        num_domains: int | None = None,
        backward: Callable[[Tensor], object] | None = None,
        reduce_gradients: bool = False,
        ascent_cosine: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, value in (("rho", rho), ("variance_weight", variance_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, not {value}")
        if num_domains is not None and num_domains < 1:
            raise ValueError(f"num_domains must be at least 1, not {num_domains}; leave it out if unknown")
        self.params = _trainable(params)
        self.rho = float(rho)
        self.variance_weight = float(variance_weight)
        self.adaptive = adaptive
        self.num_domains = num_domains
        self.reduce_gradients = reduce_gradients
        self.ascent_cosine = ascent_cosine
        self._call_backward = backward
        self._group = process_group
        self._scale = _LossScale()
        self._replicas_checked = False

    def backward(self, per_sample_loss: PerSampleLoss, domains: Tensor) -> StepReport:
        """Put the gradient of this batch into ``p.grad``, in place of what was there.

        ``per_sample_loss`` is called once per pass and must compute the same function both times: it sees the same
        random numbers of torch (dropout masks), so only the weights differ. Any autocast belongs inside it.

        Args:
            per_sample_loss: takes nothing, returns the losses (B,) of the batch, with a graph.
            domains: (B,) integers; any values, in any order, any of them absent (with ``num_domains``: in range).

        Returns:
            A report of this step. If anything raises in a pass, the weights are restored and ``p.grad`` is None.

        Raises:
            ValueError: losses that are not a (B,) tensor with a graph, or domains that do not match them.
        """
        random_state = RandomState.of(self.params)
        weights = restored(self.params)
        self._clear_gradients()
        try:
            loss_B = _checked_losses(per_sample_loss())
            index_B, sums = self._sums(loss_B, domains)
            weight_D = ascent_weights(sums.mean_D, sums.count_D, self.variance_weight if self.rho > 0 else 0.0)
            ascent_loss = self._weighted(loss_B, weight_D[index_B])
            plain_gradients = self._plain_gradients(loss_B, sums) if self.ascent_cosine and self.rho > 0 else None
            self._backward(ascent_loss)
            del loss_B, ascent_loss
            if self.rho == 0:
                return self._report(sums, weight_D, perturbed=sums)
            direction = self._direction([p.grad for p in self.params])
            cosine = None if plain_gradients is None else direction.cosine(self._direction(plain_gradients))
            self._clear_gradients()

            with weights:
                direction.add_(self.rho)
                # an autocast around both passes would serve this one the casts of the unperturbed weights
                torch.clear_autocast_cache()
                random_state.restore()
                loss_B = _checked_losses(per_sample_loss())
                _, perturbed = self._sums(loss_B, domains)
                self._backward(self._weighted(loss_B, (1.0 / sums.total).expand(len(loss_B))))
            torch.clear_autocast_cache()
            self._poison_unless(direction.is_finite)
            return self._report(sums, weight_D, perturbed, direction, cosine)
        except BaseException:
            weights.copy_back()  # an interrupt may have hit the exit of the block above
            self._clear_gradients()  # half a gradient must not reach an optimizer
            raise

    # -- the parts, in the order of the step -----------------------------------------------------------------

    @property
    def _world_size(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._group)

    def _clear_gradients(self) -> None:
        # not through an optimizer: a wrapped zero_grad may do nothing inside an accumulation context
        for p in self.params:
            p.grad = None

    def _sums(self, loss_B: Tensor, domains: Tensor) -> tuple[Tensor, DomainSums]:
        domains_B = _checked_domains(domains, loss_B, self.num_domains)
        ids_D, index_B = domain_index(domains_B, self.num_domains)
        if self._world_size > 1 and self.num_domains is None:
            ids_D = union_of_ids(ids_D, self._group)
            index_B = torch.searchsorted(ids_D, domains_B)
        sums = domain_sums(loss_B, index_B, ids_D)
        return index_B, all_reduced(sums, self._group) if self._world_size > 1 else sums

    def _weighted(self, loss_B: Tensor, weight_B: Tensor) -> Tensor:
        """This rank's share of ``sum_i weight_i l_i``; the weights are numbers, no graph runs through them."""
        if not self.reduce_gradients:
            weight_B = weight_B * self._world_size  # a wrapper around the model averages over the ranks
        return self._scale.watch(torch.dot(weight_B.to(loss_B.dtype), loss_B))

    def _backward(self, loss: Tensor) -> None:
        if self._call_backward is not None:
            self._call_backward(loss)
        else:
            loss.backward(inputs=self.params)
        if self._world_size > 1 and self.reduce_gradients:
            reduce_gradients_(self.params, self._group)

    def _plain_gradients(self, loss_B: Tensor, sums: DomainSums) -> list[Tensor | None]:
        """Plain SAM's ascent gradient of the same batch; keeps the graph."""
        share = torch.dot((1.0 / sums.total).expand(len(loss_B)).to(loss_B.dtype), loss_B)
        # under a loss scaler unscaled half-precision gradients may vanish: the scale of the last step keeps them
        scale = torch.ones_like(share) if self._scale.seen is None else self._scale.seen.to(share)
        gradients = torch.autograd.grad(share, self.params, scale, retain_graph=True, allow_unused=True)
        if self._world_size == 1:
            return list(gradients)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, gradients, strict=True)]
        for gradient in filled:
            dist.all_reduce(gradient, group=self._group)
        return list(filled)

    def _direction(self, gradients: list[Tensor | None]) -> AscentDirection:
        direction = AscentDirection(self.params, gradients, adaptive=self.adaptive)
        if self._world_size > 1 and not self._replicas_checked:
            check_replicas_agree(direction.norm, self._group)
            self._replicas_checked = True
        return direction

    @torch.no_grad()
    def _poison_unless(self, is_finite: Tensor) -> None:
        """NaN into every gradient where pass 1 overflowed: a loss scaler must see it, pass 2 alone would hide it."""
        factor = torch.where(is_finite, 1.0, math.nan)
        for group in by_device_and_dtype([p.grad for p in self.params if p.grad is not None]):
            torch._foreach_mul_(group, factor.to(group[0]))

    def _report(
        self,
        sums: DomainSums,
        weight_D: Tensor,
        perturbed: DomainSums,
        direction: AscentDirection | None = None,
        cosine: Tensor | None = None,
    ) -> StepReport:
        is_finite = torch.isfinite(sums.mean) & torch.isfinite(perturbed.mean)
        norm = torch.zeros_like(sums.mean)
        if direction is not None:
            scale = self._scale.seen
            norm = direction.norm if scale is None else direction.norm / scale.to(direction.norm)
            is_finite = is_finite & direction.is_finite.to(is_finite.device)
        return StepReport(
            loss=sums.mean,
            perturbed_loss=perturbed.mean,
            domain_ids=sums.ids_D,
            domain_counts=sums.count_D,
            domain_losses=sums.mean_D,
            domain_weights=sums.count_D * weight_D,
            ascent_norm=norm,
            is_finite=is_finite,
            ascent_cosine=cosine,
        )


def _trainable(params: Iterable[Tensor]) -> list[Tensor]:
    found = list(params)
    for p in found:
        if not isinstance(p, Tensor):
            raise ValueError(
                f"params must be tensors, not {type(p).__name__}; pass model.parameters(), not names or groups"
            )
    trainable = [p for p in found if p.requires_grad]
    if not trainable:
        raise ValueError(f"none of the {len(found)} parameters requires a gradient: there is nothing to train")
    if len({id(p) for p in trainable}) != len(trainable):
        raise ValueError("a parameter appears twice in params")
    for p in trainable:
        if not p.is_leaf:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is the result of a computation, not a leaf")
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"a trained parameter is {str(p.dtype).removeprefix('torch.')}: w + e rounds back to w there; "
                "keep what is trained in float32 and use autocast"
            )
    return trainable


def _checked_losses(loss_B: Tensor) -> Tensor:
    if not isinstance(loss_B, Tensor) or loss_B.ndim != 1:
        got = tuple(loss_B.shape) if isinstance(loss_B, Tensor) else type(loss_B).__name__
        raise ValueError(
            f"per_sample_loss must return one loss per sample, shape (B,), not {got}; use reduction='none'"
        )
    if not loss_B.requires_grad:
        raise ValueError("the losses have no graph: nothing that requires a gradient took part (or no_grad is on)")
    # sums and weights of losses need more than half precision
    return loss_B.float() if loss_B.dtype in (torch.float16, torch.bfloat16) else loss_B


def _checked_domains(domains: Tensor, loss_B: Tensor, num_domains: int | None) -> Tensor:
    domains_B = torch.as_tensor(domains, device=loss_B.device)
    if domains_B.shape != loss_B.shape:
        raise ValueError(f"domains has shape {tuple(domains_B.shape)}, the losses have {tuple(loss_B.shape)}")
    if len(domains_B) == 0:
        raise ValueError("the batch is empty")
    if domains_B.is_floating_point() or domains_B.is_complex() or domains_B.dtype == torch.bool:
        raise ValueError(f"domains must be integers, not {domains_B.dtype}")
    domains_B = domains_B.long()
    # on an accelerator this check would wait for the device; index_add fails there by itself
    in_range = num_domains is None or domains_B.is_cuda or bool(((domains_B >= 0) & (domains_B < num_domains)).all())
    if not in_range:
        found = f"{int(domains_B.min())}..{int(domains_B.max())}"
        raise ValueError(f"with num_domains={num_domains} the domains must be in 0..{num_domains}-1, found {found}")
    return domains_B
