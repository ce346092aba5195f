"""Linear heads that have a closed form: ridge regression and linear discriminant analysis. They need the features only
through their moments.

Shapes in this file: M training images, V images of validation, C classes, E width of the features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = 65_536
"""Rows at once in float64."""
SCALES = (1e-2, 1e2)
"""Between them lies the factor of the logits that ``judge`` finds. Where every image is classified rightly there is no
minimum, and it is the upper one, or one at which nothing is left of the NLL."""
HALVINGS = 50
"""Of the way between the scales, as ratios: to the last bits."""


@dataclass(frozen=True)
class FeatureMoments:
    """What a closed form needs of the training features, in float64.

    Attributes:
        second_EE: the mean of ``f f^T``.
        mean_CE: the mean feature of each class; NaN where it has no image.
        share_C: the share of the images that each class has.
    """

    second_EE: Tensor
    mean_CE: Tensor
    share_C: Tensor

    @classmethod
    def of(cls, features_ME: Tensor, labels_M: Tensor, classes: int) -> FeatureMoments:
        """From normalised features."""
        width = features_ME.shape[1]
        second_EE = torch.zeros(width, width, dtype=torch.float64, device=features_ME.device)
        sum_CE = torch.zeros(classes, width, dtype=torch.float64, device=features_ME.device)
        for features, labels in zip(features_ME.split(ROWS), labels_M.split(ROWS), strict=True):
            wide = features.double()
            second_EE += wide.T @ wide
            sum_CE += nn.functional.one_hot(labels, classes).double().T @ wide
        count_C = labels_M.bincount(minlength=classes).double()
        total = len(labels_M)
        return cls(second_EE / total, sum_CE / count_C[:, None], count_C / total)


@dataclass(frozen=True)
class ClosedFormHead:
    """``weight f + bias``; float64."""

    weight_CE: Tensor
    bias_C: Tensor

    def logits(self, features_BE: Tensor) -> Tensor:
        return nn.functional.linear(features_BE.double(), self.weight_CE, self.bias_C)


def ridge_head(moments: FeatureMoments, regularisation: float) -> ClosedFormHead:
    """The minimum over W and b of the mean of ``|W f + b - y|^2`` plus ``regularisation |W|^2``, y the class one-hot.

    The bias has no penalty. Its outputs are estimates of probabilities, not logits.
    """
    mean_CE = moments.mean_CE.nan_to_num(0.0)  # of a class without images the target is 0 everywhere
    mean_E = moments.share_C @ mean_CE
    covariance_EE = moments.second_EE - torch.outer(mean_E, mean_E)
    with_targets_CE = moments.share_C[:, None] * (mean_CE - mean_E)
    weight_CE = _solve(covariance_EE, regularisation, with_targets_CE)
    return ClosedFormHead(weight_CE, moments.share_C - weight_CE @ mean_E)


def lda_head(moments: FeatureMoments, shrinkage: float) -> ClosedFormHead:
    """Linear discriminant analysis: the log posteriors of normal distributions with the class means m_c, one covariance
    S and the classes' shares as priors, up to a constant: ``m_c^T S^-1 f - m_c^T S^-1 m_c / 2 + log share_c``.

    S is the mean covariance within the classes, shrunk to a multiple of the identity with the same trace:
    ``(1 - shrinkage) S + shrinkage tr(S) / E I`` (Ledoit and Wolf 2004). That CLIP's features classify well in this way
    is Wang et al. 2024, "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv 2402.04087, who
    estimate the covariance otherwise.
    """
    mean_CE, width = moments.mean_CE, moments.second_EE.shape[0]
    within_EE = moments.second_EE - (moments.share_C[:, None] * mean_CE).T @ mean_CE
    shift = shrinkage * float(within_EE.trace()) / width
    weight_CE = _solve((1 - shrinkage) * within_EE, shift, mean_CE)
    bias_C = -0.5 * (weight_CE * mean_CE).sum(dim=1) + moments.share_C.log()
    return ClosedFormHead(weight_CE, bias_C)


def _solve(matrix_EE: Tensor, shift: float, right_CE: Tensor) -> Tensor:
    """``right (matrix + shift I)^-1`` for a symmetric matrix without negative eigenvalues."""
    shifted_EE = matrix_EE + shift * torch.eye(len(matrix_EE), dtype=matrix_EE.dtype, device=matrix_EE.device)
    return torch.linalg.solve(shifted_EE, right_CE.T).T


@dataclass(frozen=True)
class Judged:
    """How good a head is on source validation: means over the domains.

    Attributes:
        scale: the factor of the logits with the lowest nll.
    """

    top1: float
    nll: float
    scale: float


def judge(logits_VC: Tensor, labels_V: Tensor, domains_V: Tensor, scale: float | None = None) -> Judged:
    """Accuracy, and NLL at this scale, or at the best one within ``SCALES``."""
    of_domain_V, count_D = torch.unique(domains_V, return_inverse=True, return_counts=True)[1:]
    weight_V = 1.0 / (count_D.double()[of_domain_V] * len(count_D))

    def nll(factor: float) -> float:
        return float((nn.functional.cross_entropy(factor * logits_VC, labels_V, reduction="none") * weight_V).sum())

    def slope(factor: float) -> float:
        """The derivative of ``nll``, which grows with the factor: the nll is convex in it."""
        expected_V = ((factor * logits_VC).softmax(dim=1) * logits_VC).sum(dim=1)
        return float(((expected_V - logits_VC.gather(1, labels_V[:, None])[:, 0]) * weight_V).sum())

    top1 = float(((logits_VC.argmax(dim=1) == labels_V).double() * weight_V).sum())
    if scale is None:
        low, high = SCALES
        for _ in range(HALVINGS):
            scale = math.sqrt(low * high)
            low, high = (scale, high) if slope(scale) < 0 else (low, scale)
        scale = math.sqrt(low * high)
    return Judged(top1, nll(scale), scale)
