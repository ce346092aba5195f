"""The two-pass gradient: plain (ERM), sharpness-aware (SAM) and domain-inspired sharpness-aware (DISAM).

Shapes in this file: B samples, D domains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.disam.ascent import VarianceForm, VarianceOver, VarianceScale
from disam_peft.disam.descent import PUBLISHED_ALPHA, Descent, FirstGradient, poison_unless_
from disam_peft.disam.domain_objective import DomainObjective
from disam_peft.disam.domain_sums import DomainSums, accumulation_dtype
from disam_peft.disam.micro_batches import EffectiveBatch, PerSampleLoss
from disam_peft.disam.parameters import all_sharded, trainable_with_rho
from disam_peft.disam.passes import LossScale, Mode, Passes, Target
from disam_peft.disam.perturbation import AscentDirection, restored
from disam_peft.disam.ranks import NoSync, Ranks
from disam_peft.disam.settings import StepSettings
from disam_peft.disam.sharding import perturbation_arrived
from disam_peft.disam.step_report import StepReport


class DISAM(StepSettings):
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
            the loss are not perturbed. Or groups ``{"params": [...], "rho": 0.1}``, where ``rho`` may be left out: a
            group is perturbed by its own rho, while the norm of g is over all of them. A later change of ``disam.rho``
            changes the radius of every group by the same factor.
        rho: radius of the perturbation, in units of the weights' norm; 0 is the plain gradient, in one pass.
        variance_weight: lambda; 0 is SAM.
        variance_over: ``domains``, every domain of the batch counts alike (the paper); or ``samples``, each by its
            number of samples (the paper's published code). The same where domains are balanced; see ``ascent_weights``.
        variance_scale: ``relative``: lambda is divided by the batch's mean loss; see ``ascent_weights``.
        variance_form: ``entropic``: domain weights that are never negative; see ``entropic_weights``, whose tau is
            ``variance_weight``.
        descent: what becomes of both gradients. ``sam``: the second one is descended. ``gsam``: without the part of the
            first one that is orthogonal to it, see ``gsam_gradient``. ``sagm``: their mean, and a perturbation that
            goes back along the gradient, see ``sagm_gradient`` and ``perturbations``. The first one is g, so that with
            lambda these are the paper's DISAM + GSAM and DISAM + SAGM.
        alpha: of ``gsam`` and ``sagm``, which mean different things by it. Unset: what their authors' code has, 0.4 and
            0.001, see ``PUBLISHED_ALPHA``.
        adaptive: ASAM's perturbation, ``rho w^2 g / || |w| g ||``; rho is then usually 10 to 40 times larger.
        num_domains: the ids are 0..num_domains-1. Optional; with it a step needs no synchronisation with the device
            and, over several ranks, one collective less.
        backward: called as ``backward(loss)`` in place of ``loss.backward()``, for example ``accelerator.backward``.
            Gradients of other leaves than ``params`` are then those of all passes added up.
        reduce_gradients: with torch.distributed initialised, add up the gradients over the ranks here. For models
            *without* a wrapper; False leaves that to DistributedDataParallel or ``fully_shard`` around the model.
        ascent_cosine: report the cosine between the ascent direction and plain SAM's, for a second backward in pass 1.
        process_group: the ranks that share a batch; the default is all.
        reshard: called whenever the weights changed in place, to drop copies of them. Needed with ``fully_shard`` only
            where modules do not reshard after the backward (``reshard_after_backward``); it must reach all of them:
            ``lambda: [m.reshard() for m in model.modules() if isinstance(m, FSDPModule)]``.

    ``rho``, ``variance_weight`` and the other settings may be changed between steps, as attributes; they are checked.

    A BatchNorm in train mode makes its running statistics from the batch in every pass: each batch counts twice, the
    second time at the perturbed weights, and more often with micro-batches in two phases. Keep it in eval mode, as one
    does with frozen ones; the training of this package does so. (The published DISAM trains in train mode and its SAM
    baseline in eval mode, so that the two differ in more than the variance.)

    Raises:
        ValueError: rho or variance_weight negative or not finite; no parameter that requires a gradient; a parameter
            that is no leaf, appears twice, or is float16 or bfloat16 (too coarse for w + e: keep what is trained in
            float32 and use autocast); sharded and unsharded parameters (DTensor) together; a group with other keys.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Mapping[str, Any]],
        rho: float = 0.05,
        variance_weight: float = 0.1,
        adaptive: bool = False,
        *,
        num_domains: int | None = None,
        backward: Callable[[Tensor], object] | None = None,
        reduce_gradients: bool = False,
        ascent_cosine: bool = False,
        process_group: dist.ProcessGroup | None = None,
        reshard: Callable[[], object] | None = None,
        variance_over: VarianceOver = "domains",
        variance_scale: VarianceScale = "absolute",
        variance_form: VarianceForm = "variance",
        descent: Descent = "sam",
        alpha: float | None = None,
    ) -> None:
        if num_domains is not None and num_domains < 1:
            raise ValueError(f"num_domains must be at least 1, not {num_domains}; leave it out if unknown")
        self.rho = rho
        self.params, self.rho_factors = trainable_with_rho(params, self.rho)
        self.variance_weight = variance_weight
        self.variance_over, self.variance_scale, self.variance_form = variance_over, variance_scale, variance_form
        self.descent = descent
        self.alpha = PUBLISHED_ALPHA[descent] if alpha is None else alpha
        self.adaptive = adaptive
        self.num_domains = num_domains
        self.reduce_gradients = reduce_gradients
        self.ascent_cosine = ascent_cosine
        self._call_backward = backward
        self._group = process_group
        self._reshard = reshard
        self._scale = LossScale()
        self._sharded = all_sharded(self.params, reduce_gradients=reduce_gradients, ascent_cosine=ascent_cosine)
        self._replicas_checked = False
        self._arrived: bool | None = None

    def backward(
        self,
        per_sample_loss: PerSampleLoss,
        domains: Tensor,
        mask: Tensor | None = None,
        *,
        objective: DomainObjective | None = None,
    ) -> StepReport:
        """Put the gradient of this batch into ``p.grad``, in place of what was there.

        ``per_sample_loss`` is called once per pass and must compute the same function both times: it sees the same
        random numbers of torch's global generators (dropout masks), so only the weights differ. A loss that draws from
        a ``torch.Generator`` of its own, or from NumPy, is not replayed and would differ between the passes. Any
        autocast belongs inside it.

        Over several ranks each hands over its own samples, as many as it has, and the result is the gradient of them
        all together. A rank without samples returns losses of shape (0,). These need a graph only where the model is
        wrapped (the others wait for this rank's backward); a model that cannot run on nothing then runs on any one
        sample, with ``mask=torch.tensor([False])``. If no sample of any rank counts there is nothing to descend: the
        report is not finite and ``p.grad`` is None, so that an optimizer does nothing.

        Args:
            per_sample_loss: takes nothing, returns the losses (B,) of the batch, with a graph; or a ``Forward``, which
                holds what an objective needs beside them.
            domains: (B,) integers; any values, in any order, any of them absent (with ``num_domains``: in range).
            mask: (B,) bool; samples where it is False count nowhere, as if they were not there, also where their loss
                is not finite (see ``masking``). Unset: all count.
            objective: what is descended in the place of the mean loss; the perturbation then climbs it minus the
                variance term, ``J - lambda * Var(L_d)``.

        Returns:
            A report of this step. If anything raises in a pass, the weights are restored and ``p.grad`` is None.

        Raises:
            ValueError: losses that are not a (B,) tensor with a graph, or domains that do not match them.
            torch.OutOfMemoryError: as it came, with a note that suggests a size of micro-batches.
        """
        return self._step([per_sample_loss], [domains], [mask], "two_phase", None, objective)

    def backward_accumulated(
        self,
        per_sample_losses: Sequence[PerSampleLoss],
        domains: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        mode: Mode = "auto",
        no_sync: NoSync | None = None,
        objective: DomainObjective | None = None,
        way: Mode | None = None,
    ) -> StepReport:
        """``backward`` on a batch that goes through the model in micro-batches: the same gradient, in less memory.

        The variance over domains belongs to the whole effective batch (over all micro-batches and ranks), so this is no
        sum over micro-batches: take one optimizer step after one call.

        .. code-block:: python

            micro_batches = [(images, labels, domains), ...]
            losses = [lambda x=x, y=y: cross_entropy(model(x), y, reduction="none") for x, y, _ in micro_batches]
            report = disam.backward_accumulated(losses, [domains for _, _, domains in micro_batches])
            optimizer.step()

        Modes of pass 1, which differ in cost alone:

        - ``two_phase``: a pass without a graph for the losses, then the weighted gradients. One forward more.
        - ``per_domain``: all samples of a micro-batch are of one domain; one gradient per domain is kept, and no
          forward is added. Not for objectives that depend on more sums than those of the losses.
        - ``auto``: one pass where the weights need no losses (ERM, SAM); else ``per_domain`` where it is possible on
          every rank and the kept gradients take at most 256 MiB; else ``two_phase``.

        An objective that is more than a mean is computed so in pass 2 as well.

        Args:
            per_sample_losses: one per micro-batch, as in ``backward``; ``two_phase`` calls them up to three times. Each
                micro-batch sees the same random numbers every time.
            domains: one tensor per micro-batch. On the host (with ``num_domains``) they let ``per_domain`` see, without
                asking the device, which domain a micro-batch is of.
            masks: one per micro-batch, or None for all.
            mode: see above.
            no_sync: of a wrapper that reduces gradients, such as ``DistributedDataParallel.no_sync``: all micro-batches
                run inside it, and the gradients are added up here, once per pass. Without it a wrapper communicates in
                every micro-batch, and every rank needs the same number of them. With it, or with ``reduce_gradients``,
                a rank may have any number, or none.
            objective: see ``backward``.
            way: the former name of ``mode``; it goes away in 0.3.

        Raises:
            ValueError: see ``backward``; a mode that is not possible.
        """
        if way is not None:
            text = "backward_accumulated(way=...) is now called mode=...; way goes away in 0.3"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            mode = way
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        return self._step(per_sample_losses, domains, masks, mode, no_sync, objective)

    # -- the step, in order ----------------------------------------------------------------------------------

    def _step(
        self,
        per_sample_losses: Sequence[PerSampleLoss],
        domains: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        mode: Mode,
        no_sync: NoSync | None,
        objective: DomainObjective | None,
    ) -> StepReport:
        objective = DomainObjective() if objective is None else objective
        ranks = Ranks.of(self._group, self.reduce_gradients, no_sync)
        batch = EffectiveBatch.of(
            per_sample_losses,
            domains,
            masks,
            num_domains=self.num_domains,
            params=self.params,
            ranks=ranks,
            objective=objective,
        )
        passes = Passes(self.params, batch, ranks, objective, self._backward, lambda: self._scale.seen)
        climbs = self.rho > 0  # otherwise pass 1 descends, and is the only one
        weights = restored(self.params)
        self._clear_gradients()
        try:
            first = passes.first(self._target(climbs), mode, with_plain_gradients=self.ascent_cosine and climbs)
            if self._counts_nothing(batch, first.sums):
                self._clear_gradients()  # an optimizer leaves parameters alone that have no gradient
                return StepReport.of(objective, first, perturbed=first.sums)
            if not climbs:
                return StepReport.of(objective, first, perturbed=first.sums)
            gradients = [p.grad for p in self.params]
            direction = self._direction(gradients, ranks)
            kept = None if self.descent == "sam" else FirstGradient(self.params, gradients)
            cosine = None
            if first.plain_gradients is not None:
                cosine = direction.cosine(self._direction(first.plain_gradients, ranks))
            self._clear_gradients()

            with weights:
                direction.add_(self.rho)
                self._drop_copies_of_weights()
                perturbed = passes.second(first.sums.count_D)
            self._drop_copies_of_weights()
            if kept is not None:
                kept.combine_(self.descent, self.alpha)
            poison_unless_(direction.is_finite, self.params)
            self._check_arrival(first.sums, perturbed, direction)
            return StepReport.of(
                objective,
                first,
                perturbed,
                ascent_norm=self._scale.at_scale_1(direction.norm),
                direction_is_finite=direction.is_finite,
                ascent_cosine=cosine,
            )
        except BaseException as error:
            weights.copy_back()  # an interrupt may have hit the exit of the block above
            self._clear_gradients()  # half a gradient must not reach an optimizer
            self._drop_copies_of_weights()
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(batch.advice_on_memory)
            raise

    def _target(self, climbs: bool) -> Target:
        if not climbs:
            return Target(0.0, in_ascent=False)
        return Target(self.variance_weight, True, self.variance_over, self.variance_scale, self.variance_form)

    def _counts_nothing(self, batch: EffectiveBatch, sums: DomainSums) -> bool:
        """Whether no sample of any rank counts. Every rank comes to the same answer; only one that has no sample which
        surely counts waits for the device to know it."""
        return not batch.surely_counts and not bool(sums.total > 0)

    def _clear_gradients(self) -> None:
        # not through an optimizer: a wrapped zero_grad may do nothing inside an accumulation context
        for p in self.params:
            p.grad = None

    def _backward(self, loss: Tensor) -> None:
        loss = self._scale.watch(loss)
        if self._call_backward is not None:
            self._call_backward(loss)
        elif self._sharded:
            loss.backward()  # the leaves are unsharded copies, which only their owner knows
        else:
            loss.backward(inputs=self.params)

    def _direction(self, gradients: list[Tensor | None], ranks: Ranks) -> AscentDirection:
        back = None
        if self.descent == "sagm" and self.alpha > 0:
            device = self.params[0].device
            back = self._scale.at_scale_1(torch.full((), self.alpha, dtype=accumulation_dtype(device), device=device))
        direction = AscentDirection(
            self.params, gradients, adaptive=self.adaptive, back=back, rho_factors=self.rho_factors
        )
        if ranks.size > 1 and not self._replicas_checked:
            ranks.check_replicas_agree(direction.norm)
            self._replicas_checked = True
        return direction

    def _drop_copies_of_weights(self) -> None:
        """The weights changed in place: whatever was computed from them is old."""
        # an autocast around both passes would serve the second the casts of the unperturbed weights
        torch.clear_autocast_cache()
        if self._reshard is not None:
            self._reshard()

    def _check_arrival(self, sums: DomainSums, perturbed: DomainSums, direction: AscentDirection) -> None:
        if not self._sharded or self._arrived:
            return
        norm = self._scale.at_scale_1(direction.norm)
        least_rho = self.rho * min([1.0, *self.rho_factors.values()])
        back = self.alpha * norm if self.descent == "sagm" else 0.0
        self._arrived = perturbation_arrived(sums, perturbed, (least_rho - back) * norm)
        if self._arrived is False:
            raise ValueError(
                "pass 2 ran on the unperturbed weights: the model keeps unsharded copies of them after the backward; "
                "use fully_shard's reshard_after_backward, or give DISAM reshard=..., which reshards every FSDPModule"
            )
