"""A linear head on normalised features, fitted to its minimum.

Shapes in this file: M images, C classes, E width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = 65_536
"""Rows at once: with 1000 classes their logits take half a gigabyte."""


@dataclass(frozen=True)
class FittedHead:
    """Where the minimisation ended; the tensors are float64.

    Attributes:
        loss: the mean cross entropy of the rows, without the penalty.
        top1: the share of rows whose largest logit is that of their class.
        steps: of L-BFGS that were taken; fewer than allowed where it came to the minimum.
    """

    weight_CE: Tensor
    bias_C: Tensor
    loss: float
    top1: float
    steps: int


@torch.no_grad()
def fit_head(
    features_ME: Tensor,
    labels_M: Tensor,
    weight_CE: Tensor,
    bias_C: Tensor,
    *,
    train_bias: bool = True,
    weight_decay: float = 0.0,
    steps: int = 200,
) -> FittedHead:
    """Multinomial logistic regression: minimise over W and b the mean cross entropy of ``f W^T + b`` plus
    ``weight_decay / 2 * |W - W_start|^2``, with L-BFGS in float64 on all rows at once.

    The function is convex, and with ``weight_decay > 0`` it has one minimum, which depends neither on an order of the
    rows nor on random numbers.

    Args:
        features_ME: normalised.
        labels_M: int64.
        weight_CE, bias_C: where it starts; they stay as they are.
        steps: at most so many.
    """
    features_ME, start_CE = features_ME.detach(), weight_CE.detach().double()
    weight, bias = start_CE.clone().requires_grad_(), bias_C.detach().double().clone()
    parameters = [weight, bias.requires_grad_()] if train_bias else [weight]
    minimiser = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=2 * steps + 20,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def cross_entropy(rows: slice) -> Tensor:
        """The sum over some rows."""
        logits = nn.functional.linear(features_ME[rows].double(), weight, bias)
        return nn.functional.cross_entropy(logits, labels_M[rows], reduction="sum")

    count = len(features_ME)
    every = [slice(first, first + ROWS) for first in range(0, count, ROWS)]

    def objective() -> float:
        minimiser.zero_grad()
        with torch.enable_grad():
            total = 0.5 * weight_decay * (weight - start_CE).square().sum()
            total.backward()
            value = total.item()
            for rows in every:
                part = cross_entropy(rows) / count
                part.backward()
                value += part.item()
        return value

    minimiser.step(objective)
    loss = sum(cross_entropy(rows).item() for rows in every) / count
    right = sum(
        int((nn.functional.linear(features_ME[rows].double(), weight, bias).argmax(1) == labels_M[rows]).sum())
        for rows in every
    )
    taken = int(minimiser.state[weight].get("n_iter", 0))
    return FittedHead(weight.detach(), bias.detach(), loss, right / count, taken)
