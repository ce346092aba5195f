"""By which rule the state that is kept is chosen. Only source domains are ever asked."""

from __future__ import annotations

from typing import Literal

from disam_peft.config.base import Config


class SelectionConfig(Config):
    """Which of the validated states of a run is kept, judged on the validation part of the sources."""

    rule: Literal["source_validation", "worst_source"] = "source_validation"
    """``source_validation``: the mean over the source domains; ``worst_source``: the worst source domain."""
    metric: Literal["accuracy", "nll"] = "accuracy"
    """``accuracy``: top-1, higher is better; ``nll``: negative log-likelihood, lower is better. The other one decides
    between equals."""
