"""The batches of a training run: from image files, from stored pixels, or from stored features."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from disam_peft.common.device import prefetch_to_device
from disam_peft.config.data import MixupConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.feature_batches import feature_batches
from disam_peft.data.loading.loader import make_stored_loader, make_train_loader
from disam_peft.data.loading.mixup import MixedBatches, mixed
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureStore
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.batch_augment import BatchAugment
from disam_peft.errors import UserError


def make_sampler(
    dataset: DomainDataset,
    config: TrainConfig,
    seed: int,
    *,
    mixup: MixupConfig | None = None,
    steps: int | None = None,
    **options: Any,
) -> DomainBatches:
    """The sampler of a run with these settings.

    Args:
        mixup: makes it one of ``MixedBatches``.
        steps: of the sampler; unset: those of the run.
        options: ``rank``, ``world_size`` and ``first_step``, as for ``DomainBatches``.

    Raises:
        UserError: as ``DomainBatches``.
    """
    length = config.steps if steps is None else steps
    options |= {"sampling": config.sampling, "class_sampling": config.class_sampling, "labels": dataset.labels}
    if mixup is None:
        return DomainBatches(dataset.domain_ids, config.batch_size, seed, length, **options)
    if len(dataset.present_domains) == 1:
        warnings.warn(
            f"mixup with one source domain ({dataset.present_domains[0]!r}): there is no other to mix it with, and "
            "nothing is mixed; add a domain, or leave out augment.mixup",
            stacklevel=3,
        )
    return MixedBatches(dataset.domain_ids, config.batch_size, seed, length, alpha=mixup.alpha, **options)


def training_batches(
    dataset: DomainDataset,
    sampler: DomainBatches,
    inputs: TrainTransform | FeatureStore,
    device: torch.device,
    *,
    workers: int | Literal["auto"] = "auto",
    images_on: Literal["device", "host"] = "device",
) -> Iterable[dict[str, Tensor]]:
    """Every batch of ``sampler``, which says for each step which samples of ``dataset`` this process sees.

    A batch is a dictionary of tensors with B rows: ``pixels`` (B, 3, H, W) where images are read, or ``frozen``
    (B, ...) where features are; ``labels``, ``domains`` and ``indices`` (B,) int64. ``domains`` and ``indices`` stay on
    the host, which reads them. With ``MixedBatches`` a batch has mixtures, ``other_labels`` and ``shares``, see
    ``mixed``.

    Args:
        sampler: made for the ``domain_ids`` of ``dataset``, for this rank, from the step where training begins.
        inputs: what the images become. A ``TrainTransform`` reads and augments images; where ``dataset`` was loaded
            with ``data.pixel_store``, the same augmentation is applied to stored pixels. A ``FeatureStore`` gives what
            the frozen part of the model made of the images.
        workers: processes that read and decode images.
        images_on: ``device`` copies ``pixels`` and ``labels`` to ``device`` while the batch before is worked on.
            ``host`` leaves image batches on the host, for a caller that splits them into micro-batches to save memory
            and copies each when its turn comes. Stored pixels and features are on ``device`` in both cases.

    Raises:
        UserError: an augmentation with mixup and a sampler without; the pixel store's side is below the model's input,
            or there is no room for the store on the disk.
        BadImage: an image cannot be read or decoded. For image files this is raised while iterating.
    """
    if isinstance(sampler, MixedBatches):
        batches = _unmixed(dataset, sampler, inputs, device, workers, images_on)
        return mixed(batches, sampler)
    if isinstance(inputs, TrainTransform) and inputs.config.mixup is not None:
        raise UserError("the augmentation has mixup, and the sampler pairs no samples; hand over MixedBatches")
    return _unmixed(dataset, sampler, inputs, device, workers, images_on)


def _unmixed(
    dataset: DomainDataset,
    sampler: DomainBatches,
    inputs: TrainTransform | FeatureStore,
    device: torch.device,
    workers: int | Literal["auto"],
    images_on: Literal["device", "host"],
) -> Iterable[dict[str, Tensor]]:
    if isinstance(inputs, FeatureStore):
        return feature_batches(inputs, dataset, sampler, device)
    pin_memory = device.type == "cuda"
    if dataset.pixel_plan is not None:
        augment = BatchAugment(inputs.preprocessing, inputs.config, inputs.seed)
        return make_stored_loader(dataset, sampler, augment, device=device, workers=workers, pin_memory=pin_memory)
    loader = make_train_loader(dataset, sampler, inputs, workers=workers, pin_memory=pin_memory)
    return loader if images_on == "host" else prefetch_to_device(loader, device, ("pixels", "labels"))
