"""Which domain is kept away from training, and how the sources are split."""

from __future__ import annotations

from pydantic import Field

from disam_peft.config.base import Config

ALL = "all"


class ProtocolConfig(Config):
    """Leave one domain out; checkpoints are chosen on a part of the sources ("training-domain validation")."""

    held_out: str
    """The domain that training never sees, or ``all`` for each in turn."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of every source domain that is kept for validation."""
