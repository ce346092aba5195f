"""What a classifier is worth: predictions, metrics, and the leave-one-domain-out protocol."""

from disam_peft.evaluation.metrics import METRIC_NAMES, metrics, metrics_by_domain
from disam_peft.evaluation.mistakes import confident_errors, confusion
from disam_peft.evaluation.predict import EvaluationConfig, Predictions, predict
from disam_peft.evaluation.protocol import ProtocolConfig, Score, held_out_domains, validation_score
from disam_peft.evaluation.sharpness_config import SharpnessConfig
from disam_peft.evaluation.sharpness_rows import sharpness_rows

__all__ = [
    "METRIC_NAMES",
    "EvaluationConfig",
    "Predictions",
    "ProtocolConfig",
    "Score",
    "SharpnessConfig",
    "confident_errors",
    "confusion",
    "held_out_domains",
    "metrics",
    "metrics_by_domain",
    "predict",
    "sharpness_rows",
    "validation_score",
]
