"""CoCoOp: learned context that every image shifts (Zhou et al. 2022, "Conditional Prompt Learning for Vision-Language
Models", arXiv 2203.05557).

The prompts of an image b are [start] ctx_1 + pi_b ... ctx_M + pi_b name . [end], with the token pi_b that a small
network makes of the image's normalised feature. So each image has class features of its own, and B * C prompts go
through the text tower in each pass. In a causal tower, the tokens that all prompts of an image share run once for that
image, and nothing is padded.

Shapes in this file: B images, C classes, L tokens, M context tokens, W token width, E embedding width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.coop.class_chunks import ImageChunks, plan_image_chunks
from disam_peft.adapters.coop.context_start import ContextStart, context_start
from disam_peft.adapters.coop.image_prompts import ImagePrompts
from disam_peft.adapters.prompts import ClassPrompts, FrozenText, normalised
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.prompt_adapters import CoCoOpConfig, CoOpConfig
from disam_peft.errors import UserError


def meta_token(features_BE: Tensor, down_HE: Tensor, down_H: Tensor, up_WH: Tensor, up_W: Tensor) -> Tensor:
    """``pi = up relu(down u + down_bias) + up_bias`` (B, W) for the normalised features u of images.

    Args:
        features_BE: not normalised.
    """
    unit_BE = nn.functional.normalize(features_BE, dim=-1)
    hidden_BH = nn.functional.linear(unit_BE, down_HE, down_H).relu()
    return nn.functional.linear(hidden_BH, up_WH, up_W)


class CoCoOpAdapter(Adapter):
    """Context vectors (M, W), or (C, M, W) with one context per class, and the network whose token every image adds to
    each of them; float32 also where the backbone is half.

    Args:
        start: the prompts, and what the context starts as.
        meta_net: its weights ``down_HE``, ``down_H``, ``up_WH`` and ``up_W``, see ``meta_token``.
    """

    kind = "cocoop"
    replaces_class_prompts = True

    def __init__(
        self, config: CoCoOpConfig, backbone: ClipBackbone, start: ContextStart, meta_net: tuple[Tensor, ...]
    ) -> None:
        super().__init__()
        self.config = config
        self.context = nn.Parameter(start.context)
        down_HE, down_H, up_WH, up_W = (nn.Parameter(tensor) for tensor in meta_net)
        self.meta_down, self.meta_down_bias, self.meta_up, self.meta_up_bias = down_HE, down_H, up_WH, up_W
        behind = start.first + start.length
        shared = start.first if start.context.ndim == 3 else behind
        self._chunks: ImageChunks = plan_image_chunks(backbone, start.tokens_CL, shared, config.memory_budget_gb)
        self._prompts = nn.ModuleList(
            ImagePrompts(
                start.tokens_CL[classes],
                start.embeddings_CLW[classes, : start.first],
                start.embeddings_CLW[classes, behind:],
                backbone.pack_prompts(start.tokens_CL[classes], shared),
            )
            for classes in self._chunks.classes
        )

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> CoCoOpAdapter:
        """Changes nothing in the backbone.

        Raises:
            UserError: a prompt that does not fit the context length, or ``context_tokens`` unlike the initial words.
        """
        assert isinstance(config, CoCoOpConfig)
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        of_context = CoOpConfig(
            context_tokens=config.context_tokens, class_specific=config.class_specific, init=config.init
        )
        start = context_start(of_context, backbone, prompts.class_names, generator)
        hidden = _hidden_width(config, backbone)
        layers = (*_layer(hidden, backbone.embed_dim, generator), *_layer(backbone.token_width, hidden, generator))
        return cls(config, backbone, start, tuple(t.to(backbone.device, parameter_dtype(backbone)) for t in layers))

    @classmethod
    def random_start(cls, config: Config) -> str:
        assert isinstance(config, CoCoOpConfig)
        return "the network behind the context" if config.init else "the context and the network behind it"

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        raise UserError(
            "a 'cocoop' adapter learns prompts in place of the templates and has no zero-shot weights w0, so there is "
            "no w0 + alpha (w1 - w0) (WiSE-FT); evaluate it as it was trained"
        )

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        assert isinstance(config, CoCoOpConfig)
        # At least one context token; a context for all classes is bounded by the prompt's length.
        of_context = classes * backbone.token_width if config.class_specific else 0
        return of_context + (backbone.embed_dim + backbone.token_width) * _hidden_width(config, backbone)

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """
        Raises:
            UserError: always.
        """
        raise UserError(
            "a 'cocoop' adapter makes class features for each image, and has none for all images; take the logits of "
            "images, or another adapter (coop has the same prompts without an image in them)"
        )

    def has_prompt_features(self) -> bool:
        return False

    def class_features_of_images(self, backbone: ClipBackbone, text: FrozenText, features_BE: Tensor) -> Tensor:
        """Normalised class features (B, C, E) of the prompts of each image; the templates play no part."""
        with torch.autocast(features_BE.device.type, enabled=False):
            layers = self.meta_down, self.meta_down_bias, self.meta_up, self.meta_up_bias
            shift_BW = meta_token(features_BE.to(self.meta_up.dtype), *layers)
        for_backward = torch.is_grad_enabled()
        shifts = shift_BW.split(self._chunks.images(len(shift_BW), for_backward=for_backward))
        # Of several chunks no activations are kept: backward computes them again, one after the other.
        again = for_backward and len(shifts) * len(self._prompts) > 1
        features_BCE = torch.cat([self._features(backbone, shift_IW, again) for shift_IW in shifts])
        return normalised(features_BCE)

    def _features(self, backbone: ClipBackbone, shift_IW: Tensor, again: bool) -> Tensor:
        found, own = [], self.context.ndim == 3
        for classes, prompts in zip(self._chunks.classes, self._prompts, strict=True):
            run: Callable[..., Tensor] = prompts
            if again:
                # The frozen tower is in eval mode: there is no dropout whose random state would have to be kept.
                run = partial(checkpoint, prompts, use_reentrant=False, preserve_rng_state=False)
            found.append(run(backbone, self.context[classes] if own else self.context, shift_IW))
        return torch.cat(found, dim=1)


def _hidden_width(config: CoCoOpConfig, backbone: ClipBackbone) -> int:
    return max(1, backbone.embed_dim // config.reduction)


def _layer(rows: int, columns: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Weight and bias as ``nn.Linear`` draws them, on the CPU: the same numbers on every device."""
    bound = columns**-0.5
    weight, bias = (torch.rand(shape, generator=generator) for shape in ((rows, columns), (rows,)))
    return bound * (2 * weight - 1), bound * (2 * bias - 1)
