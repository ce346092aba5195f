"""Logits of every sample of a dataset, each exactly once, over any number of processes. N samples, C classes, S states
of one classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common import processes
from disam_peft.common.device import to_device
from disam_peft.common.progress import track
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import make_eval_loader
from disam_peft.data.stores.features import FeatureStore
from disam_peft.errors import UserError

HELD_BYTES = 2**28


@dataclass(frozen=True)
class Predictions:
    """The logits of a classifier for every sample, on the CPU, in the order of the dataset.

    Attributes:
        logits_NC: float32 (float64 for a float64 model).
        labels_N, domains_N: int64; ``domains_N`` counts in ``domain_names``.
    """

    logits_NC: Tensor
    labels_N: Tensor
    domains_N: Tensor
    domain_names: tuple[str, ...]


def predict(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    config: EvaluationConfig | None = None,
    *,
    store: FeatureStore | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    description: str = "evaluating",
) -> Predictions:
    """Run ``classifier`` in eval mode over ``dataset``; every rank gets all predictions.

    Args:
        store: of this dataset and classifier (``frozen.evaluation_store``), to be read in place of the images.
        autocast: makes the context of a forward pass, for example ``accelerator.autocast``.

    Raises:
        UserError: an empty dataset, or one whose labels the classifier has no class for.
        BadImage: an image that cannot be decoded.
    """
    as_it_is: list[Callable[[], object]] = [lambda: None]
    return predict_states(
        classifier, dataset, as_it_is, config, store=store, autocast=autocast, description=description
    )[0]


@torch.no_grad()
def predict_states(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    states: Sequence[Callable[[], object]],
    config: EvaluationConfig | None = None,
    *,
    store: FeatureStore | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    description: str = "evaluating",
) -> list[Predictions]:
    """``predict`` with each of several states of one classifier, which have the frozen part in common: every image is
    decoded, and runs through the frozen part, once for all of them.

    Args:
        states: each puts the classifier into one of the states when it is called; it is called for every batch.
        store, autocast: see ``predict``.

    Raises:
        UserError, BadImage: as ``predict``.
    """
    config = config or EvaluationConfig()
    if len(dataset) == 0:
        raise UserError(f"nothing to evaluate: no samples left of {dataset.origin}")
    if int(dataset.labels.max()) >= len(classifier.class_names):
        raise UserError(
            f"{dataset.origin} has {len(dataset.classes)} classes, the classifier {len(classifier.class_names)}"
        )
    rank, world_size = processes.rank(), processes.world_size()
    like = next(classifier.model.parameters())
    batches: Iterable[tuple[Tensor, Tensor]]
    if store is not None:
        own = np.arange(rank, len(dataset), world_size)
        pieces = [own[start : start + config.batch_size] for start in range(0, len(own), config.batch_size)]
        total = len(pieces)
        batches = ((torch.from_numpy(piece), to_device(store.rows(piece), like.device)) for piece in pieces)
    else:
        loader = make_eval_loader(
            dataset,
            classifier.backbone.image_transform,
            config.batch_size,
            workers=config.workers,
            pin_memory=like.device.type == "cuda",
            rank=rank,
            world_size=world_size,
        )
        total = len(loader)
        batches = ((batch["indices"], to_device(batch["pixels"], like.device).to(like.dtype)) for batch in loader)
    was_training = classifier.training
    classifier.eval()
    try:
        parts: list[tuple[Tensor, Tensor]] = []
        held, held_bytes = [], 0  # on the device: to wait for each batch would leave it without work in between
        class_features = []
        for state in states:
            state()
            with autocast():  # one for each state, here and below: autocast remembers weights in half precision
                class_features.append(classifier.shared_class_features())
        for indices, inputs in track(batches, description, total=total):
            with autocast():
                frozen = classifier.encode_frozen(inputs) if store is None else inputs
            logits = []
            for state, class_features_CE in zip(states, class_features, strict=True):
                state()
                with autocast():
                    logits.append(classifier.logits(frozen, class_features_CE=class_features_CE))
            logits_SBC = torch.stack(logits)
            held.append((indices, logits_SBC.to(torch.promote_types(logits_SBC.dtype, torch.float32))))
            held_bytes += held[-1][1].nbytes
            if held_bytes > HELD_BYTES:
                parts, held, held_bytes = [*parts, *_on_the_host(held)], [], 0
    finally:
        classifier.train(was_training)
    parts += _on_the_host(held)
    wide = torch.promote_types(like.dtype, torch.float32)
    logits_SNC = torch.empty(len(states), len(dataset), len(classifier.class_names), dtype=wide)
    for indices, logits_SBC in parts if world_size == 1 else _from_all_ranks(parts):
        logits_SNC[:, indices] = logits_SBC.to(wide)
    labels_N, domains_N = torch.from_numpy(dataset.labels), torch.from_numpy(dataset.domain_ids)
    return [Predictions(logits_NC, labels_N, domains_N, dataset.domains) for logits_NC in logits_SNC]


def _on_the_host(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(indices, logits_SBC.cpu()) for indices, logits_SBC in parts]


def _from_all_ranks(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    # ranks hold unequal shares, and padding would count samples twice: every part keeps its indices
    return [part for share in processes.from_all(parts) for part in share]
