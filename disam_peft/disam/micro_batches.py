"""The micro-batches of one step: the parts of a batch that go through the model one after another.

Shapes in this file: B samples of a micro-batch, M micro-batches of this rank, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disam_peft.disam.domain_objective import DomainObjective, DomainsOfSamples, Forward
from disam_peft.disam.domain_sums import DomainSums, domain_index, domain_sums, union_of_ids
from disam_peft.disam.masking import Watch, finite_where_masked, guard_gradients
from disam_peft.disam.random_state import RandomState
from disam_peft.disam.ranks import Ranks

PerSampleLoss = Callable[[], Tensor | Forward]
SEVERAL = -1

_LEFT_WAITING = (
    "this rank has no samples and its losses have no graph, but the model is wrapped and the other ranks wait for this "
    "one's backward: run the model on the empty batch, or on any one sample with mask=[False], or leave the model "
    "unwrapped and give DISAM reduce_gradients=True"
)
_NO_OUTPUTS = (
    "the objective needs outputs of the model beside the losses: per_sample_loss must return "
    "Forward(losses, outputs=...), also for a batch without samples"
)


@dataclass(frozen=True)
class MicroBatchLosses:
    """The result of one forward pass of a micro-batch.

    Attributes:
        loss_B: the losses that are descended; 0, and without a gradient, where masked.
        reported_B: the losses that a report shows, if they are others.
        statistics: sums of the outputs over the samples of each domain, with their graph.
        terms: parts of the losses that a report shows.
        micro_batch: whose they are.
    """

    loss_B: Tensor
    reported_B: Tensor | None
    statistics: tuple[Tensor, ...]
    terms: tuple[Tensor, ...]
    micro_batch: MicroBatch

    def sums(self) -> DomainSums:
        """Sums per domain, without a graph."""
        of = self.micro_batch
        return domain_sums(self.loss_B, of.index_B, of.ids_D, of.mask_B, self.reported_B, self.statistics, self.terms)

    def weighted(self, weight_D: Tensor, statistics_weights: Sequence[Tensor | None], factor: float) -> Tensor:
        """The surrogate ``factor (sum_i weight_d(i) l_i + sum over the statistics of <weights, statistic>)``.

        Args:
            weight_D: (D,), or () where all are equal. All weights are numbers, no graph runs through them.
            statistics_weights: one for each statistic, or None where the objective of this pass does not depend on it;
                empty where it depends on none.
        """
        weight_B = weight_D.expand(len(self.loss_B)) if weight_D.ndim == 0 else weight_D[self.micro_batch.index_B]
        surrogate = torch.dot((weight_B * factor).to(self.loss_B.dtype), self.loss_B)
        for weights, statistic in zip(statistics_weights, self.statistics, strict=len(statistics_weights) > 0):
            if weights is not None:
                surrogate = surrogate + (weights * factor * statistic).sum().to(surrogate.dtype)
        return surrogate


@dataclass
class MicroBatch:
    """What goes through the model at once. However often it does, it sees the random numbers of the first time.

    Attributes:
        per_sample_loss: gives the losses (B,), or a ``Forward``.
        index_B: position of each sample's domain among the ids in play.
        mask_B: False for samples that count nowhere; None where all count.
        ids_D: the ids in play.
        params: the trained parameters; their devices are those whose random numbers are replayed.
        awaited: other ranks wait inside a wrapper around the model until this one's backward joins in.
        objective: says which sums of the outputs are needed.
    """

    per_sample_loss: PerSampleLoss
    index_B: Tensor
    mask_B: Tensor | None
    ids_D: Tensor
    params: Sequence[Tensor]
    awaited: bool
    objective: DomainObjective
    _random_state: RandomState | None = None

    def losses(self) -> MicroBatchLosses:
        """The losses with their graph.

        Raises:
            ValueError: they are no (B,) tensor with a graph, or do not match the domains. Without samples they need no
                graph, unless other ranks wait for the backward.
        """
        found = self._called() if self.mask_B is None else self._called_with(self.mask_B)
        loss_B = found.loss_B
        if len(loss_B) == 0 and not loss_B.requires_grad:
            if self.awaited:
                raise ValueError(_LEFT_WAITING)
            loss_B = loss_B.detach().requires_grad_()
        if not loss_B.requires_grad:
            raise ValueError("the losses have no graph: nothing that requires a gradient took part (or no_grad is on)")
        statistics = self._statistics(found)
        if self.mask_B is not None:
            guard_gradients((loss_B, *statistics), self.mask_B)
            loss_B = loss_B.where(self.mask_B, 0.0)
        return MicroBatchLosses(loss_B, found.reported_B, statistics, tuple(found.terms), self)

    @torch.no_grad()
    def sums_alone(self) -> DomainSums:
        """The sums per domain, from a forward pass without a graph."""
        found = self._called()
        # in older torch (before pytorch#165068) an autocast around all passes would serve pass 1 these casts of the
        # weights, which have no graph
        torch.clear_autocast_cache()
        statistics, terms = self._statistics(found), tuple(found.terms)
        return MicroBatchLosses(found.loss_B, found.reported_B, statistics, terms, self).sums()

    def counts(self) -> Tensor:
        """Samples per domain, (D,), without a look at the model."""
        no_loss_B = torch.zeros(len(self.index_B), device=self.index_B.device)
        return domain_sums(no_loss_B, self.index_B, self.ids_D, self.mask_B).count_D

    def _called(self) -> Forward:
        if self._random_state is None:
            self._random_state = RandomState.of(self.params)
        else:
            self._random_state.restore()
        result = self.per_sample_loss()
        if not isinstance(result, Forward):
            return Forward(self._checked(result))
        reported_B = None if result.reported_B is None else self._checked(result.reported_B)
        terms = tuple(self._checked(term_B) for term_B in result.terms)
        return Forward(self._checked(result.loss_B), reported_B, result.outputs, terms)

    def _called_with(self, mask_B: Tensor) -> Forward:
        """A forward pass whose backward pass reads nothing of masked samples that is not finite."""
        watch = Watch(mask_B)
        try:
            with watch.hooks():
                found = self._called()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # of torch.func, which allows none within it
                raise
            found = self._called()
        if watch.hides(found.loss_B):
            with finite_where_masked(mask_B):
                found = self._called()
        return found

    def _checked(self, loss_B: Tensor) -> Tensor:
        if not isinstance(loss_B, Tensor) or loss_B.ndim != 1:
            got = tuple(loss_B.shape) if isinstance(loss_B, Tensor) else type(loss_B).__name__
            raise ValueError(
                f"per_sample_loss must return one loss per sample, shape (B,), not {got}; use reduction='none'"
            )
        if loss_B.shape != self.index_B.shape:
            raise ValueError(f"domains has shape {tuple(self.index_B.shape)}, the losses have {tuple(loss_B.shape)}")
        loss_B = loss_B.to(self.index_B.device)
        # sums and weights of losses need more than half precision
        return loss_B.float() if loss_B.dtype in (torch.float16, torch.bfloat16) else loss_B

    def _statistics(self, found: Forward) -> tuple[Tensor, ...]:
        if not self.objective.has_statistics:
            return ()
        if found.outputs is None:
            raise ValueError(_NO_OUTPUTS)
        domains = DomainsOfSamples(self.index_B, len(self.ids_D), self.mask_B)
        return tuple(self.objective.statistics(found.outputs, domains))


@dataclass(frozen=True)
class EffectiveBatch:
    """All samples of one step on this rank.

    Attributes:
        micro_batches: at least one, which may be empty.
        ids_D: the domain ids in play, ascending, the same on every rank.
        index_on_host_MB: ``index_B`` of each micro-batch, where the host knows it without asking the device.
    """

    micro_batches: list[MicroBatch]
    ids_D: Tensor
    index_on_host_MB: Sequence[Tensor] | None = None

    @classmethod
    def of(
        cls,
        per_sample_losses: Sequence[PerSampleLoss],
        domains: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        *,
        num_domains: int | None,
        params: Sequence[Tensor],
        ranks: Ranks,
        objective: DomainObjective,
    ) -> EffectiveBatch:
        """The arguments of ``DISAM.backward_accumulated``, checked.

        Raises:
            ValueError: they do not fit together, or hold no sample on the only rank.
        """
        all_count = masks is None
        masks = [None] * len(domains) if masks is None else masks
        if not len(per_sample_losses) == len(domains) == len(masks):
            raise ValueError(
                f"{len(per_sample_losses)} losses, {len(domains)} tensors of domains and {len(masks)} masks: there "
                "must be one of each per micro-batch"
            )
        device = params[0].device
        awaited = ranks.size > 1 and not ranks.reduces_here
        domains_MB = [_checked_domains(d, num_domains) for d in domains]
        masks_MB = [_checked_mask(mask, d, device) for mask, d in zip(masks, domains_MB, strict=True)]
        on_host = all(d.device.type == "cpu" for d in domains_MB)
        if not domains_MB:  # this rank has nothing to do
            if awaited:
                raise ValueError(_LEFT_WAITING)
            if objective.has_statistics:
                raise ValueError(_NO_OUTPUTS)  # of what shape they would be, a forward pass alone can tell
            per_sample_losses = [lambda: torch.zeros(0, device=device)]
            domains_MB, masks_MB = [torch.zeros(0, dtype=torch.int64, device=device)], [None]
        sizes = [len(d) for d in domains_MB]
        joined_B = _sent(torch.cat(domains_MB), device) if on_host else torch.cat([d.to(device) for d in domains_MB])
        if len(joined_B) == 0 and ranks.size == 1:
            raise ValueError("the batch is empty")
        ids_D, index_B = domain_index(joined_B, num_domains)
        if ranks.size > 1 and num_domains is None:
            ids_D = union_of_ids(ids_D, ranks.group)
            index_B = torch.searchsorted(ids_D, joined_B)
        index_MB = index_B.split(sizes)
        micro_batches = [
            MicroBatch(loss, index, mask, ids_D, params, awaited, objective)
            for loss, index, mask in zip(per_sample_losses, index_MB, masks_MB, strict=True)
        ]
        known = on_host and all_count and num_domains is not None  # then an id is its own index
        return cls(micro_batches, ids_D, domains_MB if known else None)

    def counts(self) -> Tensor:
        """Samples per domain in each micro-batch, (M, D)."""
        return torch.stack([m.counts() for m in self.micro_batches])

    def single_domains(self) -> list[int]:
        """For each micro-batch the index of its only domain among the ids; ``SEVERAL`` where it holds more than one.

        Waits for the device, unless num_domains is given, the domains were handed over on the host, and all samples
        count.
        """
        if self.index_on_host_MB is not None:
            found = [set(index_B.tolist()) for index_B in self.index_on_host_MB]
            return [SEVERAL if len(of) > 1 else min(of, default=0) for of in found]
        count_MD = self.counts()
        return torch.where(count_MD.count_nonzero(dim=1) > 1, SEVERAL, count_MD.argmax(dim=1)).tolist()

    @property
    def surely_counts(self) -> bool:
        """Whether a sample counts, as far as the host can tell without asking the device: one in a micro-batch without
        a mask."""
        return any(m.mask_B is None and len(m.index_B) > 0 for m in self.micro_batches)

    @property
    def largest(self) -> int:
        """Samples in the largest micro-batch."""
        return max(len(m.index_B) for m in self.micro_batches)

    @property
    def advice_on_memory(self) -> str:
        """What helps where a step ran out of memory."""
        if self.largest < 2:
            return "out of memory on a single sample; the weights are restored. A smaller model or image size is needed"
        return (
            f"out of memory with up to {self.largest} samples at once; the weights are restored. Hand the batch over "
            f"in micro-batches of at most {self.largest // 2} samples (DISAM.backward_accumulated): the gradient stays "
            "the same"
        )


def _checked_domains(domains: Tensor, num_domains: int | None) -> Tensor:
    domains_B = torch.as_tensor(domains)
    if domains_B.ndim != 1:
        raise ValueError(f"domains must hold one id per sample, shape (B,), not {tuple(domains_B.shape)}")
    if len(domains_B) == 0:
        return domains_B.long()  # torch.tensor([]) is of a floating-point type
    if domains_B.is_floating_point() or domains_B.is_complex() or domains_B.dtype == torch.bool:
        raise ValueError(f"domains must be integers, not {domains_B.dtype}")
    domains_B = domains_B.long()
    # on an accelerator this check would wait for the device; index_add fails there by itself
    in_range = num_domains is None or domains_B.is_cuda or bool(((domains_B >= 0) & (domains_B < num_domains)).all())
    if not in_range:
        found = f"{int(domains_B.min())}..{int(domains_B.max())}"
        raise ValueError(f"with num_domains={num_domains} the domains must be in 0..{num_domains}-1, found {found}")
    return domains_B


def _checked_mask(mask: Tensor | None, domains_B: Tensor, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    mask_B = torch.as_tensor(mask)
    if mask_B.dtype != torch.bool or mask_B.shape != domains_B.shape:
        raise ValueError(
            f"a mask must be bool with the shape of the domains, {tuple(domains_B.shape)}, "
            f"not {mask_B.dtype} {tuple(mask_B.shape)}"
        )
    return mask_B.to(device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to ``device``, which a GPU is not waited for: the copy is from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
