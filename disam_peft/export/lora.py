"""Any change of linear layers as a plain LoRA of a given rank, with the error of the truncation stated.

Letters of shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.peft.plan import plan
from disam_peft.adapters.peft.targets import tower_blocks
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone, Target
from disam_peft.backbones.with_model import with_model
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.strict_json import json_bytes
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import Notice, UserError
from disam_peft.export.logit_difference import largest_difference
from disam_peft.export.peft import export_peft

LORA_NOTE = "disam_peft_lora.json"
"""Says how far a LoRA that ``export --to lora`` made is from the adapter that it was made of."""


@dataclass(frozen=True)
class LoraApproximation:
    """How far a LoRA is from the adapter that it was made of.

    Attributes:
        rank: of every layer.
        made_of: the kind of the adapter.
        relative_error: ``|D - B A| / |D|`` over all layers together, D the change of the weights, in Frobenius norms.
        layers: the same for each layer that changed, by its name.
        left_out: weights that the adapter changed and no LoRA has (norms, biases, embeddings); the logits know them.
        logit_difference: largest difference of the logits on random images, and
        largest_logit: the largest logit there.
    """

    rank: int
    made_of: str
    relative_error: float
    layers: Mapping[str, float]
    left_out: Sequence[str]
    logit_difference: float = 0.0
    largest_logit: float = 0.0

    def in_words(self) -> str:
        worst = max(self.layers, key=lambda name: self.layers[name])
        found = (
            f"the LoRA of rank {self.rank} lacks {100 * self.relative_error:.2g} % of the change of the weights of "
            f"{len(self.layers)} layers (Frobenius norm; {100 * self.layers[worst]:.2g} % in {worst}); on random "
            f"images logits differ by up to {self.logit_difference:.2g}, and the largest is {self.largest_logit:.3g}"
        )
        if not self.left_out:
            return found
        return f"{found}. {len(self.left_out)} changed weights are left out, which no LoRA has: {_some(self.left_out)}"


def truncated(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of the nearest matrix of a rank, by singular values.

    Args:
        delta_OI: any real matrix.
        rank: at least 1; beyond the smaller side, the factors are filled up with zeros.

    Returns:
        A (R, I) and B (O, R), each with the root of the singular values, and the singular values that are left out.
    """
    left, values, right = torch.linalg.svd(delta_OI, full_matrices=False)
    roots = values[:rank].sqrt()
    A_RI, B_OR = delta_OI.new_zeros(rank, delta_OI.shape[1]), delta_OI.new_zeros(delta_OI.shape[0], rank)
    A_RI[: len(roots)] = roots.unsqueeze(1) * right[:rank]
    B_OR[:, : len(roots)] = left[:, :rank] * roots
    return A_RI, B_OR, values[rank:]


@torch.no_grad()
def lora_of(classifier: ClipClassifier, rank: int) -> tuple[ClipClassifier, LoraApproximation]:
    """A classifier of its own, on a copy of the backbone, whose adapter is the LoRA nearest to that of ``classifier``.

    Its factor ``alpha / rank`` is 1. Biases of the layers are kept exactly where all of them have one; every other
    weight that is not that of a linear layer stays as it was, and is listed.

    Raises:
        UserError: no adapter, one that cannot be merged, or one that changes no linear layer.
    """
    adapter, backbone = classifier.adapter, classifier.backbone
    if adapter is None:
        raise UserError("zero-shot classification changes no weights; train an adapter first")
    changes = _changes(adapter, backbone)
    linear = {target.name: target for target in backbone.targets() if target.kind == "linear"}
    of_layers = {name: name.removesuffix(".weight") for name in changes}
    deltas = {layer: changes[name] for name, layer in of_layers.items() if layer in linear}
    if not deltas:
        raise UserError(
            f"this '{adapter.kind}' adapter changes no weights of linear layers, only {_some(list(changes))}, which no "
            "LoRA has; use --to merged, which writes all weights"
        )
    scale = "trained" if adapter.trained_scale is not None else "frozen"
    config = _covering(backbone, [linear[name] for name in deltas], rank).model_copy(update={"logit_scale": scale})
    plain = _plain_copy(adapter, backbone)
    targets, _ = plan(config, plain)
    rest = [name for name, layer in of_layers.items() if layer not in deltas]
    biases = [f"{target.name}.bias" for target in targets if f"{target.name}.bias" in rest]
    if biases and all(f"{target.name}.bias" in plain.base_parameters() for target in targets):
        config = config.model_copy(update={"bias": not any(target.projection == "k" for target in targets)})
    biases = biases if config.bias else []
    left_out = [name for name in rest if name not in biases]
    lora = build_adapter(config, plain, classifier.prompts, to_train=False)
    state = {name: torch.zeros_like(tensor) for name, tensor in lora.state().items()}
    if adapter.trained_scale is not None:
        state |= adapter.trained_scale.state_dict(prefix="trained_scale.")
    errors, missing, total = dict[str, float](), 0.0, 0.0
    for name, delta_OI in deltas.items():
        A_RI, B_OR, values = truncated(delta_OI, rank)
        before = f"base_model.model.{name}."
        state[f"{before}lora_A.weight"].copy_(A_RI)
        state[f"{before}lora_B.weight"].copy_(B_OR)
        here, norm = float(values.square().sum()), float(delta_OI.square().sum())
        errors[name] = (here / norm) ** 0.5
        missing, total = missing + here, total + norm
    for name in biases:
        state[f"base_model.model.{name.removesuffix('.bias')}.lora_B.bias"].copy_(changes[name])
    lora.load_state(state)
    found = LoraApproximation(rank, adapter.kind, (missing / total) ** 0.5, errors, left_out)
    made = ClipClassifier(plain, lora, classifier.prompts)
    difference, largest = largest_difference(classifier, plain, lora)
    return made, replace(found, logit_difference=difference, largest_logit=largest)


def export_lora(
    directory: str | Path,
    classifier: ClipClassifier,
    *,
    rank: int,
    trained_with: Mapping[str, Any] = MappingProxyType({}),
) -> LoraApproximation:
    """Write the LoRA of ``lora_of`` as ``export_peft`` writes adapters, with its errors in ``disam_peft_lora.json``.

    ``classifier`` stays as it is; put it at an alpha before (``ClipClassifier.interpolation``) to export it there.

    Returns:
        how far it is from the adapter.

    Raises:
        UserError: as ``lora_of`` and ``export_peft``.
    """
    made, found = lora_of(classifier, rank)
    note = {LORA_NOTE: json_bytes(asdict(found))}
    export_peft(directory, made, trained_with={**trained_with, "lora_of": found.made_of}, more=note)
    warnings.warn(found.in_words(), Notice, stacklevel=2)
    return found


def _changes(adapter: Adapter, backbone: ClipBackbone) -> dict[str, Tensor]:
    """The changes of all weights that the adapter changes, by their names, in float64."""
    base = backbone.base_parameters()
    found = {
        name: merged.detach().double() - base[name].detach().double()
        for name, merged in adapter.merged_weights(backbone).items()
        if name in base
    }
    scale = {"logit_scale", "logit_bias"}  # a trained one stands beside the LoRA
    return {name: change for name, change in found.items() if name not in scale and bool(change.any())}


def _covering(backbone: ClipBackbone, changed: list[Target], rank: int) -> LoraAdapterConfig:
    """The settings of a LoRA that has all of these layers. It may have more, whose B is zero."""
    towers = list(dict.fromkeys(target.tower for target in changed))
    counts = [tower_blocks(backbone, tower) for tower in towers]
    inside = sorted({target.block for target in changed if target.block is not None})
    exist_everywhere = inside and inside[-1] < min(counts)
    return LoraAdapterConfig(
        towers=towers,
        blocks=inside if exist_everywhere and len(inside) < max(counts) else "all",
        projections=list(dict.fromkeys(target.projection for target in changed)),
        rank=rank,
        alpha=float(rank),
    )


@torch.no_grad()
def _plain_copy(adapter: Adapter, backbone: ClipBackbone) -> ClipBackbone:
    """The backbone without its adapter, as a copy; tokenizer and transform are shared."""
    plain, base = with_model(backbone, adapter.merged(backbone)), backbone.base_parameters()
    for name, parameter in plain.base_parameters().items():
        parameter.copy_(base[name])
    return plain


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
