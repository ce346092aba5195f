"""A linear layer on normalised image features.

Shapes in this file: B images, C classes, T templates, N = C * T prompts, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.prompts import ClassPrompts, fill_templates, prompt_features, zero_shot_features
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import LinearProbeConfig

_INIT_STD = 0.01


class LinearProbeAdapter(Adapter):
    """logits = weight_CE @ f / |f| + bias_C.

    From zero-shot, the weight is the logit scale times the class features, so that the first logits are those of
    zero-shot classification (the classifier head of WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    With ``text_weight`` the prompts are training samples, too (Lin et al. 2023, arXiv 2301.06267). The paper draws half
    of each batch from them; here every step has the mean over all of them, of which a draw is an estimate.

    Args:
        texts_NE: features of every prompt, the templates of a class side by side; None: they are no samples.
    """

    kind = "linear_probe"

    texts: Tensor | None

    def __init__(
        self, config: LinearProbeConfig, weight_CE: Tensor, bias_C: Tensor, texts_NE: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config, self._text_weight = config, config.text_weight
        self.register_buffer("texts", texts_NE, persistent=False)  # they follow from the backbone and the prompts
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
            head = weight_CE.to(device, dtype), bias_C
        else:
            head = _zero_shot_head(backbone, prompts)
        return cls(config, *head, _text_samples(backbone, prompts) if config.text_weight > 0 else None)

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
        return self._head(features_BE)

    def _head(self, features_BE: Tensor) -> Tensor:
        with torch.autocast(features_BE.device.type, enabled=False):
            normalised_BE = nn.functional.normalize(features_BE.to(self.weight.dtype), dim=-1)
            return nn.functional.linear(normalised_BE, self.weight, self.bias)

    def own_term(self) -> Tensor | None:
        """The mean cross entropy of the texts, times its weight."""
        if self.texts is None:
            return None
        return self._text_weight * text_cross_entropy(self._head(self.texts), len(self.texts) // len(self.weight))

    @property
    def head_bias(self) -> Tensor | None:
        return self.bias if isinstance(self.bias, nn.Parameter) else None


def text_cross_entropy(logits_NC: Tensor, templates: int) -> Tensor:
    """The mean over all prompts, shape (): what a batch of texts of cross-modal adaptation estimates (arXiv
    2301.06267).

    Args:
        logits_NC: of the features of every prompt, the templates of a class side by side.
        templates: T.
    """
    labels_N = torch.arange(logits_NC.shape[1], device=logits_NC.device).repeat_interleave(templates)
    return nn.functional.cross_entropy(logits_NC, labels_N)


@torch.no_grad()
def _text_samples(backbone: ClipBackbone, prompts: ClassPrompts) -> Tensor:
    """Features (N, E) of every prompt, not normalised."""
    return prompt_features(backbone, backbone.tokenize(fill_templates(prompts))).to(parameter_dtype(backbone))


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
