"""What the loop is fed with: this process's part of every batch, from images, stored images or stored features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from accelerate import Accelerator
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import training_store
from disam_peft.config.data import AugmentConfig, FeatureConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.batches import training_batches
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureStore
from disam_peft.data.transforms.augment import TrainTransform


def feed(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    config: TrainConfig,
    augment: AugmentConfig,
    features: FeatureConfig | None,
    seed: int,
    accelerator: Accelerator,
    *,
    first_step: int,
) -> Iterable[dict[str, Tensor]]:
    """The batches of this process, from ``first_step`` on: ``pixels`` or, from a store, ``frozen``, which the frozen
    part makes of them; ``labels``, ``domains``, ``indices``. The last two stay on the host, which reads them."""
    places = DomainBatches(
        dataset.domain_ids,
        config.batch_size,
        seed,
        config.steps,
        sampling=config.sampling,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_step=first_step,
    )
    device = accelerator.device
    inputs: TrainTransform | FeatureStore
    if features is not None and features.store:
        autocast = accelerator.autocast
        inputs = training_store(classifier, dataset, augment, seed, features, autocast=autocast, workers=config.workers)
    else:
        inputs = TrainTransform(classifier.backbone.preprocessing, augment, seed)
    images_on: Literal["device", "host"] = "host" if config.gradient_accumulation_steps > 1 else "device"
    return training_batches(dataset, places, inputs, device, workers=config.workers, images_on=images_on)
