"""What a classifier is worth: predictions, metrics, and the leave-one-domain-out protocol."""

from disam_peft.evaluation.metrics import METRIC_NAMES, metrics, metrics_by_domain
from disam_peft.evaluation.predict import EvaluationConfig, Predictions, predict
from disam_peft.evaluation.protocol import ProtocolConfig, Score, held_out_domains, validation_score

__all__ = [
    "METRIC_NAMES",
    "EvaluationConfig",
    "Predictions",
    "ProtocolConfig",
    "Score",
    "held_out_domains",
    "metrics",
    "metrics_by_domain",
    "predict",
    "validation_score",
]
