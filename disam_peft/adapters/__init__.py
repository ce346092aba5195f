"""What is trained. The configs are here at once; whatever needs torch is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from disam_peft.adapters.config import (
    AdapterConfig,
    CoOpConfig,
    LastBlocks,
    LinearProbeConfig,
    LoraAdapterConfig,
    PeftAdapterConfig,
)

if TYPE_CHECKING:
    from disam_peft.adapters.base import Adapter, ClassPrompts
    from disam_peft.adapters.registry import ADAPTERS, build_adapter, planned_image_split

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "ClassPrompts",
    "CoOpConfig",
    "LastBlocks",
    "LinearProbeConfig",
    "LoraAdapterConfig",
    "PeftAdapterConfig",
    "build_adapter",
    "planned_image_split",
]

_HOMES = {
    "ADAPTERS": "disam_peft.adapters.registry",
    "Adapter": "disam_peft.adapters.base",
    "ClassPrompts": "disam_peft.adapters.base",
    "build_adapter": "disam_peft.adapters.registry",
    "planned_image_split": "disam_peft.adapters.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disam_peft.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
