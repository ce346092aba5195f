"""CLIP-Adapter: a small bottleneck behind the image tower, blended with the frozen features (arXiv 2110.04544).

Shapes in this file: B images, E embedding width, H = E // reduction hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import ClipAdapterConfig
from disam_peft.errors import UserError


def clip_adapter(features_BE: Tensor, down_HE: Tensor, up_EH: Tensor, ratio: float) -> Tensor:
    """``ratio * relu(relu(f down^T) up^T) + (1 - ratio) * f`` for image features f, (B, E); neither is normalised."""
    adapted_BE = ((features_BE @ down_HE.T).relu() @ up_EH.T).relu()
    return ratio * adapted_BE + (1 - ratio) * features_BE


class ClipAdapter(Adapter):
    """v = ratio * relu(relu(f down^T) up^T) + (1 - ratio) * f; logits are CLIP's, of v in place of f.

    f is the image tower's output before normalisation, as in the authors' code: the blend of the two terms depends on
    the length of f. v is normalised afterwards (Gao et al. 2021, arXiv 2110.04544, section 3.2; the variant with an
    adapter on the image side alone, which the authors recommend).

    Args:
        down_HE, up_EH: initial weights of the two layers, which have no bias.
    """

    kind = "clip_adapter"

    @classmethod
    def random_start(cls, config: Config) -> str:
        return "the bottleneck"

    def __init__(self, config: ClipAdapterConfig, down_HE: Tensor, up_EH: Tensor) -> None:
        super().__init__()
        self.config = config
        self._ratio = config.ratio
        self.down = nn.Parameter(down_HE)
        self.up = nn.Parameter(up_EH)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> ClipAdapter:
        """Changes nothing in the backbone.

        Weights are drawn as ``nn.Linear`` draws them, from U(-1/sqrt(n), 1/sqrt(n)) for n inputs.

        Raises:
            UserError: the features are narrower than ``reduction``.
        """
        assert isinstance(config, ClipAdapterConfig)
        width = backbone.embed_dim
        hidden = width // config.reduction
        if hidden == 0:
            raise UserError(
                f"adapter.reduction {config.reduction} leaves no hidden unit of the {width} features of "
                f"{backbone.config.name}; use at most {width}"
            )
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        weights = []
        for shape in ((hidden, width), (width, hidden)):
            # Drawn on the CPU: the same numbers on every device.
            drawn = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
            weights.append(drawn.to(backbone.device, parameter_dtype(backbone)))
        return cls(config, *weights)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        raise UserError(
            "a 'clip_adapter' stands behind the image tower and has no zero-shot weights w0, so there is no "
            "w0 + alpha (w1 - w0) (WiSE-FT); its adapter.ratio blends adapted and frozen features already: train with "
            "a smaller one"
        )

    def image_features(self, features_BE: Tensor) -> Tensor:
        """The blended features (B, E), in the precision of the weights also under autocast."""
        with torch.autocast(features_BE.device.type, enabled=False):
            features_BE = features_BE.to(self.down.dtype)
            return clip_adapter(features_BE, self.down, self.up, self._ratio)
