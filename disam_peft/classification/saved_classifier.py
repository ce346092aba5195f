"""A trained classifier as an adapter folder, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from disam_peft.adapters.adapter_folder import read_adapter, write_adapter
from disam_peft.adapters.manifest import MANIFEST_NAME
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.files import published
from disam_peft.config.backbone import Precision
from disam_peft.errors import UserError


def save_adapter(directory: str | Path, classifier: ClipClassifier, *, trained_with: Mapping[str, Any]) -> None:
    """Write the adapter of ``classifier`` as a folder, in place of the adapter that may be there; the classifier
    stays as it is.

    Args:
        trained_with: JSON types; the recipe and whatever else should travel with the adapter.

    Raises:
        UserError: no adapter to save, one that is merged into the live model, non-finite tensors, or ``directory``
            holds something other than an adapter.
    """
    if classifier.adapter is None:
        raise UserError("zero-shot classification has no adapter to save; train one first")
    with published(Path(directory), replaces=MANIFEST_NAME) as folder:
        write_adapter(folder, classifier.adapter, classifier.backbone, classifier.prompts, trained_with=trained_with)


def load_adapter(
    directory: str | Path,
    backbone: ClipBackbone | None = None,
    *,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
) -> ClipClassifier:
    """The classifier of an adapter folder, in eval mode.

    Args:
        backbone: a backbone without adapter to attach to; None loads the recorded one.
        device: moves the backbone there first.
        precision: of the frozen weights; one that is named may be another than that which the adapter was trained on.
            Unset: it has to be that one.

    Raises:
        UserError: not an adapter folder, pickled weights, another backbone than the recorded one, tensors that are
            missing, extra, misshapen, non-finite or damaged, or a companion file that says something else than
            the manifest. A ``backbone`` that was passed in is left as it was.
    """
    return ClipClassifier(*read_adapter(Path(directory), backbone, device=device, precision=precision))
