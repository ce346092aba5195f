"""The logits of a classifier and of what was exported of it, on random images."""

from __future__ import annotations

import torch

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier

_IMAGES, _CLASSES = 4, 8


def largest_difference(
    classifier: ClipClassifier, backbone: ClipBackbone, adapter: Adapter | None
) -> tuple[float, float]:
    """The largest difference of the logits of another backbone and adapter, and the largest logit of ``classifier``.

    Both see four images of normal noise and the first classes, with one template: a sample of the prompts sees every
    weight of the text tower.
    """
    source = classifier.backbone
    prompts = ClassPrompts(classifier.class_names[:_CLASSES], classifier.prompts.templates[:1])
    height, width = source.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randn(_IMAGES, 3, height, width, generator=generator).to(source.device, source.dtype)
    training = classifier.training
    with torch.no_grad():
        wanted_BC = ClipClassifier(source, classifier.adapter, prompts)(pixels_BCHW).double()
        found_BC = ClipClassifier(backbone, adapter, prompts)(pixels_BCHW).double()
    classifier.train(training)
    return float((found_BC - wanted_BC).abs().max()), float(wanted_BC.abs().max())
