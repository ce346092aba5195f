"""The adapter folder for use elsewhere: what peft loads, and CoOp's class features beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save as save_tensors

from disam_peft.adapters.adapter_folder import write_adapter
from disam_peft.adapters.coop.coop_adapter import CoOpAdapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.files import published
from disam_peft.errors import UserError

CLASS_FEATURES_NAME = "class_features.safetensors"


def export_peft(
    directory: str | Path, classifier: ClipClassifier, *, trained_with: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The adapter folder for use elsewhere, with CoOp's class features in it; never replaces anything.

    Raises:
        UserError: as ``save_adapter``, or ``directory`` exists and is not empty.
    """
    if classifier.adapter is None:
        raise UserError("zero-shot classification has no adapter to save; train one first")
    with published(Path(directory)) as folder:
        write_adapter(folder, classifier.adapter, classifier.backbone, classifier.prompts, trained_with=trained_with)
        if isinstance(classifier.adapter, CoOpAdapter):
            (folder / CLASS_FEATURES_NAME).write_bytes(_class_features(classifier))


def _class_features(classifier: ClipClassifier) -> bytes:
    training = classifier.training
    with torch.no_grad():
        features_CE = classifier.train(False).class_features().float().cpu().contiguous()
    classifier.train(training)
    names = json.dumps(list(classifier.class_names), ensure_ascii=False)
    return save_tensors({"class_features": features_CE}, metadata={"format": "pt", "classes": names})
