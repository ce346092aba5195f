"""SHiRA's places in the weights of a layer, which peft reads from a file as they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from disam_peft.errors import UserError

_INDICES = ".shira_indices"


def require_indices(layers: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Pass if all places are inside of their layers: torch would read beyond the weights, or fail in the next forward.

    Args:
        layers: the adapted layers by their names in the model.
        state: of an adapter, with peft's names; rows and columns of the trained weights are (2, n).

    Raises:
        UserError: a row or a column that a layer does not have.
    """
    for name, indices_2N in state.items():
        if not name.endswith(_INDICES):
            continue
        layer = layers[name.removesuffix(_INDICES).removeprefix("base_model.model.")]
        sides = torch.tensor(layer.get_submodule("base_layer").get_parameter("weight").shape)
        largest, smallest = indices_2N.amax(dim=1).cpu(), indices_2N.amin(dim=1).cpu()
        if bool((smallest < 0).any() or (largest >= sides).any()):
            raise UserError(
                f"{name} has places up to {largest.tolist()}, and the layer's weights are {sides.tolist()}. Nothing "
                "was loaded; use the file that training wrote"
            )


def say_nothing_of_sparse_checks() -> None:
    """torch remarks once that it does not check sparse tensors; here their places are checked when they are read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int), torch.zeros(1), (1, 1))
