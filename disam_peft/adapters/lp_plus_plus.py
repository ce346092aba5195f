"""A linear probe beside the zero-shot logits, which each class weighs by a factor of its own: the classifier of LP++
(Huang et al. 2024, "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", arXiv 2404.02285).

Shapes in this file: B images, C classes, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, cosine_logits, parameter_dtype
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import LpPlusPlusConfig


class LpPlusPlusAdapter(Adapter):
    """logits_c = f . (w_c + a_c t_c) for the normalised image feature f and the normalised class features t.

    w_c and a_c are trained. a_c is the scale of the backbone times ``blend``, which starts at 1, and w at 0: the first
    logits are those of zero-shot CLIP. From the paper are these logits. Its start (w the class means, a from the mean
    cosines) and its steps (with sizes that are derived from the data) are not taken: the run's optimizer descends both
    together. The authors' code (FereshteShakeri/FewShot-CLIP-Strong-Baseline) has a bias besides.
    """

    kind = "lp_plus_plus"

    def __init__(self, config: LpPlusPlusConfig, weight_CE: Tensor, blend_C: Tensor) -> None:
        super().__init__()
        self.config = config
        self.weight, self.blend = nn.Parameter(weight_CE), nn.Parameter(blend_C)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> LpPlusPlusAdapter:
        """Changes nothing in the backbone."""
        assert isinstance(config, LpPlusPlusConfig)
        dtype, device = parameter_dtype(backbone), backbone.device
        weight_CE = torch.zeros(len(prompts.class_names), backbone.embed_dim, dtype=dtype, device=device)
        return cls(config, weight_CE, torch.ones(len(weight_CE), dtype=dtype, device=device))

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Logits (B, C), in the precision of the weights also under autocast. What the model itself adds to every logit
        stays."""
        zero_shot_BC = cosine_logits(features_BE, class_features_CE, scale, None)
        with torch.autocast(features_BE.device.type, enabled=False):
            normalised_BE = nn.functional.normalize(features_BE.to(self.weight.dtype), dim=-1)
            logits_BC = normalised_BE @ self.weight.T + self.blend * zero_shot_BC.to(self.weight.dtype)
            return logits_BC if bias is None else logits_BC + bias.to(logits_BC.dtype)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """No probe, and zero-shot logits as they are."""

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        return {"weight": torch.zeros_like(self.weight), "blend": torch.ones_like(self.blend)}

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        return classes * (backbone.embed_dim + 1)
