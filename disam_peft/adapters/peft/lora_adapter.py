"""LoRA with its settings spelled out, and its starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from disam_peft.adapters.interpolation import MoveTo
from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.adapters.peft.attaching import seeded
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.peft.plan import lora_ranks, plan
from disam_peft.adapters.peft.starts import FactorBesideItsStart, require_rank, start_factors
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone, Target
from disam_peft.config.base import Config
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import Notice, UserError


class LoraAdapter(PeftAdapter):
    """``W x + s B A x`` with s = alpha / rank.

    PiSSA and OLoRA start with A0 and B0 that are a part of W, and train ``(W - s B0 A0) x + s B A x``. Here W stays as
    it is: the same function is a LoRA of twice the rank, ``W x + s [B, -B0] [A; A0] x``, of which one half is trained.
    This is the form into which peft converts such adapters (``path_initial_model_for_weight_conversion``). So they are
    saved: plain peft loads them onto the plain backbone.
    """

    kind = "lora"

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        config = _checked(config)
        targets, _ = plan(config, backbone)
        parts = 2 if config.keeps_start else 1
        total = 0
        for name, rank in lora_ranks(config, backbone, targets).items():
            layer: Any = backbone.model.get_submodule(name)
            total += parts * rank * (layer.in_features + layer.out_features)
        return total

    @torch.no_grad()
    def begin(self, backbone: ClipBackbone, targets: list[Target]) -> None:
        config = _checked(self.config)
        if config.init == "kaiming":
            return
        layers: dict[str, Any] = dict(self._layers())
        with seeded(config.seed):
            for name, rank in lora_ranks(config, backbone, targets).items():
                layer = layers[name]
                down, up = layer.lora_A["default"], layer.lora_B["default"]
                weight_OI = layer.base_layer.weight
                require_rank(config.init, rank, name, weight_OI)
                factors = start_factors(config.init, weight_OI, rank, layer.scaling["default"])
                A_RI, B_OR = (factor.to(down.weight) for factor in factors)
                if config.keeps_start:
                    layer.lora_A["default"] = FactorBesideItsStart(A_RI, A_RI.clone(), dim=0)
                    layer.lora_B["default"] = FactorBesideItsStart(B_OR, -B_OR, dim=1)
                else:
                    down.weight.copy_(A_RI)
                    up.weight.copy_(B_OR)

    # -- weights -------------------------------------------------------------------------------------------------

    def load_state(self, state: dict[str, Tensor]) -> None:
        if not _checked(self.config).keeps_start:
            super().load_state(state)
            return
        self._require_unmerged()
        require_matching_state(self.kind, self._own_tensors(), state)
        for name, factor in self._factors():
            factor.load(state[name])
        for name, tensor in self._scale_tensors().items():
            tensor.copy_(state[name])

    def _views(self) -> dict[str, Tensor]:
        """Where a factor has its start beside it, both as one tensor, which is a copy."""
        if not _checked(self.config).keeps_start:
            return super()._views()
        return {name: factor.weight.detach() for name, factor in self._factors()}

    def _factors(self) -> Iterator[tuple[str, FactorBesideItsStart]]:
        """By their names in ``state``."""
        for layer_name, layer in self._layers():
            for part in ("lora_A", "lora_B"):
                yield f"base_model.model.{layer_name}.{part}.weight", layer.get_submodule(f"{part}.default")  # type: ignore[misc]

    # -- between zero-shot and trained ---------------------------------------------------------------------------

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        config = _checked(self.config)
        if config.keeps_start:
            raise UserError(
                f"a 'lora' adapter with init: {config.init} cannot be written at another alpha as it is: what it "
                "started from stands beside what is trained; export --to lora or --to merged at that alpha"
            )
        return super().zero_shot_tensors(backbone, prompts)

    def interpolation(self, backbone: ClipBackbone, prompts: ClassPrompts) -> AbstractContextManager[MoveTo]:
        if _checked(self.config).keeps_start:
            return self._blended_layers(backbone)
        return super().interpolation(backbone, prompts)

    # -- exporting -----------------------------------------------------------------------------------------------

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        config = _checked(self.config)
        if config.keeps_start:
            warnings.warn(
                f"an adapter that started from a part of the weights (init: {config.init}) is written as peft converts "
                f"it: a LoRA of rank {2 * config.rank}, twice its own, for the backbone as it is",
                Notice,
                stacklevel=2,
            )
        return super().exported_files(class_names, class_features)


def _checked(config: Config) -> LoraAdapterConfig:
    assert isinstance(config, LoraAdapterConfig)
    return config
