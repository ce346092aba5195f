"""The frozen part's output of a classifier for a whole dataset, from the feature store."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor

from disam_peft.adapters.base import Autocast
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.data import AugmentConfig, FeatureConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.stores.features import FeatureKey, FeatureStore, data_identity, open_or_build
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.errors import UserError


def training_store(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    augment: AugmentConfig,
    seed: int,
    config: FeatureConfig,
    *,
    autocast: Autocast = nullcontext,
    workers: int | Literal["auto"] = "auto",
) -> FeatureStore:
    """The store that training reads: view v is the image as ``TrainTransform`` makes it in epoch v.

    Raises:
        UserError: augmentation without a number of views; not enough room on the disk.
    """
    transform = TrainTransform(classifier.backbone.preprocessing, augment, seed)
    if config.views is None and not transform.deterministic:
        raise UserError(
            "features.store with augmentation keeps a fixed number of views of each image: choose features.views, for "
            "example 8, or set augment.kind=none"
        )
    views = 1 if transform.deterministic or config.views is None else config.views
    name: dict[str, object] = {
        "augment": augment.model_dump(mode="json"),
        "seed": None if transform.deterministic else seed,
    }
    return _store(classifier, dataset, transform, name, views, config, autocast, workers)


def evaluation_store(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    config: FeatureConfig,
    *,
    autocast: Autocast = nullcontext,
    workers: int | Literal["auto"] = "auto",
) -> FeatureStore:
    """The store that evaluation reads: one view, as the model's own transform makes it."""
    transform = _OwnTransform(classifier.backbone.image_transform)
    return _store(classifier, dataset, transform, {"own": classifier.backbone.family}, 1, config, autocast, workers)


class _OwnTransform:
    """The model's own transform with the signature of a training transform."""

    def __init__(self, transform: Callable[[Image], Tensor]) -> None:
        self._transform = transform

    def __call__(self, image: Image, index: int, epoch: int) -> Tensor:
        return self._transform(image)


def _store(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    transform: Callable[[Image, int, int], Tensor],
    transform_name: dict[str, object],
    views: int,
    config: FeatureConfig,
    autocast: Autocast,
    workers: int | Literal["auto"],
) -> FeatureStore:
    like = next(classifier.model.parameters())

    def encode(pixels_BCHW: Tensor) -> Tensor:
        with autocast():
            return classifier.encode_frozen(pixels_BCHW.to(like.device, non_blocking=True).to(like.dtype))

    with autocast():
        active = torch.is_autocast_enabled(like.device.type)
        precision = f"{like.dtype}/{torch.get_autocast_dtype(like.device.type) if active else 'no'}"
    key = FeatureKey(
        backbone=classifier.backbone.base_hash,
        split=classifier.image_split,
        precision=precision,
        transform=json.dumps({**transform_name, **asdict(classifier.backbone.preprocessing)}, sort_keys=True),
        data=data_identity(dataset),
        views=views,
    )
    was_training = classifier.training
    classifier.eval()  # the frozen part is the same in both modes; its norms keep their statistics
    try:
        return open_or_build(
            key,
            dataset,
            transform,
            encode,
            folder=config.folder,
            workers=workers,
        )
    finally:
        classifier.train(was_training)
