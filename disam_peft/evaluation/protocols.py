"""Which domains are held out, one run each, and the usual score of a state by source validation."""

from __future__ import annotations

from typing import NamedTuple

from disam_peft.evaluation.metrics import metrics_of_domains, pooled_metrics
from disam_peft.evaluation.predict import Predictions


class Score(NamedTuple):
    """A checkpoint's rank by source validation alone: compares by accuracy, then by likelihood."""

    mean_top1: float
    negative_nll: float


def validation_score(predictions: Predictions) -> Score:
    """Mean over the source domains, so that a large domain does not outvote a small one."""
    mean = pooled_metrics(metrics_of_domains(predictions))["mean"]
    return Score(mean["top1"], -mean["nll"])
