"""An adapter that starts from training features; run as a program, its start on one, two and four gloo processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.fit_start import start_from_features
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.data import DataConfig, FeatureConfig
from disam_peft.config.feature_adapters import ClosedFormProbeConfig, TipAdapterConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load

STARTING: dict[str, AdapterConfig] = {
    "cache": TipAdapterConfig(shots=2, search_step=[8, 5]),
    "ridge": ClosedFormProbeConfig(),
    "probe": LpFtConfig(adapter=LoraAdapterConfig(rank=2, seed=1)),
}
"""Shipped adapters that start from features, each in its own way. The last one changes the backbone."""


class ClassMeansConfig(Config):
    kind: str = "class_means"
    image_split: int | None = None


class ClassMeans(Adapter):
    """logits = weight f / |f|, where the weight starts as the mean of the normalised features of each class.

    Plain parameters and buffers, and no code for their state: C classes, D domains (three here).
    """

    kind = "class_means"

    def __init__(self, config: ClassMeansConfig, weight_CE: Tensor) -> None:
        super().__init__()
        self.config, self.image_split = config, config.image_split
        self.weight = nn.Parameter(weight_CE)
        self.images_CD: Tensor
        self.calls: Tensor
        self.register_buffer("images_CD", torch.zeros(len(weight_CE), 3, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> ClassMeans:
        assert isinstance(config, ClassMeansConfig)
        return cls(config, torch.zeros(len(prompts.class_names), backbone.embed_dim, dtype=parameter_dtype(backbone)))

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> None:
        normalised_ME = nn.functional.normalize(features_ME, dim=-1)
        for label in range(len(self.weight)):
            self.weight[label].copy_(normalised_ME[labels_M == label].mean(dim=0))
            self.images_CD[label].copy_(domains_M[labels_M == label].bincount(minlength=3))
        self.calls += 1

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.normalize(features_BE, dim=-1) @ self.weight.T


def class_means(name: str, dataset: DomainDataset, image_split: int | None = None) -> ClipClassifier:
    """The classifier of an open_clip checkpoint, before it has started."""
    backbone = load_backbone(BackboneConfig(name=name))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    adapter = ClassMeans.build(ClassMeansConfig(image_split=image_split), backbone, prompts)
    return ClipClassifier(backbone, adapter, prompts)


def not_started(backbone: ClipBackbone, dataset: DomainDataset, config: AdapterConfig) -> ClipClassifier:
    """The classifier with this adapter before it has started."""
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    return ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts)


def started(rank: int, world_size: int) -> dict[str, Any]:
    """The state after the start, from images and from a store, and how many images this rank encoded for the first."""
    dataset, seen, found = load(DataConfig(root=Path(sys.argv[2]), verify=False)), [], {}
    held_back = dataset.select(range(1, len(dataset), 3))
    for name, features in {
        "images": FeatureConfig(),
        "store": FeatureConfig(store=True, folder=Path(sys.argv[3]) / f"stores-{world_size}"),
    }.items():
        classifier = class_means(sys.argv[1], dataset)
        encode = classifier.encode_frozen

        def counted(pixels_BCHW: Tensor, encode: Any = encode) -> Tensor:
            seen.append(len(pixels_BCHW))
            return encode(pixels_BCHW)

        classifier.encode_frozen = counted
        assert start_from_features(classifier, dataset, features, workers=0)
        assert isinstance(classifier.adapter, ClassMeans)
        found |= {f"{name} {key}": tensor for key, tensor in classifier.adapter.state().items()}
        found[f"{name} seen"] = torch.tensor(sum(seen))
        # from a store one of them is enough: what they get is the same
        for label, config in STARTING.items() if name == "images" else [("probe", STARTING["probe"])]:
            other = not_started(classifier.backbone, dataset, config)
            start = start_from_features(other, dataset, features, held_back=held_back, workers=0)
            assert start is not None and start.numbers is not None and other.adapter is not None
            found |= {f"{name} {label} {key}": torch.tensor(number) for key, number in start.numbers.items()}
            found |= {f"{name} {label} {key}": t for key, t in other.adapter.state().items() if "lora" not in key}
        seen.clear()
    return found


if __name__ == "__main__":
    from tests.helpers.disam_ranks import fork_cases

    torch.set_num_threads(1)
    for world in (1, 2, 4):
        (Path(sys.argv[3]) / str(world)).mkdir()
        fork_cases(world, f"{sys.argv[3]}/{world}", started)
