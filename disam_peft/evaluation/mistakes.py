"""The confusion of classes with one another, and the errors with the highest confidence. N samples, C classes."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image

from disam_peft.common.records import Confusion, ExampleError
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.transforms.decode import BadImage
from disam_peft.evaluation.metrics import undefined_samples
from disam_peft.evaluation.predict import Predictions

THUMBNAIL = 96
"""Pixels of the longer side, at most."""


def confusion(predictions: Predictions, domain: str, classes: tuple[str, ...]) -> Confusion:
    """How often each class was predicted as each class, over the samples of ``domain``. A sample whose logits are not
    finite was predicted as none, and is counted in ``not_finite``."""
    of_domain_N = predictions.domains_N == predictions.domain_names.index(domain)
    undefined_N = undefined_samples(predictions.logits_NC)
    chosen_N = of_domain_N & ~undefined_N
    predicted_N = predictions.logits_NC[chosen_N].argmax(dim=1)
    pairs_N2 = torch.stack([predictions.labels_N[chosen_N], predicted_N], dim=1)
    found, counts = pairs_N2.unique(dim=0, return_counts=True)
    not_finite = int((of_domain_N & undefined_N).sum())
    return Confusion(domain, list(classes), torch.cat([found, counts[:, None]], dim=1).tolist(), not_finite)


def confident_errors(
    predictions: Predictions, dataset: DomainDataset, classes: tuple[str, ...], count: int
) -> list[ExampleError]:
    """The ``count`` errors with the highest probability of the wrong class; of equals, the first by key. Samples whose
    logits are not finite are left out: no class was predicted.

    Args:
        dataset: what was predicted, in that order.
    """
    probability_N, predicted_N = predictions.logits_NC.double().softmax(dim=1).max(dim=1)
    is_wrong_N = (predicted_N != predictions.labels_N) & ~undefined_samples(predictions.logits_NC)
    wrong = is_wrong_N.nonzero().flatten().tolist()
    worst = sorted(wrong, key=lambda i: (-float(probability_N[i]), dataset.keys[i]))[:count]
    return [
        ExampleError(
            key=dataset.keys[i],
            true=classes[int(predictions.labels_N[i])],
            predicted=classes[int(predicted_N[i])],
            confidence=float(probability_N[i]),
            png=_thumbnail(dataset, i),
        )
        for i in worst
    ]


def _thumbnail(dataset: DomainDataset, index: int) -> str:
    try:
        image = dataset.image(index).copy()
    except BadImage:  # predicted from stored features, and the file is gone by now: no reason to lose a run
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
