"""The adapter folder for use elsewhere, with the files that the adapter adds for use without this package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from disam_peft.adapters.adapter_folder import write_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.files import published
from disam_peft.errors import Notice, UserError


def export_peft(
    directory: str | Path,
    classifier: ClipClassifier,
    *,
    trained_with: Mapping[str, Any] = MappingProxyType({}),
    more: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write the adapter folder and ``Adapter.exported_files`` into a new folder; never replaces anything. The parts of
    an adapter that is made of several lie beside them, each as an adapter folder of its own.

    Args:
        more: further files, by name.

    Raises:
        UserError: as ``save_adapter``, or ``directory`` exists and is not empty.
    """
    if classifier.adapter is None:
        raise UserError("zero-shot classification has no adapter to save; train one first")
    adapter = classifier.adapter
    if adapter.trained_scale is not None:
        scale = float(adapter.scale_and_bias(classifier.backbone)[0].detach())
        warnings.warn(
            f"the logit scale was trained too, from {float(classifier.backbone.logit_scale):.5g} to {scale:.5g}; a "
            "program that uses the files without disam_peft has to set it: trained_scale.logit_scale is its logarithm",
            Notice,
            stacklevel=2,
        )
    with published(Path(directory)) as folder:
        write_adapter(folder, adapter, classifier.backbone, classifier.prompts, trained_with=trained_with)
        files = adapter.exported_files(classifier.class_names, lambda: _class_features(classifier))
        for name, content in {**files, **more}.items():
            (folder / name).write_bytes(content)
        for name, part in adapter.parts().items():
            (folder / name).mkdir()
            write_adapter(folder / name, part, classifier.backbone, classifier.prompts, trained_with=trained_with)


def _class_features(classifier: ClipClassifier) -> Tensor:
    training = classifier.training
    with torch.no_grad():
        features_CE = classifier.train(False).class_features().float().cpu().contiguous()
    classifier.train(training)
    return features_CE
