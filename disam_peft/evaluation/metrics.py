"""Numbers from predictions. N samples, C classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from disam_peft.evaluation.predict import Predictions

METRIC_NAMES = ("top1", "macro_accuracy", "nll", "ece")
HIGHER_IS_BETTER = {"top1": True, "macro_accuracy": True, "nll": False, "ece": False}
ECE_BINS = 15


def metrics(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Metrics of one set of samples.

    top1: share of samples whose highest logit is right. macro_accuracy: mean of the classes' accuracies, over the
    classes that occur; classes: how many these are. nll: mean negative log-likelihood in nats. ece: expected
    calibration error over 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599).
    """
    num_classes = logits_NC.shape[1]
    predicted_N = logits_NC.argmax(dim=1)
    # average="macro" would count a class that never occurs but is once predicted; here it is left out (n/a)
    known = [accuracy for accuracy in class_accuracies(logits_NC, labels_N) if accuracy is not None]
    return {
        "top1": float((predicted_N == labels_N).double().mean()),
        "macro_accuracy": sum(known) / len(known),
        "classes": float(len(known)),
        "nll": float(nn.functional.cross_entropy(logits_NC.double(), labels_N)),
        "ece": float(
            multiclass_calibration_error(logits_NC.double().softmax(dim=1), labels_N, num_classes, n_bins=ECE_BINS)
        ),
    }


def class_accuracies(logits_NC: Tensor, labels_N: Tensor) -> list[float | None]:
    """Share of each class's samples whose highest logit is right; None (n/a) for a class without samples."""
    num_classes = logits_NC.shape[1]
    recall_C = multiclass_accuracy(logits_NC.argmax(dim=1), labels_N, num_classes, average="none")
    occurs_C = torch.bincount(labels_N, minlength=num_classes) > 0
    pairs = zip(recall_C.double().tolist(), occurs_C.tolist(), strict=True)
    return [recall if occurs else None for recall, occurs in pairs]


def metrics_by_domain(predictions: Predictions) -> dict[str, dict[str, float]]:
    """``{domain: metrics}`` for every domain that occurs, then ``mean`` and ``worst`` of ``METRIC_NAMES`` over them."""
    by_domain = {}
    for number, name in enumerate(predictions.domain_names):
        chosen_N = predictions.domains_N == number
        if chosen_N.any():
            by_domain[name] = metrics(predictions.logits_NC[chosen_N], predictions.labels_N[chosen_N])
    rows = list(by_domain.values())
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in METRIC_NAMES}
    worst = {name: (min if HIGHER_IS_BETTER[name] else max)(row[name] for row in rows) for name in METRIC_NAMES}
    return {**by_domain, "mean": mean, "worst": worst}
