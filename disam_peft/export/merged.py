"""A merged checkpoint in the family's own format, published only after it was loaded again and gave the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import folder_config, load_backbone
from disam_peft.backbones.fingerprint import WITH_WEIGHTS, differences
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.files import published
from disam_peft.common.strict_json import json_bytes
from disam_peft.errors import UserError
from disam_peft.export.logit_difference import largest_difference

TOLERANCE = 1e-5
"""Largest difference of logits, in units of the largest logit (of 1 where all are smaller)."""

EXPORT_NOTE = "disam_peft_export.json"
"""Says of a merged checkpoint which classes it was trained on and at which alpha its weights are; no library reads it.
"""
MAX_NOTE_BYTES = 16 * 2**20


def export_merged(directory: str | Path, classifier: ClipClassifier, *, alpha: float | None = None) -> float:
    """Merge a copy, write it as a complete checkpoint (weights, config, image transform, tokenizer), load that with
    the family's own loader and compare logits on random images. The classifier stays as it is.

    Args:
        alpha: where the classifier is put between zero-shot (0) and trained weights (1), see
            ``ClipClassifier.interpolation``; unset: the weights are the trained ones. ``disam_peft_export.json`` in the
            folder says it, beside the classes and templates.

    Returns:
        the largest difference between its logits and the classifier's, in units of the largest logit: at most 1e-5,
        or the rounding of the weights where the backbone is in half precision.

    Raises:
        UserError: nothing to merge, an adapter that has no weights to merge into, ``directory`` is not empty, or the
            written checkpoint disagrees with the classifier (nothing is left behind then).
    """
    adapter, backbone = classifier.adapter, classifier.backbone
    if adapter is None:
        raise UserError("zero-shot classification has nothing to merge; the backbone itself is the checkpoint")
    model = adapter.merged(backbone)
    with published(Path(directory)) as folder:
        backbone.save(folder, model)
        told: dict[str, Any] = {
            "adapter": adapter.kind,
            "backbone": backbone.config.name,
            "classes": list(classifier.class_names),
            "templates": list(classifier.prompts.templates),
        }
        if alpha is not None:
            told["alpha"] = alpha
        (folder / EXPORT_NOTE).write_bytes(json_bytes(told))
        difference = _difference(classifier, folder)
        # Merged weights are rounded to the backbone's precision, the live model adds the adapter unrounded.
        allowed = max(TOLERANCE, 8 * torch.finfo(backbone.dtype).eps)
        if not difference <= allowed:
            raise UserError(
                f"the merged checkpoint of {backbone.config.name} disagrees with the model it was made from: logits "
                f"differ by {difference:.2e} of the largest, {allowed:.0e} is allowed; nothing was published. "
                "Export the adapter itself (--to peft) and report this"
            )
    return difference


def _difference(classifier: ClipClassifier, folder: Path) -> float:
    source = classifier.backbone
    again = load_backbone(folder_config(source.config.family, folder)).to(source.device, source.dtype)
    _require_same_inputs(source, again)
    difference, largest = largest_difference(classifier, again, None)
    return difference / max(largest, 1.0)


def _require_same_inputs(source: ClipBackbone, again: ClipBackbone) -> None:
    """Everything but the weights must be as it was: random images show neither a transform nor a tokenizer."""
    kept = {name: value for name, value in source.fingerprint.items() if name not in WITH_WEIGHTS}
    changes = differences(kept, again.fingerprint)
    if changes:
        raise UserError(
            f"the merged checkpoint of {source.config.name} would be another model in more than its weights; nothing "
            f"was published. Export the adapter itself (--to peft) and report this. It differs in: {'; '.join(changes)}"
        )
