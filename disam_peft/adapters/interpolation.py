"""WiSE-FT: weights on the line through zero-shot (alpha = 0) and trained weights (alpha = 1), and beyond.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from disam_peft.errors import UserError

MoveTo = Callable[[float], None]
"""Puts the weights at this alpha."""


MOST_ALPHA = 2.0
"""As far beyond the trained weights as these are from zero-shot. The paper looks a little beyond 1."""


def wise_ft(theta0: Tensor, theta1: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) theta0 + alpha theta1``, elementwise: theta0 itself at alpha = 0, and theta1 itself at alpha = 1.

    Args:
        theta0, theta1: zero-shot and trained weights, of one shape.
        alpha: any number; above 1 it goes beyond the trained weights.
    """
    return (1 - alpha) * theta0 + alpha * theta1


def wise_ft_fisher(
    theta0: Tensor, theta1: Tensor, fisher0: Tensor | None, fisher1: Tensor | None, alpha: float, floor: float = 1e-8
) -> Tensor:
    """The mean of two weights in which each element counts by its diagonal Fisher information, as the authors' code
    has it (mlfoundations/wise-ft, ``_merge``): ``(c0 theta0 + c1 theta1) / (c0 + c1)`` with ``c0 = (1 - alpha)
    max(fisher0, floor)`` and ``c1 = alpha max(fisher1, floor)``.

    Args:
        theta0, theta1: zero-shot and trained weights, of one shape.
        fisher0, fisher1: of that shape; None: the tensor has no Fisher information, which counts as ones.
        alpha: from 0 to 1.
        floor: the smallest Fisher information; the authors' default is 1e-8.
    """
    of0, of1 = (torch.ones_like(theta0) if fisher is None else fisher.clamp(min=floor) for fisher in (fisher0, fisher1))
    c0, c1 = (1 - alpha) * of0, alpha * of1
    return (c0 * theta0 + c1 * theta1) / (c0 + c1)


def require_alpha(alpha: float) -> None:
    """Pass if this is an alpha that weights are put at: ``frontier``, ``evaluate`` and ``export`` have this one rule.

    Raises:
        UserError: it is not.
    """
    if not 0 <= alpha <= MOST_ALPHA:  # also where it is NaN
        raise UserError(
            f"alpha={alpha:g} is no place on the line from zero-shot to trained weights: give a number from 0 "
            f"(zero-shot) over 1 (trained) to {MOST_ALPHA:g}, for example 0.5"
        )


@contextmanager
def tensors_on_a_line(trained: Mapping[str, nn.Parameter], zero_shot: Mapping[str, Tensor]) -> Iterator[MoveTo]:
    """Inside, the parameters can be put at any alpha, in place; afterwards they have the bits that they had before.

    Args:
        trained: parameters by name.
        zero_shot: the values of those that move at alpha = 0, by the same names. The others stay as they are.
    """
    moved = {name: (trained[name], start, trained[name].detach().clone()) for name, start in zero_shot.items()}

    @torch.no_grad()
    def move_to(alpha: float) -> None:
        require_alpha(alpha)
        for parameter, start, end in moved.values():
            parameter.copy_(wise_ft(start, end, alpha))

    try:
        yield move_to
    finally:
        with torch.no_grad():
            for parameter, _, end in moved.values():
                parameter.copy_(end)
