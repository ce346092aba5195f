"""What a classifier says about one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, or why there are none."""

    label: str | None
    """The most likely class; ``unknown`` where its probability is below the threshold; None with ``error``."""
    probability: float | None
    """Of the most likely class, whether or not ``label`` names it."""
    top: tuple[tuple[str, float], ...] = ()
    """The most likely classes and their probabilities, the most likely first."""
    path: str | None = None
    """Where the image was read from; None where it was given as an image."""
    error: str | None = None
    """Why it could not be classified."""


def predictions(
    logits_BC: Tensor, class_names: Sequence[str], paths: Sequence[str | None], *, top: int, threshold: float
) -> list[Prediction]:
    """One for each row of the logits; probabilities are a softmax over the classes, in at least float32."""
    wide = torch.promote_types(logits_BC.dtype, torch.float32)
    ranked = logits_BC.to(wide).softmax(-1).topk(min(top, len(class_names)))
    found = []
    for path, values, indices in zip(paths, ranked.values.tolist(), ranked.indices.tolist(), strict=True):
        best = tuple((class_names[index], value) for index, value in zip(indices, values, strict=True))
        label, probability = best[0]
        found.append(Prediction(label if probability >= threshold else UNKNOWN, probability, best, path))
    return found
