"""disam_peft: parameter-efficient CLIP fine-tuning with domain-inspired sharpness-aware minimization.

The names below are imported on first use, so that ``import disam_peft`` (and ``disam-peft --help``) stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DISAM": "disam_peft.disam",
    "StepReport": "disam_peft.disam",
}
__all__ = ["DISAM", "StepReport", "__version__"]

if TYPE_CHECKING:
    from disam_peft.disam.disam import DISAM, StepReport


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disam_peft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
