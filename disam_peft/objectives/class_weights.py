"""How much the loss of a sample counts, by its class. Shapes in this file: C classes, N training samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from disam_peft.config.losses import BaseLossConfig, WeighedLossConfig
from disam_peft.errors import UserError, did_you_mean


def balanced_weights(count_C: Tensor) -> Tensor:
    """``1 / n`` for a class of n samples, with the mean 1 over all samples: ``N / (K n)`` of K classes that occur."""
    count_C = count_C.double()
    return normalised(1.0 / count_C, count_C)


def effective_number_weights(count_C: Tensor, beta: float = 0.999) -> Tensor:
    """``(1 - beta) / (1 - beta^n)`` (Cui et al. 2019, arXiv 1901.05555), with the mean 1 over all samples.

    (Their code makes the weights add up to the number of classes.)
    """
    count_C = count_C.double()
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return normalised(-1.0 / torch.expm1(count_C.clamp(min=1e-300) * log_beta), count_C)


def normalised(weight_C: Tensor, count_C: Tensor) -> Tensor:
    """Weights (C,), float64, whose mean over all samples is 1: ``sum_c n_c w_c = N``. A class without samples has 1."""
    count_C = count_C.double()
    weight_C = weight_C.double().where(count_C > 0, 0.0)
    weight_C = weight_C * (count_C.sum() / (count_C * weight_C).sum())
    return weight_C.where(count_C > 0, 1.0)


def class_weights(
    config: BaseLossConfig, labels_N: np.ndarray | Tensor | Sequence[int], class_names: Sequence[str]
) -> Tensor | None:
    """The weights of a loss's config, (C,), on these training samples; None: all count alike.

    Raises:
        UserError: the config names a class that is not there (says the nearest), or leaves no sample any weight.
    """
    if not isinstance(config, WeighedLossConfig) or config.class_weights == "none":
        return None
    count_C = torch.bincount(torch.as_tensor(np.asarray(labels_N), dtype=torch.int64), minlength=len(class_names))
    if config.class_weights == "balanced":
        return balanced_weights(count_C)
    if config.class_weights == "effective_number":
        return effective_number_weights(count_C, config.class_weights_beta)
    assert isinstance(config.class_weights, Mapping)
    for name in config.class_weights:
        if name not in class_names:
            raise UserError(
                f"objective.loss.class_weights has the class {name!r}, which the data do not have"
                f"{did_you_mean(name, class_names)}; they have {', '.join(class_names)}"
            )
    weight_C = torch.tensor([config.class_weights.get(name, 1.0) for name in class_names], dtype=torch.float64)
    if not bool((weight_C * count_C).sum() > 0):
        raise UserError(
            f"objective.loss.class_weights={dict(config.class_weights)} gives every training sample the weight 0; "
            "give one class that they have a weight above 0"
        )
    return normalised(weight_C, count_C)
