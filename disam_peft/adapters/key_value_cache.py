"""The cache of Tip-Adapter as functions: which images are in it, its logits, and the search for its two factors.

Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", arXiv 2207.09519, and
their code (gaopengcuhk/Tip-Adapter), whose definitions hold where the paper leaves one open.

Shapes in this file: A passes over the images, M training images, N of them in the cache, B images of a batch, V images
of validation, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

AT_ONCE = 2**24
"""Affinities that the search keeps in memory at once."""
SEARCH_BEGINS = 0.1


def cache_rows(labels_M: Tensor, domains_M: Tensor, shots: int | Literal["all"], seed: int) -> Tensor:
    """Which images are in the cache, (N,) ascending: of each class and domain ``shots`` that are drawn, or all of them
    where there are fewer. The order of draws is the seed's alone."""
    if shots == "all":
        return torch.arange(len(labels_M), device=labels_M.device)
    order = torch.randperm(len(labels_M), generator=torch.Generator().manual_seed(seed))
    taken: dict[tuple[int, int], int] = {}
    rows = []
    labels, domains = labels_M.tolist(), domains_M.tolist()
    for row in order.tolist():
        cell = labels[row], domains[row]
        taken[cell] = taken.get(cell, 0) + 1
        if taken[cell] <= shots:
            rows.append(row)
    return torch.tensor(sorted(rows), dtype=torch.int64, device=labels_M.device)


def cache_keys(features_ANE: Tensor) -> Tensor:
    """Keys (N, E): the mean over the passes of features that are not normalised, then normalised."""
    return nn.functional.normalize(features_ANE.mean(dim=0), dim=-1)


def cache_logits(features_BE: Tensor, keys_NE: Tensor, values_NC: Tensor, beta: Tensor | float) -> Tensor:
    """``exp(-beta (1 - q K)) V`` (B, C) for normalised features q; keys are taken as they are."""
    return torch.exp(-beta * (1 - features_BE @ keys_NE.T)) @ values_NC


def tip_adapter(
    zero_shot_BC: Tensor,
    features_BE: Tensor,
    keys_NE: Tensor,
    values_NC: Tensor,
    alpha: Tensor | float,
    beta: Tensor | float,
) -> Tensor:
    """Tip-Adapter's logits (B, C): those of zero-shot classification plus ``alpha`` times those of the cache.

    Args:
        features_BE: normalised.
        values_NC: the class of each key, one-hot.
    """
    return zero_shot_BC + alpha * cache_logits(features_BE, keys_NE, values_NC, beta)


@dataclass(frozen=True)
class Searched:
    """The factors that a search found, and their accuracy: the mean over the domains of that in each."""

    alpha: float
    beta: float
    top1: float


def search_values(end: float, steps: int) -> list[float]:
    """``0.1 + i (end - 0.1) / steps`` for i = 0, ..., steps - 1; the end itself is not among them."""
    return [SEARCH_BEGINS + i * (end - SEARCH_BEGINS) / steps for i in range(steps)]


@torch.no_grad()
def search_factors(
    zero_shot_VC: Tensor,
    features_VE: Tensor,
    keys_NE: Tensor,
    values_NC: Tensor,
    labels_V: Tensor,
    domains_V: Tensor,
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Searched:
    """The pair with the highest accuracy, the first of equals: betas in order, and for each all alphas in order.

    With one domain it is the search of the authors' code. The mean over domains keeps a large domain from outvoting a
    small one, as selection does.

    Args:
        features_VE: normalised.
    """
    of_domain_V, count_D = torch.unique(domains_V, return_inverse=True, return_counts=True)[1:]
    rows = max(1, AT_ONCE // len(keys_NE))
    best = None
    for beta in betas:
        cached_VC = torch.cat([cache_logits(some_BE, keys_NE, values_NC, beta) for some_BE in features_VE.split(rows)])
        scores = []
        for alpha in alphas:
            right_V = ((zero_shot_VC + alpha * cached_VC).argmax(dim=1) == labels_V).double()
            right_D = right_V.new_zeros(len(count_D)).index_add(0, of_domain_V, right_V)
            scores.append((right_D / count_D).mean())
        for alpha, top1 in zip(alphas, torch.stack(scores).tolist(), strict=True):
            if best is None or top1 > best.top1:
                best = Searched(alpha, beta, top1)
    assert best is not None  # at least one value of each
    return best
