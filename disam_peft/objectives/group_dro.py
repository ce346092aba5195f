"""GroupDRO: the domains' mean losses, weighted by q that grows where the loss is high.

Shapes in this file: D domains in play, A domains ever seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disam_peft.config.penalties import GroupDROConfig
from disam_peft.disam.domain_sums import DomainSums, accumulation_dtype
from disam_peft.objectives.base import Penalty
from disam_peft.objectives.domain_state import DomainState
from disam_peft.objectives.whole_batch import outputs_of, whole_batch


def group_dro(
    logits: Tensor, labels: Tensor, domains: Tensor, q: Tensor, *, eta: float = 0.01, ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """One step of DomainBed's GroupDRO on a whole batch: ``(sum_d q_d L_d, q)`` with q after the step.

    ``q_d`` is multiplied by ``exp(eta L_d)``, L_d the mean cross entropy of domain d, and normalised; then it weighs
    the losses, and no gradient runs through it. DomainBed starts with ones. Where the batch lacks a domain (DomainBed's
    never do) it keeps its q, the others keep their sum, and the weights of the losses are normalised over the others.

    Args:
        logits: (B, C).
        labels: (B,).
        domains: (B,) integers; any values.
        q: (D,) before the step, for ``ids``.
        ids: the domains that q belongs to, ascending; unset: those in the batch.

    Returns:
        The loss, shape (), with a graph, and q, which sums to one.

    Raises:
        ValueError: q has not as many entries as there are ids.
    """
    return _step(GroupDROConfig(eta=eta), logits, labels, domains, q, ids, None)


def group_dro_sagawa(
    logits: Tensor,
    labels: Tensor,
    domains: Tensor,
    q: Tensor,
    *,
    eta: float = 0.01,
    normalize_loss: bool = False,
    adjustment: float = 0.0,
    group_counts: Tensor | None = None,
    ids: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of GroupDRO as in the code of its authors (kohpangwei/group_DRO): ``(loss, q)`` with q after the step.

    A group that the batch lacks has the loss 0: its q is multiplied by 1 and takes part in the normalisation, so that
    the q of the groups in the batch do not sum to one. Their code starts with ``1 / D``. With an adjustment C the loss
    that it *returns* is ``sum_d q_d (L_d + C / sqrt(n_d))``, because it adds in place; the gradient is that of
    ``sum_d q_d L_d``. Training reports the objective without this quirk. (Their code also takes a C for each group, and
    then none at all where one of them is 0.)

    Args:
        logits: (B, C).
        labels: (B,).
        domains: (B,) integers; any values.
        q: (D,) before the step, for ``ids``.
        normalize_loss: whether the losses that move q, adjusted if they are, are divided by their sum; where that
            is 0, q stays what it is.
        adjustment: C, which adds ``C / sqrt(n_d)`` to the losses that move q, also those of absent groups. 0: none.
        group_counts: n_d, (D,), samples of each group in the training set; needed with an adjustment.
        ids: the groups that q belongs to, ascending; unset: 0 to D - 1.

    Returns:
        The loss, shape (), with a graph, and q, which sums to one.

    Raises:
        ValueError: q has not as many entries as there are ids; an adjustment without counts.
    """
    config = GroupDROConfig(variant="sagawa", eta=eta, normalize_loss=normalize_loss, adjustment=adjustment)
    ids = range(len(q)) if ids is None else ids
    loss, moved_D = _step(config, logits, labels, domains, q, ids, group_counts)
    if adjustment > 0 and group_counts is not None:
        loss = loss + (moved_D * adjustment / group_counts.to(moved_D).sqrt()).sum()
    return loss, moved_D


class GroupDRO(Penalty):
    """See ``group_dro`` and ``group_dro_sagawa``. It stands in the place of the mean loss.

    The state is the logarithm of q, up to a constant: no loss is too large for it, and no q is lost below the smallest
    number. A domain that comes into play later starts with the average of q over the others.
    """

    config: GroupDROConfig
    replaces_mean = True

    def __init__(self, config: GroupDROConfig) -> None:
        super().__init__(config)
        self._log_q = DomainState()
        self._train_count_A: Tensor | None = None

    def prepare(self, train_count_A: Tensor) -> None:
        self._train_count_A = train_count_A

    def begin_step(self, sums: DomainSums) -> None:
        state, train_count_D = self._log_q, self._counts_in_training(sums.ids_D)
        start_D = torch.zeros_like(sums.count_D)
        if train_count_D is not None and self.config.variant == "sagawa":
            start_D = start_D.masked_fill(train_count_D == 0, -torch.inf)  # no group
        state.bring_into_play(sums.ids_D, start_D)
        loss_D = sums.mean_of(sums.sum_D)
        if self.config.variant == "domainbed":
            moved_A, moves_A = state.among_all(loss_D), state.among_all(sums.present_D) > 0
        else:
            moved_A, moves_A = state.among_all(self._adjusted(loss_D, train_count_D)), torch.isfinite(state.value_A)
        log_q_A = state.value_A
        moved_A = _share_kept(log_q_A, log_q_A + self.config.eta * moved_A, moves_A)
        # The losses that move q may be no numbers where the losses are: normalised, their sum may be 0.
        moves = torch.isfinite(loss_D).all() & (moved_A < torch.inf).all()
        state.value_A = torch.where(moves, moved_A, log_q_A)

    def _adjusted(self, loss_D: Tensor, train_count_D: Tensor | None) -> Tensor:
        """The losses that move q in the code of Sagawa et al."""
        if self.config.adjustment > 0:
            if train_count_D is None:
                raise ValueError(
                    "the adjustment of groupdro needs the number of training samples of each domain; hand them over "
                    "with Objective.prepare(counts)"
                )
            adjustment_D = self.config.adjustment / train_count_D.clamp(min=1).sqrt()
            loss_D = loss_D + adjustment_D.where(train_count_D > 0, 0.0)
        return loss_D / loss_D.sum() if self.config.normalize_loss else loss_D

    def _counts_in_training(self, ids_D: Tensor) -> Tensor | None:
        if self._train_count_A is None:
            return None
        if self._train_count_A.device != ids_D.device:
            self._train_count_A = self._train_count_A.to(ids_D.device, accumulation_dtype(ids_D.device))
        last = len(self._train_count_A) - 1
        return self._train_count_A[ids_D.clamp(max=last)].where(ids_D <= last, 0.0)

    def value(self, sums: DomainSums) -> Tensor:
        return (self._weight_of(sums) * sums.mean_of(sums.sum_D)).sum()

    def domain_values(self, sums: DomainSums) -> Mapping[str, Tensor]:
        return {"q": self._weight_of(sums)}

    def _weight_of(self, sums: DomainSums) -> Tensor:
        """What multiplies the mean loss of each domain, (D,); 0 for absent ones."""
        if self.config.variant == "domainbed":
            log_q_D = self._log_q.value_D.where(sums.present_D > 0, -torch.inf)
            return log_q_D.softmax(dim=0)
        return self._log_q.value_A.softmax(dim=0)[self._log_q.where_D] * sums.present_D

    @property
    def q_D(self) -> Tensor:
        """q of the domains in play, (D,); it sums to one over all that were ever seen."""
        return self._log_q.value_A.softmax(dim=0)[self._log_q.where_D]

    def state_dict(self) -> dict[str, Tensor]:
        return self._log_q.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._log_q.load_state_dict(state)


def _share_kept(before_A: Tensor, after_A: Tensor, moves_A: Tensor) -> Tensor:
    """Logarithms of q after a step: those that move keep their sum, the others are left as they are."""
    sums = [log_A.where(moves_A, -torch.inf).logsumexp(dim=0) for log_A in (before_A, after_A)]
    return torch.where(moves_A, after_A + sums[0] - sums[1], before_A)


def _step(
    config: GroupDROConfig,
    logits: Tensor,
    labels: Tensor,
    domains: Tensor,
    q: Tensor,
    ids: Sequence[int] | None,
    group_counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    penalty = GroupDRO(config)
    sums = whole_batch(penalty, outputs_of(logits, labels), domains, ids)
    if len(q) != len(sums.ids_D):
        raise ValueError(
            f"q has {len(q)} entries for the domains {sums.ids_D.tolist()}; hand over ids=..., one for each"
        )
    sums = replace(sums, ids_D=torch.arange(len(q), device=sums.ids_D.device))  # as group_counts are numbered
    if group_counts is not None:
        penalty.prepare(torch.as_tensor(group_counts).to(sums.count_D))
    log_q = torch.as_tensor(q).to(sums.count_D).log()
    penalty.load_state_dict({"domain_ids": sums.ids_D, "values": log_q})
    with torch.no_grad():
        penalty.begin_step(sums)
    return penalty.value(sums), penalty.q_D
