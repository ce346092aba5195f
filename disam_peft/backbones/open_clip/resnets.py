"""CLIP's ResNets (RN50 and the like): residual blocks that can stay frozen, and a pooling with Linear layers.

Shapes: B images, L positions of the last feature map and their mean, W its width, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from torch import Tensor, nn
from torch.nn import functional as F

from disam_peft.backbones import towers
from disam_peft.backbones.base import Target, TowerParameter
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.open_clip.image_towers import ROOT, ImageTower, stage_of
from disam_peft.backbones.pass_cache import PassCache

_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_POOL = f"{ROOT}.attnpool"
_PROJECTIONS = {"q_proj": "pool_q", "k_proj": "pool_k", "v_proj": "pool_v", "c_proj": "pool_out"}


class CalledAttentionPool(AttentionPool2d):
    """The function of ``AttentionPool2d``, to the bit, by calls of its Linear layers. That class hands their weights to
    a fused function, so that an adapter on them would be passed by."""

    def forward(self, map_BWHW: Tensor) -> Tensor:
        places_LBW = map_BWHW.flatten(2).permute(2, 0, 1)
        tokens_LBW = torch.cat([places_LBW.mean(dim=0, keepdim=True), places_LBW])
        tokens_LBW = tokens_LBW + self.positional_embedding[:, None, :].to(tokens_LBW.dtype)
        query, key, value = (
            projection(tokens_LBW).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BHLD = F.scaled_dot_product_attention(query, key, value)
        mixed_LBW = mixed_BHLD.permute(2, 0, 1, 3).flatten(2)
        return self.c_proj(mixed_LBW.flatten(0, 1)).unflatten(0, mixed_LBW.shape[:2])[0]


class ResNet(ImageTower):
    """open_clip's ``ModifiedResNet``."""

    def split_projections(self, visual: Any) -> None:
        visual.attnpool.__class__ = CalledAttentionPool

    def blocks(self, visual: Any) -> list[nn.Module]:
        return [block for name in _LAYERS for block in visual.get_submodule(name)]

    def trunk(self, visual: Any, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        number, within = _place(visual, blocks)
        some = towers.some_blocks(visual.get_submodule(_LAYERS[number]), slice(None, within), None, None)
        later = {name: nn.Identity() for name in (*_LAYERS[number + 1 :], "attnpool")}
        return shallow_clone(visual, **{_LAYERS[number]: nn.Sequential(*some)}, **later)(pixels_BCHW)

    def head(self, visual: Any, hidden: Tensor, blocks: int, cache: PassCache | None) -> Tensor:
        number, within = _place(visual, blocks)
        some = towers.some_blocks(visual.get_submodule(_LAYERS[number]), slice(within, None), None, cache)
        done = {name: nn.Identity() for name in _LAYERS[:number]}
        later = {
            name: nn.Sequential(*towers.some_blocks(visual.get_submodule(name), slice(None), None, None))
            for name in _LAYERS[number + 1 :]
        }
        rest = shallow_clone(visual, **{_LAYERS[number]: nn.Sequential(*some)}, **done, **later)
        rest.stem = lambda given: given
        return rest(hidden)

    def targets(self, model: Any) -> list[Target]:
        return [
            Target(f"{_POOL}.{name}", "image", None, projection, "linear") for name, projection in _PROJECTIONS.items()
        ]

    def parameters(self, model: Any) -> list[TowerParameter]:
        numbered = [
            f"{ROOT}.{name}.{number}." for name in _LAYERS for number in range(len(model.visual.get_submodule(name)))
        ]
        found = []
        for name, _ in model.named_parameters():
            if not name.startswith(f"{ROOT}."):
                continue
            is_norm = towers.is_norm_layer(model.get_submodule(name.rpartition(".")[0]))
            block = next((number for number, prefix in enumerate(numbered) if name.startswith(prefix)), None)
            if block is not None:
                found.append(TowerParameter(name, "block", block, is_norm))
            elif name.startswith(f"{_POOL}."):
                is_projection = name.startswith(f"{_POOL}.c_proj.")
                found.append(TowerParameter(name, "projection" if is_projection else "end", None, is_norm))
            else:
                found.append(TowerParameter(name, "stem", None, is_norm))
        return found


def is_known_resnet(visual: nn.Module) -> bool:
    return type(visual) is ModifiedResNet and type(visual.attnpool) is AttentionPool2d


def _place(visual: Any, blocks: int) -> tuple[int, int]:
    return stage_of([len(visual.get_submodule(name)) for name in _LAYERS], blocks)
