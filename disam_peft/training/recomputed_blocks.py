"""``train.gradient_checkpointing``: which blocks of a classifier backward goes through, and would keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from torch import nn

from disam_peft.backbones.recomputation import recomputed
from disam_peft.classification.classifier import ClipClassifier


def blocks_with_gradient(classifier: ClipClassifier) -> list[nn.Module]:
    """The blocks of the towers that backward goes through. Among them are those of the frozen part, which run without a
    graph and keep nothing anyway."""
    adapter, backbone = classifier.adapter, classifier.backbone
    if adapter is None:
        return []
    through_text = adapter.text_split is not None or adapter.replaces_class_prompts
    return [
        *(backbone.blocks("image") if adapter.image_split is not None else []),
        *(backbone.blocks("text") if through_text else []),
    ]


def recomputed_blocks(classifier: ClipClassifier) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts for the steps of a run, in which the blocks that backward goes through are ``recomputed``. With a
    warning where there are none."""
    blocks = blocks_with_gradient(classifier)
    if not blocks:
        warnings.warn(
            f"train.gradient_checkpointing=true does nothing here: with this adapter no gradient goes through "
            f"transformer blocks of {classifier.backbone.config.name} that are known one by one",
            stacklevel=3,
        )
    return partial(recomputed, blocks)
