"""Image towers of timm in stages of several resolutions: ConvNeXt, and FastViT (MobileCLIP-S).

Their blocks are numbered through the stages. In FastViT only the last stages have attention; all that comes before
them counts as the stem. The parts of a tower are clones of it, as in ``timm_trunk.py``. Shapes: B images.
"""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from timm.models.fastvit import AttentionBlock, FastVit, FastVitStage
from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.base import Target, TowerParameter
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.open_clip.image_towers import ROOT, ImageTower, stage_of
from disam_peft.backbones.open_clip.timm_attention import fuse_qkv, has_known_projections, split_qkv
from disam_peft.backbones.pass_cache import PassCache

_TRUNK = f"{ROOT}.trunk"
_HEADS = (f"{_TRUNK}.head.", f"{ROOT}.head.mlp.")
_AFTER_STAGES = ("final_conv", "norm_pre")

_ROLES: towers.BlockRoles = {
    "norm": ("norm", "norm"),
    **{f"token_mixer.qkv.{letter}_proj": (letter, "linear") for letter in "qkv"},
    "token_mixer.proj": ("out", "linear"),
    "mlp.fc1": ("fc1", "linear"),
    "mlp.fc2": ("fc2", "linear"),
}


def first_known_stage(visual: Any) -> int | None:
    """The stage from which on ``TimmStages`` runs a tower in parts; None where it cannot, or does not know a class."""
    if type(visual) is not TimmModel or type(visual.trunk) not in (ConvNeXt, FastVit):
        return None
    known = [_is_known_stage(stage) for stage in visual.trunk.stages]
    first = next((number + 1 for number in reversed(range(len(known))) if not known[number]), 0)
    whole = type(visual.trunk) is FastVit and visual.trunk.fork_feat
    return first if first < len(known) and not whole else None


def _is_known_stage(stage: Any) -> bool:
    if type(stage) is ConvNeXtStage:
        return all(type(block) is ConvNeXtBlock and not block.use_conv_mlp for block in stage.blocks)
    if type(stage) is not FastVitStage:
        return False
    return all(type(block) is AttentionBlock and has_known_projections(block.token_mixer) for block in stage.blocks)


class TimmStages(ImageTower):
    """A tower with a ``first_known_stage``."""

    def __init__(self, first: int) -> None:
        self._first = first

    def split_projections(self, visual: Any) -> None:
        for block in self.blocks(visual):
            if type(block) is AttentionBlock:
                split_qkv(block.token_mixer)

    def fuse_projections(self, visual: Any) -> None:
        for block in self.blocks(visual):
            if type(block) is AttentionBlock:
                fuse_qkv(block.token_mixer)

    def blocks(self, visual: Any) -> list[nn.Module]:
        return [block for stage in visual.trunk.stages[self._first :] for block in stage.blocks]

    def trunk(self, visual: Any, pixels_BCHW: Tensor, blocks: int) -> Tensor:
        trunk = visual.trunk
        number, within = self._place(trunk, blocks)
        stages = list(trunk.stages[:number])
        if within:
            some = towers.some_blocks(trunk.stages[number].blocks, slice(None, within), None, None)
            stages.append(shallow_clone(trunk.stages[number], blocks=nn.Sequential(*some)))
        after = {name: nn.Identity() for name in _AFTER_STAGES if hasattr(trunk, name)}
        return shallow_clone(trunk, stages=nn.Sequential(*stages), **after).forward_features(pixels_BCHW)

    def head(self, visual: Any, hidden: Tensor, blocks: int, cache: PassCache | None) -> Tensor:
        trunk = visual.trunk
        number, within = self._place(trunk, blocks)
        stage = trunk.stages[number]
        some = towers.some_blocks(stage.blocks, slice(within, None), None, cache)
        begun = {name: nn.Identity() for name in ("downsample", "pos_emb") if within and hasattr(stage, name)}
        later = [
            shallow_clone(one, blocks=nn.Sequential(*towers.some_blocks(one.blocks, slice(None), None, None)))
            for one in trunk.stages[number + 1 :]
        ]
        stages = [shallow_clone(stage, blocks=nn.Sequential(*some), **begun), *later]
        rest = shallow_clone(trunk, stem=towers.Given(hidden), stages=nn.Sequential(*stages))
        return shallow_clone(visual, trunk=rest)(hidden)

    def _place(self, trunk: Any, blocks: int) -> tuple[int, int]:
        number, within = stage_of([len(stage.blocks) for stage in trunk.stages[self._first :]], blocks)
        return self._first + number, within

    def targets(self, model: Any) -> list[Target]:
        stages = list(model.visual.trunk.stages)
        counted = [f"{_TRUNK}.stages.{number}" for number in range(self._first, len(stages))]
        loose = list(towers.loose_targets(model, "image", ROOT, skip=tuple(counted)))
        before = (f"{_TRUNK}.stem.", f"{_TRUNK}.stages.")
        names = [f"{prefix}.blocks.{number}" for prefix, number in self._numbered(model)]
        in_blocks = [
            target
            for block, name in enumerate(names)
            for target in towers.block_targets(model, "image", block, name, _ROLES)
        ]
        of_stem = [_named(target, "stem_") for target in loose if target.name.startswith(before)]
        behind = [target for target in loose if not target.name.startswith(before)]
        return [
            *of_stem,
            *in_blocks,
            *(_named(target, "head_") if target.name.startswith(_HEADS) else target for target in behind),
        ]

    def _numbered(self, model: Any) -> list[tuple[str, int]]:
        """Each block as the name of its stage and its number there."""
        stages = list(model.visual.trunk.stages)
        return [
            (f"{_TRUNK}.stages.{stage}", block)
            for stage in range(self._first, len(stages))
            for block in range(len(stages[stage].blocks))
        ]

    def parameters(self, model: Any) -> list[TowerParameter]:
        places = {place: number for number, place in enumerate(self._numbered(model))}
        found = []
        for name, _ in model.named_parameters():
            if not name.startswith(f"{ROOT}."):
                continue
            is_norm = towers.is_norm_layer(model.get_submodule(name.rpartition(".")[0]))
            stage, _, within = name.removeprefix(f"{_TRUNK}.stages.").partition(".")
            prefix = f"{_TRUNK}.stages.{stage}"
            if (prefix, 0) in places and name.startswith(f"{prefix}."):
                number = int(within.split(".")[1]) if within.startswith("blocks.") else 0
                found.append(TowerParameter(name, "block", places[prefix, number], is_norm))
            elif name.startswith((f"{_TRUNK}.stem.", f"{_TRUNK}.stages.")):
                found.append(TowerParameter(name, "stem", None, is_norm))
            else:
                of_projection = name.startswith((f"{_TRUNK}.head.fc.", f"{ROOT}.head."))
                found.append(TowerParameter(name, "projection" if of_projection else "end", None, is_norm))
        return found


def _named(target: Target, prefix: str) -> Target:
    """With a name that is not that of a layer in a block; layers that have only a number are called by their kind."""
    last = target.kind if target.projection.isdigit() else target.projection
    return Target(target.name, target.tower, None, prefix + last, target.kind)
