"""Folders, archives, tables and Hub datasets as (image, label, domain); splits, batches, augmentation, the data check.

The names below are imported on first use: the configs alone must not cost an import of torch or datasets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AugmentConfig": "augment",
    "BadImage": "decode",
    "BatchAugment": "batch_augment",
    "DataConfig": "sources",
    "DataReport": "check",
    "DomainBatches": "batches",
    "DomainDataset": "dataset",
    "ImageLoader": "loader",
    "ShapesConfig": "shapes.config",
    "TrainTransform": "augment",
    "check_no_leak": "splits",
    "clean_class_name": "classnames",
    "decode_image": "decode",
    "inspect": "check",
    "leave_out": "splits",
    "load": "sources",
    "make_eval_loader": "loader",
    "make_stored_loader": "loader",
    "make_train_loader": "loader",
    "split_train_validation": "splits",
    "verified": "check",
}
__all__ = [
    "AugmentConfig",
    "BadImage",
    "BatchAugment",
    "DataConfig",
    "DataReport",
    "DomainBatches",
    "DomainDataset",
    "ImageLoader",
    "ShapesConfig",
    "TrainTransform",
    "check_no_leak",
    "clean_class_name",
    "decode_image",
    "inspect",
    "leave_out",
    "load",
    "make_eval_loader",
    "make_stored_loader",
    "make_train_loader",
    "split_train_validation",
    "verified",
]

if TYPE_CHECKING:
    from disam_peft.data.augment import AugmentConfig, TrainTransform
    from disam_peft.data.batch_augment import BatchAugment
    from disam_peft.data.batches import DomainBatches
    from disam_peft.data.check import DataReport, inspect, verified
    from disam_peft.data.classnames import clean_class_name
    from disam_peft.data.dataset import DomainDataset
    from disam_peft.data.decode import BadImage, decode_image
    from disam_peft.data.loader import ImageLoader, make_eval_loader, make_stored_loader, make_train_loader
    from disam_peft.data.shapes.config import ShapesConfig
    from disam_peft.data.sources import DataConfig, load
    from disam_peft.data.splits import check_no_leak, leave_out, split_train_validation


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disam_peft.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"disam_peft.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
