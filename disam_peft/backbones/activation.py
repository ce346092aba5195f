"""QuickGELU with one tensor kept for backward instead of two.

Both families write it ``x * sigmoid(1.702 x)``: three functions, of which the product keeps ``x`` and the sigmoid, the
widest activations of a block. It is ``silu(1.702 x) / 1.702``, where silu is one function that keeps its input alone.
"""

from __future__ import annotations

from torch import Tensor, nn

SLOPE = 1.702


class QuickGelu(nn.Module):
    """``x * sigmoid(1.702 x)`` of any shape (Hendrycks and Gimpel, arXiv 1606.08415, section 4), up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        # In place: silu's backward needs its input, not its output.
        return nn.functional.silu(SLOPE * x).mul_(1 / SLOPE)


def replace_quick_gelu(root: nn.Module, theirs: type[nn.Module]) -> None:
    """Replace, in place, every module of the family's own class ``theirs`` below ``root``; it holds no weights."""
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if type(child) is theirs:
                setattr(parent, name, QuickGelu())
