"""Tensors from a file against the tensors of an adapter: whatever does not fit is refused as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from disam_peft.errors import UserError

LARGEST = 1e12
"""Beyond any trained number. Products of larger ones overflow in the first layers."""


def require_matching_state(kind: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the ones of this adapter.

    Raises:
        UserError: missing, extra, misshapen, non-float or non-finite tensors; lists expected against found.
    """
    faults = [f"missing {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected {name} {tuple(found[name].shape)}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        wanted, tensor = expected[name], found[name]
        if tensor.shape != wanted.shape:
            faults.append(f"{name} expected shape {tuple(wanted.shape)}, found {tuple(tensor.shape)}")
        elif tensor.is_floating_point() != wanted.is_floating_point() or _only_stores(tensor):
            faults.append(f"{name} expected dtype {wanted.dtype}, found {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name} holds NaN or infinity")
        elif tensor.numel() and float(tensor.abs().max()) > LARGEST:
            faults.append(f"{name} holds numbers up to {float(tensor.abs().max()):.1e}, which no training leaves")
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise UserError(
            f"the tensors do not fit this '{kind}' adapter ({len(expected)} expected, {len(found)} found): {shown}. "
            "Nothing was loaded; use the config that the tensors were trained with"
        )


def _only_stores(tensor: Tensor) -> bool:
    """Whether it is of a type of 8 bits or less, with which torch does not compute: not even whether it is finite."""
    return tensor.is_floating_point() and tensor.element_size() < 2
