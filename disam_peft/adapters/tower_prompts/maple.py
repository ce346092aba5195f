"""MaPLe: prompts in both towers, those of the image tower as projections of those of the text tower.

Khattak et al. 2023, "MaPLe: Multi-modal Prompt Learning", arXiv 2210.03117. Shapes in this file: C classes, M prompts
of a block, W token width, E embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.class_features_file import class_features_file
from disam_peft.adapters.prompts import ClassPrompts, FrozenText, ensemble
from disam_peft.adapters.tower_prompts.image_tokens import ImageTokens
from disam_peft.adapters.tower_prompts.text_prompts import TextPrompts, prompt_depth
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.prompt_adapters import MapleConfig
from disam_peft.errors import UserError

_CONTEXT_TOKENS = 2


class MapleAdapter(Adapter):
    """Prompts of the text tower, and a linear layer for each block from their width to that of the image tower.

    The image tower gets ``proj_l(P_l)`` before block l, where P_l (M, W) are the prompts that the text tower gets
    there. Both gradients meet in P_l.
    """

    kind = "maple"
    replaces_class_prompts = True
    image_split = 0

    def __init__(
        self, config: MapleConfig, backbone: ClipBackbone, text: TextPrompts, projections: list[nn.Linear]
    ) -> None:
        super().__init__()
        self.config = config
        self.text = text
        self.projections = nn.ModuleDict({str(number): layer for number, layer in enumerate(projections)})
        self._placed = ImageTokens(
            backbone,
            range(len(projections)),
            len(text.coop.context),
            lambda number: self.projections[number](self.text.of_block(number)),
            self.projections,
        )

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        _depth(config, backbone)
        return cls.image_split

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> MapleAdapter:
        """Puts hooks into the image tower."""
        assert isinstance(config, MapleConfig)
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        depth = _depth(config, backbone)
        text = TextPrompts.build(
            config, backbone, prompts, default_tokens=_CONTEXT_TOKENS, depth=depth, generator=generator
        )
        sizes = backbone.token_width, backbone.image_token_entrance().width
        of_context = _projection(*sizes, generator)
        of_blocks = _projection(*sizes, generator)
        # The projections of later blocks start as copies of one, as the authors' do.
        layers = [of_context, *(_copy(of_blocks) for _ in range(1, depth))]
        wide = parameter_dtype(backbone)
        return cls(config, backbone, text, [layer.to(backbone.device, wide) for layer in layers])

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        return _depth(config, backbone) * backbone.token_width * backbone.image_token_entrance().width

    @classmethod
    def random_start(cls, config: Config) -> str:
        return "the prompts and their projections"

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E) of the learned prompts; the templates play no part."""
        return ensemble(self.prompt_features(backbone, text), templates=1)

    def prompt_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        return self.text.features(backbone)

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """The class features (C, E) that the prompts of the text tower came to."""
        return class_features_file(class_names, class_features())

    def bypassed(self, backbone: ClipBackbone) -> AbstractContextManager[object]:
        return self._placed.switched_off()

    def detach(self, backbone: ClipBackbone) -> None:
        self._placed.detach(backbone)


def _depth(config: Config, backbone: ClipBackbone) -> int:
    assert isinstance(config, MapleConfig)
    backbone.image_token_entrance()
    return min(prompt_depth(backbone, "text", config.depth), prompt_depth(backbone, "image", config.depth))


def _projection(text_width: int, image_width: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer that is drawn as torch draws one, U(-1/sqrt(W), 1/sqrt(W))."""
    bound = text_width**-0.5
    layer = nn.Linear(text_width, image_width, device="meta")
    for name, shape in (("weight", (image_width, text_width)), ("bias", (image_width,))):
        start = (2 * torch.rand(shape, generator=generator) - 1) * bound
        setattr(layer, name, nn.Parameter(start))
    return layer


def _copy(layer: nn.Linear) -> nn.Linear:
    copied = nn.Linear(layer.in_features, layer.out_features, device="meta")
    copied.weight, copied.bias = (nn.Parameter(one.detach().clone()) for one in (layer.weight, layer.bias))
    return copied


def from_published(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``load_state`` of the adapter takes, from the tensors of the authors' prompt learner under their names.

    Args:
        published: ``ctx``, ``proj.weight``, ``compound_prompts_text.0`` and so on, also as their checkpoints have them,
            behind ``prompt_learner.`` and with the tokens of the class names, which are not taken.

    Raises:
        UserError: another name.
    """
    found: dict[str, Tensor] = {}
    for published_name, tensor in published.items():
        name = published_name.removeprefix("prompt_learner.")
        if name in ("token_prefix", "token_suffix"):
            continue
        if name == "ctx":
            found["text.coop.context"] = tensor
        elif name.startswith("proj."):
            found[f"projections.0.{name.removeprefix('proj.')}"] = tensor
        elif match := re.fullmatch(r"compound_prompts_text\.(\d+)", name):
            found[f"text.deep.{int(match[1]) + 1}"] = tensor
        elif match := re.fullmatch(r"compound_prompt_projections\.(\d+)\.(weight|bias)", name):
            found[f"projections.{int(match[1]) + 1}.{match[2]}"] = tensor
        else:
            raise UserError(f"'{published_name}' is no tensor of MaPLe's prompt learner; give those of one alone")
    return found
