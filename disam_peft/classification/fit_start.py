"""Adapters that start from the features of the training set: the features are computed, and ``fit_start`` is called.

Shapes in this file: M training images, B images of a batch, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.adapters.base import Autocast, cosine_logits, parameter_dtype
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import evaluation_store
from disam_peft.common.device import to_device
from disam_peft.config.data import FeatureConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import make_eval_loader
from disam_peft.errors import UserError

BATCH = 64
"""As many images at once as the feature store encodes, so that features are the same with and without a store."""


@dataclass(frozen=True)
class Start:
    """An adapter has started from features.

    Attributes:
        numbers: what it tells of how that went; None: nothing.
    """

    numbers: Mapping[str, float] | None


def start_from_features(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    features: FeatureConfig | None = None,
    *,
    held_back: DomainDataset | None = None,
    autocast: Autocast = nullcontext,
    workers: int | Literal["auto"] = "auto",
) -> Start | None:
    """Call ``Adapter.fit_start`` with the features of the training set, and ``tune`` with those of ``held_back``.

    Every process calls this before step 1 of a fresh run. A run that is resumed does not, because what ``fit_start``
    set is part of the adapter's saved state.

    Nothing is computed for an adapter that does not override ``fit_start``, or for zero-shot classification. The images
    are seen without augmentation, through the model's own transform, as evaluation sees them. With several processes
    each computes a share, all get the features of the whole set, and all start from the weights of process 0.

    Args:
        dataset: the training set, on every process the whole of it.
        features: with ``store``, the features come from the feature store, which is built first if it is not there;
            unset: from images.
        held_back: images of the source domains that are not trained on, for an adapter that chooses settings by them;
            on every process all of them.
        autocast: makes the context of a forward pass, for example ``accelerator.autocast``.
        workers: processes that decode images.

    Returns:
        What the adapter tells of its start; None where it does not start from features.

    Raises:
        UserError: an empty training set, no ``held_back`` where it is needed, or weights that are not finite.
        BadImage: an image that cannot be decoded.
    """
    adapter = classifier.adapter
    if adapter is None or not adapter.starts_from_features():
        return None
    features = features or FeatureConfig()
    features_ME = _features(classifier, dataset, features, autocast, workers)
    with torch.no_grad():
        numbers = adapter.fit_start(features_ME, *_labels_and_domains(classifier, dataset))
        if adapter.needs_tuning():
            if held_back is None or len(held_back) == 0:
                raise UserError(
                    f"a '{adapter.kind}' adapter chooses settings by held-back images of the source domains, and there "
                    "are none; hand over held_back=..., or set them in its config"
                )
            features_VE = _features(classifier, held_back, features, autocast, workers)
            zero_shot_VC = _zero_shot_logits(classifier, features_VE)
            chosen = adapter.tune(features_VE, *_labels_and_domains(classifier, held_back), zero_shot_VC)
            numbers = {**(numbers or {}), **chosen}
    state = adapter.state()
    broken = sorted(name for name, tensor in state.items() if not torch.isfinite(tensor).all())
    if broken:
        raise UserError(
            f"the '{adapter.kind}' adapter cannot start from the features of {dataset.origin}: {broken[0]} holds NaN "
            "or infinity; check that every class has training images and that the backbone's features are finite"
        )
    if dist.is_initialized() and dist.get_world_size() > 1:
        for _, tensor in sorted(state.items()):
            dist.broadcast(tensor, src=0)
        adapter.load_state(state)
    return Start(numbers)


def make_room(classifier: ClipClassifier, dataset: DomainDataset) -> None:
    """Call ``Adapter.make_room``: tensors of the adapter get the size that this training set asks for."""
    if classifier.adapter is not None:
        classifier.adapter.make_room(*_labels_and_domains(classifier, dataset))


def _labels_and_domains(classifier: ClipClassifier, dataset: DomainDataset) -> tuple[Tensor, Tensor]:
    device = classifier.backbone.device
    return torch.from_numpy(dataset.labels).to(device), torch.from_numpy(dataset.domain_ids).to(device)


def _zero_shot_logits(classifier: ClipClassifier, features_BE: Tensor) -> Tensor:
    """Logits (B, C) of zero-shot classification. The tower is frozen where an adapter works on its features."""
    backbone = classifier.backbone
    class_features_CE = classifier.zero_shot_class_features()
    return cosine_logits(features_BE, class_features_CE, backbone.logit_scale, backbone.logit_bias)


@torch.no_grad()
def _features(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    features: FeatureConfig,
    autocast: Autocast,
    workers: int | Literal["auto"],
) -> Tensor:
    """Features (M, E) of the image tower, not normalised, in at least float32 on the backbone's device."""
    if len(dataset) == 0:
        raise UserError(f"no training images to start from: no samples left of {dataset.origin}")
    backbone = classifier.backbone
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Whole batches to each process: the same batches, and so the same bits, for any number of processes.
    starts = range(rank * BATCH, len(dataset), world_size * BATCH)
    batches = [range(start, min(start + BATCH, len(dataset))) for start in starts]
    features_ME = torch.zeros(len(dataset), backbone.embed_dim, dtype=parameter_dtype(backbone), device=backbone.device)
    was_training = classifier.training
    classifier.eval()
    try:
        frozen_batches = _frozen_batches(classifier, dataset, batches, features, autocast, workers)
        for indices, frozen in zip(batches, frozen_batches, strict=True):
            with autocast():
                features_BE = classifier.tower_features(frozen)
            features_ME[indices.start : indices.stop] = features_BE.to(features_ME.dtype)
    finally:
        classifier.train(was_training)
    if world_size > 1:
        dist.all_reduce(features_ME)  # every row is zero on all processes but one: adding changes no value
    return features_ME


def _frozen_batches(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    batches: list[range],
    features: FeatureConfig,
    autocast: Autocast,
    workers: int | Literal["auto"],
) -> Iterator[Tensor]:
    """The frozen part's output of each batch, from the store or from the images."""
    device, dtype = classifier.backbone.device, classifier.backbone.dtype
    if features.store:
        store = evaluation_store(classifier, dataset, features, autocast=autocast, workers=workers)
        for indices in batches:
            yield to_device(store.rows(indices), device)
        return
    own = dataset.select([index for indices in batches for index in indices])
    for batch in make_eval_loader(own, classifier.backbone.image_transform, BATCH, workers=workers):
        with autocast():
            frozen = classifier.encode_frozen(to_device(batch["pixels"], device).to(dtype))
        yield frozen  # outside of the context, which must not stay open in the caller
