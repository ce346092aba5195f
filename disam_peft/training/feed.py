"""What the loop is fed with: this process's part of every batch, from images, stored images or stored features."""

from __future__ import annotations

from collections.abc import Iterable

from accelerate import Accelerator
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import training_store
from disam_peft.common.device import sent_ahead
from disam_peft.config.data import AugmentConfig, FeatureConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.feature_batches import feature_batches
from disam_peft.data.loading.loader import make_stored_loader, make_train_loader
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.batch_augment import BatchAugment


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
    if features is not None and features.store:
        autocast = accelerator.autocast
        store = training_store(classifier, dataset, augment, seed, features, autocast=autocast, workers=config.workers)
        return feature_batches(store, dataset, places, device)
    sees = classifier.backbone.preprocessing
    look = (sees.size, sees.mean, sees.std, sees.interpolation, augment, seed)
    pin = device.type == "cuda"
    if dataset.pixel_plan is not None:
        return make_stored_loader(
            dataset, places, BatchAugment(*look), device=device, workers=config.workers, pin_memory=pin
        )
    loader = make_train_loader(dataset, places, TrainTransform(*look), workers=config.workers, pin_memory=pin)
    if config.gradient_accumulation_steps > 1:
        return loader  # pieces are there to save memory: each is sent when it is its turn
    return sent_ahead(loader, device, ("pixels", "labels"))
