"""The list of all adapters, and what they are called. Imports no torch, so that the command line is quick to answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import CombinedConfig, LpFtConfig
from disam_peft.config.feature_adapters import (
    ClapConfig,
    ClipAdapterConfig,
    ClosedFormProbeConfig,
    LinearProbeConfig,
    LpPlusPlusConfig,
    TaskResConfig,
    TipAdapterConfig,
)
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoCoOpConfig, CoOpConfig, IvlpConfig, MapleConfig, VisualPromptsConfig


def _combination_of_a_list(value: Any) -> Any:
    return {"kind": "combined", "parts": value} if isinstance(value, list) else value


AdapterConfig = Annotated[
    LoraAdapterConfig
    | PeftAdapterConfig
    | CoOpConfig
    | LinearProbeConfig
    | ClipAdapterConfig
    | FullConfig
    | LpFtConfig
    | TaskResConfig
    | TipAdapterConfig
    | ClosedFormProbeConfig
    | LpPlusPlusConfig
    | VisualPromptsConfig
    | IvlpConfig
    | MapleConfig
    | ClapConfig
    | CoCoOpConfig
    | CombinedConfig,
    Field(discriminator="kind"),
    BeforeValidator(_combination_of_a_list),
]
"""The list of all adapters: recipes, ``compare --adapters``, the registry and the tests read it."""

ADAPTER_CONFIGS: tuple[type[Config], ...] = get_args(get_args(AdapterConfig)[0])
ADAPTER_KINDS: tuple[str, ...] = tuple(config.model_fields["kind"].default for config in ADAPTER_CONFIGS)
"""What ``adapter.kind`` may be in a recipe."""


def adapter_label(adapter: Config) -> str:
    """The kind of an adapter, as tables and sentences call it; of a combination those of its parts: ``lora + coop``."""
    parts = adapter.parts if isinstance(adapter, CombinedConfig) else [adapter]
    return " + ".join(getattr(part, "kind", "") for part in parts)


def export_format(adapter: Config) -> Literal["peft", "merged"]:
    """What ``export --to`` writes such an adapter as, where it cannot be both: peft has no format for whole weights."""
    return "merged" if isinstance(adapter, FullConfig) else "peft"
