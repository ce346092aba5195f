"""LP-FT: a linear probe first, then an adapter of the image tower from it, head and adapter together.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", arXiv 2202.10054.
Shapes in this file: B images, M training images, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.clip_adapter import ClipAdapter
from disam_peft.adapters.full import FullAdapter
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.logistic_regression import fit_head
from disam_peft.adapters.peft.lora_adapter import LoraAdapter
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.several_parts import SeveralParts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig, LinearProbeConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError

INNER: dict[type[Config], type[Adapter]] = {
    LoraAdapterConfig: LoraAdapter,
    PeftAdapterConfig: PeftAdapter,
    FullConfig: FullAdapter,
    ClipAdapterConfig: ClipAdapter,
}
"""What may stand under a head: config class -> adapter."""

_INNER, _HEAD = "adapter", "head"
"""The names of the parts."""


class LpFtAdapter(SeveralParts):
    """A linear head on the features of an adapted image tower.

    Before the first step, ``fit_start`` fits the head to the features of the training images, with the tower as it is
    then. The steps train both. The first logits of training are those of the fitted head.
    """

    kind = "lp_ft"

    @property
    def inner(self) -> Adapter:
        """What adapts the image tower."""
        return self.parts()[_INNER]

    @property
    def head(self) -> LinearProbeAdapter:
        head = self.parts()[_HEAD]
        assert isinstance(head, LinearProbeAdapter)
        return head

    @classmethod
    def part_configs(cls, config: Config) -> dict[str, Config]:
        config = _checked(config)
        return {_INNER: config.adapter, _HEAD: LinearProbeConfig(bias=config.probe.bias)}

    @classmethod
    def part_class(cls, config: Config) -> type[Adapter]:
        return LinearProbeAdapter if isinstance(config, LinearProbeConfig) else INNER[type(config)]

    @classmethod
    def with_part_configs(cls, config: Config, parts: Mapping[str, Config]) -> Config:
        return config.model_copy(update={"adapter": parts[_INNER]})

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> LpFtAdapter:
        config = _checked(config)
        of_head = LinearProbeConfig(bias=config.probe.bias)
        head = LinearProbeAdapter.build(of_head, backbone, prompts)
        if config.probe.init == "zeros":
            empty_CE, empty_C = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
            head = LinearProbeAdapter(of_head, empty_CE, empty_C)
        inner = INNER[type(config.adapter)].build(config.adapter, backbone, prompts)
        return cls(config, {_INNER: inner, _HEAD: head})

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> Mapping[str, float]:
        """Fit the head; the domains of the images do not matter."""
        assert isinstance(self.config, LpFtConfig)
        probe = self.config.probe
        features_ME = self.inner.image_features(features_ME).to(self.head.weight.dtype)
        fitted = fit_head(
            nn.functional.normalize(features_ME, dim=-1),
            labels_M,
            self.head.weight,
            self.head.bias,
            train_bias=probe.bias,
            weight_decay=probe.weight_decay,
            steps=probe.steps,
        )
        self.head.weight.copy_(fitted.weight_CE)
        self.head.bias.copy_(fitted.bias_C)
        return {"training_loss": fitted.loss, "training_top1": fitted.top1, "probe_steps": fitted.steps}

    # -- the forward pass ----------------------------------------------------------------------------------------

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return self.head.logits(features_BE, class_features_CE, scale, bias)

    @property
    def head_bias(self) -> Tensor | None:
        return self.head.head_bias

    # -- between zero-shot and trained ---------------------------------------------------------------------------

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The zero-shot head and the weights of the backbone, also for a head that started from zeros."""
        super().require_zero_shot_weights(config)

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        self.require_zero_shot_weights(self.config)
        try:
            return super().zero_shot_tensors(backbone, prompts)
        except UserError as error:  # it would advise a merged checkpoint, in which the head has no place
            raise UserError(
                f"the '{self.inner.kind}' adapter below the head cannot be written at another alpha: the weights of "
                "the model are not linear in its tensors; disam-peft frontier and evaluate --alpha compute them "
                "without writing them, or train lora or full below the head"
            ) from error

    def merged(self, backbone: ClipBackbone) -> nn.Module:
        """
        Raises:
            UserError: always; a CLIP has no place for the head.
        """
        raise UserError(
            f"a '{self.kind}' adapter classifies by a head of its own, for which a checkpoint of CLIP has no place; "
            "use --to peft, which writes head and adapter for disam_peft.load_adapter"
        )


def _checked(config: Config) -> LpFtConfig:
    assert isinstance(config, LpFtConfig)
    return config
