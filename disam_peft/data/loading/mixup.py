"""Mixup between domains: every image of a batch is mixed with one of another domain.

The partners and shares of a step are a pure function of the seed and the step's number, and they are drawn for the
whole batch, so that they are the same on any number of processes and after a resume. Letters: B samples of this
process, X samples that it loads, P places of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disam_peft.common.device import to_device
from disam_peft.common.random import keyed_seed
from disam_peft.data.loading.sampler import DomainBatches


def draw_partners(domain_P: np.ndarray, alpha: float, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a batch the place of its partner, and its own share of the mixture: (P,) int64, (P,) float64.

    As in DomainBed (Gulrajani and Lopez-Paz 2021, arXiv 2007.01434, after arXiv 1912.01805 and 2001.00677) the domains
    of the batch stand in a circle, in an order drawn for the step, and each is mixed with the next: its k-th image with
    the k-th one there. One share is drawn from Beta(alpha, alpha) for each pair of domains. The larger part of it is
    the sample's own, so that the domain of a mixture, that of the larger share, is the sample's: a batch has as many
    images of each domain as without mixup. Each image is once the larger and once the smaller part. The distribution
    of a single mixture is DomainBed's, since both its images come in either order with the same probability.

    A batch of a single domain is not mixed: every place is its own partner, with a share of 1.
    """
    partner_P, share_P = np.arange(len(domain_P)), np.ones(len(domain_P))
    rng = np.random.default_rng(keyed_seed(seed, "mixup", step))
    circle = rng.permutation(np.unique(domain_P))
    drawn = rng.beta(alpha, alpha, size=len(circle))
    if len(circle) == 1:
        return partner_P, share_P
    for domain, following, share in zip(circle, np.roll(circle, -1), drawn, strict=True):
        own, others = np.flatnonzero(domain_P == domain), np.flatnonzero(domain_P == following)
        partner_P[own] = others[np.arange(len(own)) % len(others)]
        share_P[own] = max(share, 1 - share)
    return partner_P, share_P


@dataclass(frozen=True)
class Mixtures:
    """How a process mixes its part of a batch.

    Attributes:
        draws: (index, epoch) of its own B samples, and then of their partners that are not among them; X in all.
        partner_B: position of each sample's partner in ``draws``.
        share_B: what each sample has of its mixture; the partner has the rest.
    """

    draws: list[tuple[int, int]]
    partner_B: np.ndarray
    share_B: np.ndarray


class MixedBatches(DomainBatches):
    """``DomainBatches`` whose samples are mixed with others of another domain, see ``draw_partners``.

    Iterating gives the ``draws`` that a process must load in each step: with one process the batch itself, with more up
    to twice its part. ``mixed`` makes mixtures of what a loader reads of them.

    Args:
        alpha: of the Beta distribution of the shares.
        options: as for ``DomainBatches``.
    """

    def __init__(
        self,
        domain_ids: np.ndarray | Sequence[int],
        batch_size: int,
        seed: int,
        steps: int,
        *,
        alpha: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(domain_ids, batch_size, seed, steps, **options)
        self._domain_N, self._seed, self._alpha = np.asarray(domain_ids), seed, alpha

    def mixtures(self, step: int) -> Mixtures:
        """How this process mixes its part of the batch of ``step``."""
        batch = self.global_batch(step)
        domain_P = self._domain_N[[index for index, _ in batch]]
        partner_P, share_P = draw_partners(domain_P, self._alpha, self._seed, step)
        own = range(self.rank, len(batch), self.world_size)
        place_of = {place: row for row, place in enumerate(own)}
        partner_B = [place_of.setdefault(int(partner_P[place]), len(place_of)) for place in own]
        draws = [batch[place] for place in place_of]
        return Mixtures(draws, np.array(partner_B, dtype=np.int64), share_P[own.start :: self.world_size])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            yield self.mixtures(step).draws


def mixed(batches: Iterable[dict[str, Tensor]], sampler: MixedBatches) -> Iterator[dict[str, Tensor]]:
    """What a loader read of ``sampler``'s draws, as batches of mixtures.

    ``pixels`` (or ``frozen``) (B, ...) are mixed; ``labels``, ``domains`` and ``indices`` (B,) are those of the image
    with the larger share. ``other_labels`` (B,) int64 are those of its partner, and ``shares`` (B,) float32 what the
    first has of the mixture. Pixels are mixed after augmentation, on the device where they are.
    """
    for batch, step in zip(batches, range(sampler.first_step, sampler.steps), strict=True):
        mixtures = sampler.mixtures(step)
        count = len(mixtures.partner_B)
        partner_B = torch.from_numpy(mixtures.partner_B)
        share_B = torch.from_numpy(mixtures.share_B).float()
        of_own = {name: tensor[:count] for name, tensor in batch.items()}
        for name in {"pixels", "frozen"} & batch.keys():
            of_own[name] = _mixture(of_own[name], _rows(batch[name], partner_B), share_B)
        yield {**of_own, "other_labels": _rows(batch["labels"], partner_B), "shares": share_B}


def _rows(tensor: Tensor, row_B: Tensor) -> Tensor:
    return tensor.index_select(0, to_device(row_B, tensor.device))


def _mixture(own_B: Tensor, other_B: Tensor, share_B: Tensor) -> Tensor:
    """``share * own + (1 - share) * other``, in float32 or wider, in the dtype of what is mixed."""
    wide = torch.promote_types(own_B.dtype, torch.float32)
    share_B = to_device(share_B, own_B.device).to(wide).view(-1, *[1] * (own_B.ndim - 1))
    return (share_B * own_B + (1 - share_B) * other_B).to(own_B.dtype)
