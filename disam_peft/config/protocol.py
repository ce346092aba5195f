"""Which domain is kept away from training, and how the sources are split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disam_peft.config.base import Config

ALL = "all"


class ProtocolConfig(Config):
    """One domain is kept away from training; the checkpoint is chosen on a part of the others ("training-domain
    validation")."""

    kind: Literal["leave_one_domain_out"] = "leave_one_domain_out"
    """How domains are kept away from training; one way so far."""
    held_out: str
    """The domain that training never sees. ``all``: a run for each domain in turn."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the images of every source domain that is kept for validation."""
