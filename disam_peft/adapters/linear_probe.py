"""A linear layer on normalised image features. Shapes in this file: B images, C classes, E embedding width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.prompts import ClassPrompts, fill_templates, zero_shot_features
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.adapters import LinearProbeConfig
from disam_peft.config.base import Config

_INIT_STD = 0.01


class LinearProbeAdapter(Adapter):
    """logits = weight_CE @ f / |f| + bias_C.

    From zero-shot, the weight is the logit scale times the class features, so that the first logits are those of
    zero-shot classification (the classifier head of WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).
    """

    kind = "linear_probe"

    def __init__(self, config: LinearProbeConfig, weight_CE: Tensor, bias_C: Tensor) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(weight_CE)
        if config.bias:
            self.bias = nn.Parameter(bias_C)
        else:
            # What the model itself adds to every logit stays, it is only not trained.
            self.register_buffer("bias", bias_C, persistent=False)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> LinearProbeAdapter:
        """Changes nothing in the backbone."""
        assert isinstance(config, LinearProbeConfig)
        dtype, device = parameter_dtype(backbone), backbone.device
        bias_C = torch.zeros(len(prompts.class_names), dtype=dtype, device=device)
        if config.init == "random":
            generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
            shape = (len(prompts.class_names), backbone.embed_dim)
            # Drawn on the CPU: the same numbers on every device.
            weight_CE = _INIT_STD * torch.randn(shape, generator=generator)
            return cls(config, weight_CE.to(device, dtype), bias_C)
        return cls(config, *_zero_shot_head(backbone, prompts))

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The zero-shot head, also for a probe that started from random weights."""

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        weight_CE, bias_C = _zero_shot_head(backbone, prompts)
        return {name: w0 for name, w0 in (("weight", weight_CE), ("bias", bias_C)) if name in self.trainable()}

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        return classes * backbone.embed_dim

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Logits (B, C) of the head, in its own precision; class features, scale and bias are in its weights."""
        with torch.autocast(features_BE.device.type, enabled=False):
            normalised_BE = nn.functional.normalize(features_BE.to(self.weight.dtype), dim=-1)
            return nn.functional.linear(normalised_BE, self.weight, self.bias)

    @property
    def head_bias(self) -> Tensor | None:
        return self.bias if isinstance(self.bias, nn.Parameter) else None


@torch.no_grad()
def _zero_shot_head(backbone: ClipBackbone, prompts: ClassPrompts) -> tuple[Tensor, Tensor]:
    """The weight (C, E) and the bias (C,) of the head whose logits are those of zero-shot classification."""
    dtype, device = parameter_dtype(backbone), backbone.device
    tokens_NL = backbone.tokenize(fill_templates(prompts))
    features_CE = zero_shot_features(backbone, tokens_NL, len(prompts.templates))
    bias_C = torch.zeros(len(prompts.class_names), dtype=dtype, device=device)
    if backbone.logit_bias is not None:
        bias_C += backbone.logit_bias
    return (backbone.logit_scale * features_CE).to(device, dtype), bias_C
