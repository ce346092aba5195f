"""peft's layers in the places of the plain ones, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from disam_peft.adapters.peft.sparse import say_nothing_of_sparse_checks
from disam_peft.backbones.base import ClipBackbone
from disam_peft.errors import UserError


def attach(backbone: ClipBackbone, peft_config: Any, seed: int | None) -> nn.Module:
    """The model with peft's layers in the places of the plain ones that ``peft_config`` names; in place.

    Args:
        seed: of the initial weights; None: torch's global generator.

    Raises:
        UserError: peft refuses the model or the config.
    """
    import peft

    if peft_config.peft_type == peft.PeftType.SHIRA:
        say_nothing_of_sparse_checks()
    with seeded(seed), _without_kernels(), warnings.catch_warnings():
        # Two remarks of peft to itself, nothing that the user could act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type.*Norm.*")
        try:
            return peft.get_peft_model(backbone.model, peft_config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"peft cannot attach this adapter to {backbone.config.name}: {error}") from error


@contextmanager
def _without_kernels() -> Iterator[None]:
    """BOFT would compile a CUDA extension for every layer that it is attached to, or warn that it cannot. Without it,
    it computes the same with torch; only butterfly factors beyond 1 need it."""
    import peft.tuners.boft.layer

    layer: Any = peft.tuners.boft.layer
    loaded, layer._FBD_CUDA = layer._FBD_CUDA, False
    try:
        yield
    finally:
        layer._FBD_CUDA = loaded


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """torch's CPU generator, from which peft draws on every device, seeded inside and as before outside; with None,
    left to the caller."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def require_exact(wanted: set[str], found: set[str], backbone: ClipBackbone) -> None:
    """Pass if peft adapted what was asked for: it matches by the end of a name and is content with one match.

    Raises:
        UserError: it adapted other modules.
    """
    if wanted != found:
        raise UserError(
            f"peft adapted other modules of {backbone.config.name} than asked for: not matched "
            f"{sorted(wanted - found)}, matched without being asked for {sorted(found - wanted)}; choose other "
            "projections or blocks"
        )


def restore(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Put the plain modules back, by their names."""
    for name, module in originals.items():
        if model.get_submodule(name) is not module:
            model.set_submodule(name, module)
    if hasattr(model, "peft_config"):
        del model.peft_config
