"""Metrics, computed from predictions. N samples, C classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from disam_peft.errors import Notice
from disam_peft.evaluation.predict import Predictions

METRIC_NAMES = ("top1", "macro_accuracy", "nll", "ece")
HIGHER_IS_BETTER = {"top1": True, "macro_accuracy": True, "nll": False, "ece": False}
ECE_BINS = 15
NOT_FINITE = "not_finite"
OverDomains = Literal["mean", "worst"]


def metrics(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Metrics of one set of samples, each by its definition, in float64.

    top1: share of samples whose highest logit is right. macro_accuracy: mean of the classes' accuracies, over the
    classes that occur; classes: how many these are. nll: mean negative log-likelihood in nats. ece: see
    ``calibration_error``.

    Where the logits of a sample are not finite nothing can be said of it, and so not of the set: every metric is NaN,
    and ``not_finite`` has the number of such samples. Otherwise there is no ``not_finite``. (Some logits of a sample
    may be minus infinity: these classes have probability 0.)
    """
    undefined = int(undefined_samples(logits_NC).sum())
    if undefined:
        classes = float(len(labels_N.unique()))
        return {**dict.fromkeys(METRIC_NAMES, math.nan), "classes": classes, NOT_FINITE: float(undefined)}
    right_N = logits_NC.argmax(dim=1) == labels_N
    # a class that never occurs has no accuracy (n/a, not 0), whether or not it is predicted
    known = [accuracy for accuracy in class_accuracies(logits_NC, labels_N) if accuracy is not None]
    return {
        "top1": float(right_N.double().mean()),
        "macro_accuracy": sum(known) / len(known),
        "classes": float(len(known)),
        "nll": float(nn.functional.cross_entropy(logits_NC.double(), labels_N)),
        "ece": calibration_error(logits_NC.double().softmax(dim=1).amax(dim=1), right_N),
    }


def undefined_samples(logits_NC: Tensor) -> Tensor:
    """(N,) bool: samples whose probabilities are not defined, since a logit is NaN or infinity, or all are minus
    infinity."""
    return logits_NC.double().log_softmax(dim=1).isnan().any(dim=1)


def calibration_error(confidence_N: Tensor, right_N: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599), from 0 to 1.

    The interval (0, 1] of confidences is cut into ``bins`` of equal width, ((b - 1) / bins, b / bins]; a confidence of
    exactly 1 is in the last one. ECE = sum_b n_b / N * |accuracy_b - mean confidence_b|.

    Args:
        confidence_N: probability of the predicted class, in float64.
        right_N: whether that class is the label.
    """
    upper_b = torch.arange(1, bins, dtype=torch.float64) / bins  # of every bin but the last
    bin_N = torch.bucketize(confidence_N.double(), upper_b.to(confidence_N.device))
    # n_b * (accuracy_b - mean confidence_b) is a plain sum over the samples of the bin
    gap_b = torch.bincount(bin_N, weights=right_N.double() - confidence_N, minlength=bins)
    return float(gap_b.abs().sum() / len(confidence_N))


def class_accuracies(logits_NC: Tensor, labels_N: Tensor) -> list[float | None]:
    """Share of each class's samples whose highest logit is right; None (n/a) for a class without samples."""
    num_classes = logits_NC.shape[1]
    count_C = torch.bincount(labels_N, minlength=num_classes).tolist()
    right_C = torch.bincount(labels_N[logits_NC.argmax(dim=1) == labels_N], minlength=num_classes).tolist()
    return [right / count if count else None for right, count in zip(right_C, count_C, strict=True)]


def metrics_of_domains(predictions: Predictions) -> dict[str, dict[str, float]]:
    """``{domain: metrics}`` for every domain that occurs and for nothing else: what a rule of selection is given."""
    by_domain = {}
    for number, name in enumerate(predictions.domain_names):
        chosen_N = predictions.domains_N == number
        if chosen_N.any():
            by_domain[name] = metrics(predictions.logits_NC[chosen_N], predictions.labels_N[chosen_N])
    return by_domain


def pooled_metrics(by_domain: Mapping[str, Mapping[str, float]]) -> dict[OverDomains, dict[str, float]]:
    """``mean`` and ``worst`` of ``METRIC_NAMES`` over domains, each of which counts alike. The worst is by each metric
    of its own: the lowest accuracy, the highest ``nll`` and ``ece``. NaN where one of the domains has NaN.

    Args:
        by_domain: what ``metrics_of_domains`` gives.
    """
    found: dict[OverDomains, dict[str, float]] = {"mean": {}, "worst": {}}
    for name in METRIC_NAMES:
        values = [row[name] for row in by_domain.values()]
        undefined = any(math.isnan(value) for value in values)
        found["mean"][name] = sum(values) / len(values)
        found["worst"][name] = math.nan if undefined else (min if HIGHER_IS_BETTER[name] else max)(values)
    return found


def metrics_by_domain(predictions: Predictions) -> dict[str, dict[str, float]]:
    """``metrics_of_domains``, then ``mean`` and ``worst`` as ``pooled_metrics`` has them.

    A domain that is itself called ``mean`` or ``worst`` keeps its place, and a warning says so: take ``pooled_metrics``
    where names of domains are not known.
    """
    by_domain = metrics_of_domains(predictions)
    pooled = {str(pool): values for pool, values in pooled_metrics(by_domain).items()}
    hidden = sorted(by_domain.keys() & pooled.keys())
    if hidden:
        warnings.warn(
            f"a domain of the data is called {' and another '.join(map(repr, hidden))}: metrics_by_domain has its "
            "numbers under that name; pooled_metrics(metrics_of_domains(predictions)) has those over all domains",
            Notice,
            stacklevel=2,
        )
    return {**by_domain, **{name: values for name, values in pooled.items() if name not in by_domain}}
