"""QuickGELU: the same function as the families', with less kept for backward."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from disam_peft.backbones.blocks import QuickGelu, replace_quick_gelu

X = torch.linspace(-12, 12, 1001, dtype=torch.float64)


def kept_for_backward(function: nn.Module, x: Tensor) -> int:
    """Elements, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x).sum().backward()
    return sum(count for count in kept.values() if count > 1)


@pytest.mark.parametrize("theirs", [QuickGELU, QuickGELUActivation])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-15), (torch.float32, 3e-7)])
def test_value_and_gradient_are_those_of_the_family(theirs: type[nn.Module], dtype: torch.dtype, limit: float) -> None:
    x = X.to(dtype).requires_grad_()
    ours, wanted = QuickGelu()(x), theirs()(x)
    (one,), (other,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(wanted.sum(), x)
    assert (ours - wanted).abs().max() <= limit * 12
    assert (one - other).abs().max() <= limit * 12
    assert wanted.min() < -0.09  # QuickGELU and neither ReLU nor SiLU, whose least value is -0.28


@pytest.mark.parametrize("theirs", [QuickGELU, QuickGELUActivation])
def test_one_tensor_is_kept_in_place_of_two(theirs: type[nn.Module]) -> None:
    x = X.clone().requires_grad_()
    assert kept_for_backward(theirs(), 2 * x) == 2 * len(X)
    assert kept_for_backward(QuickGelu(), 2 * x) == len(X)


def test_only_the_class_that_is_named_is_replaced() -> None:
    class Other(QuickGELU):
        """Not known to be the same function."""

    root = nn.Sequential(QuickGELU(), nn.GELU(), nn.Sequential(Other(), QuickGELU()))
    replace_quick_gelu(root, QuickGELU)
    assert [type(module).__name__ for module in (root[0], root[1], *root[2])] == [
        "QuickGelu",
        "GELU",
        "Other",
        "QuickGelu",
    ]
