"""Distances of image features and of class features to those of the plain towers.

Shapes in this file: N vectors (images or classes), E embedding width, B samples.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from disam_peft.config.anchors import ClassFeaturesAnchorConfig, FeatureDistance, ImageFeaturesAnchorConfig
from disam_peft.objectives.anchors.base import ModelAnchor, SampleAnchor
from disam_peft.objectives.base import Outputs


def l1_distance(features_NE: Tensor, reference_NE: Tensor) -> Tensor:
    """``(1/E) sum_e |a_e - b_e|`` of each pair of vectors, (N,): PromptSRC's code (arXiv 2307.06948), whose paper
    writes the sum."""
    return (features_NE - reference_NE).abs().mean(dim=1)


def squared_distance(features_NE: Tensor, reference_NE: Tensor) -> Tensor:
    """``||a - b||^2`` of each pair of vectors, (N,): KgCoOp's paper (arXiv 2303.13283)."""
    return (features_NE - reference_NE).square().sum(dim=1)


def cosine_distance(features_NE: Tensor, reference_NE: Tensor) -> Tensor:
    """``1 - <a, b>`` of each pair of normalised vectors, (N,): KgCoOp's code. Half of ``squared_distance``."""
    return 1 - (features_NE * reference_NE).sum(dim=1)


DISTANCES: dict[FeatureDistance, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1_distance,
    "squared": squared_distance,
    "cosine": cosine_distance,
}


class ImageFeaturesAnchor(SampleAnchor):
    """The distance of each image's normalised features to those of the plain image tower, (B,)."""

    config: ImageFeaturesAnchorConfig
    needs_features = True

    def __call__(self, outputs: Outputs) -> Tensor:
        features_BE = outputs.features
        return DISTANCES[self.config.distance](features_BE, outputs.zero_shot.features_BE.to(features_BE.dtype))


class ClassFeaturesAnchor(ModelAnchor):
    """The mean over the classes of the distance of their features to those of the plain text tower."""

    config: ClassFeaturesAnchorConfig
    needs_zero_shot = True

    def value(self, outputs: Outputs) -> Tensor:
        features_CE = outputs.class_features
        reference_CE = outputs.zero_shot.class_features_CE.to(features_CE.dtype)
        return DISTANCES[self.config.distance](features_CE, reference_CE).mean()
