"""Which adapters may be built on a backbone whose blocks have quantised weights."""

from __future__ import annotations

from collections.abc import Iterator

from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig

METHODS = ("lora", "ia3", "oft", "vera", "ln_tuning")
"""Those of peft that call the frozen layer and never look at its weight; a test compares each with the same adapter on
float weights of the same values."""


def require_possible(config: Config, backbone: ClipBackbone) -> None:
    """Pass if an adapter of this config needs no float weights of quantised layers.

    Raises:
        UserError: it does.
    """
    if not backbone.is_quantised:
        return
    for part in _parts(config):
        if isinstance(part, FullConfig):
            backbone.require_float_weights("adapter.kind=full, which trains the weights of the towers themselves,")
        if isinstance(part, LoraAdapterConfig) and part.init != "kaiming":
            backbone.require_float_weights(f"adapter.init={part.init}, which looks at the weights,")
        if isinstance(part, PeftAdapterConfig) and part.method not in METHODS:
            backbone.require_float_weights(f"adapter.method={part.method}, which reads the weights that it adapts,")


def _parts(config: Config) -> Iterator[Config]:
    """The config and all configs in it."""
    yield config
    for value in vars(config).values():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, Config):
                yield from _parts(one)
