"""The output of a classifier's frozen part for every image of a dataset, from a feature store."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor

from disam_peft.adapters.base import Autocast
from disam_peft.backbones.base import BEFORE_STEM
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.device import to_device
from disam_peft.config.data import AugmentConfig, FeatureConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.stores.features import FeatureKey, FeatureStore, open_or_build
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
    """The store that training reads. View v of an image is what ``TrainTransform`` makes of it in epoch v.

    Raises:
        UserError: augmentation without a number of views; not enough room on the disk.
    """
    transform = TrainTransform(classifier.backbone.preprocessing, augment, seed)
    views = stored_views(augment, config)
    name: dict[str, object] = {
        "augment": augment.model_dump(mode="json", exclude={"mixup"}),  # stored views are those of single images
        "seed": None if transform.deterministic else seed,
    }
    return _store(classifier, dataset, _Views(transform, name, views), config, autocast, workers)


def evaluation_store(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    config: FeatureConfig,
    *,
    autocast: Autocast = nullcontext,
    workers: int | Literal["auto"] = "auto",
) -> FeatureStore:
    """The store that evaluation reads. It has one view of each image, made by the model's own transform."""
    own = _OwnTransform(classifier.backbone.image_transform)
    views = _Views(own, {"own": classifier.backbone.family}, 1)
    return _store(classifier, dataset, views, config, autocast, workers)


class _OwnTransform:
    """The model's own transform, called as a training transform is. A class, so that it can be sent to a worker."""

    def __init__(self, transform: Callable[[Image], Tensor]) -> None:
        self._transform = transform

    def __call__(self, image: Image, index: int, epoch: int) -> Tensor:
        return self._transform(image)


def stored_views(augment: AugmentConfig, config: FeatureConfig) -> int:
    """How many augmented versions of each training image a store holds; one without augmentation.

    Raises:
        UserError: augmentation without a number of views.
    """
    is_augmented = augment.kind != "none"
    if config.views is None and is_augmented:
        raise UserError(
            "features.store with augmentation keeps a fixed number of views of each image: choose features.views, for "
            "example 8, or set augment.kind=none"
        )
    return config.views if is_augmented and config.views is not None else 1


def require_frozen_part(image_split: int | None) -> None:
    """
    Raises:
        UserError: nothing of the image tower is frozen, so that there is nothing to store.
    """
    if image_split == BEFORE_STEM:
        raise UserError(
            "features.store keeps the output of the frozen part of the image tower, and of this one nothing is frozen, "
            "because its first layers are trained; set features.store=false, or adapt what comes later "
            "(kind: full has adapter.stem=false and adapter.blocks)"
        )


@dataclass(frozen=True)
class _Views:
    """How many views of each image are stored, and how they are made."""

    transform: Callable[[Image, int, int], Tensor]
    """Image, index and view to pixels."""
    name: dict[str, object]
    """Identifies the transform in the key."""
    count: int


def _store(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    views: _Views,
    config: FeatureConfig,
    autocast: Autocast,
    workers: int | Literal["auto"],
) -> FeatureStore:
    require_frozen_part(classifier.image_split)
    like = next(classifier.model.parameters())

    def encode(pixels_BCHW: Tensor) -> Tensor:
        with autocast():
            return classifier.encode_frozen(to_device(pixels_BCHW, like.device).to(like.dtype))

    with autocast():
        active = torch.is_autocast_enabled(like.device.type)
        precision = f"{like.dtype}/{torch.get_autocast_dtype(like.device.type) if active else 'no'}"
    key = FeatureKey(
        backbone=classifier.backbone.identity,
        split=classifier.image_split,
        precision=precision,
        transform=json.dumps({**views.name, **classifier.backbone.preprocessing.describe()}, sort_keys=True),
        data=dataset.content_identity,
        views=views.count,
    )
    was_training = classifier.training
    classifier.eval()  # the frozen part gives the same in both modes, and its norms keep their statistics
    try:
        return open_or_build(key, dataset, views.transform, encode, folder=config.folder, workers=workers)
    finally:
        classifier.train(was_training)
