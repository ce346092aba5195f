"""The modules of the towers that an adapter attaches to. A request that cannot be met completely is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone, Target, TowerName
from disam_peft.config.adapter_parts import Blocks, LastBlocks
from disam_peft.errors import UserError, did_you_mean

OF_BLOCKS = frozenset({"q", "k", "v", "out", "fc1", "fc2", "norm1", "norm2"})
"""Names that mean the layers of a standard block, see ``Target.projection``."""


def tower_blocks(backbone: ClipBackbone, tower: TowerName) -> int:
    return backbone.image_blocks if tower == "image" else backbone.text_blocks


def select_targets(
    backbone: ClipBackbone,
    *,
    towers: Sequence[TowerName],
    blocks: Blocks,
    projections: Sequence[str],
    kind: str,
    method: str,
) -> list[Target]:
    """The targets asked for, in the order of the forward pass.

    Projections of the blocks are taken in every chosen block. A name outside the blocks (a final norm, the
    projection into the shared space) is taken once per tower, whatever ``blocks`` says. A name that no target has may
    be the last one that the library has for a layer, which recipes of 0.1 use in some towers.

    Args:
        kind: ``linear`` or ``norm``, what ``method`` works on.

    Raises:
        UserError: a tower without the projection, or with a projection of blocks outside of its blocks alone, a block
            that the tower does not have, a block without the projection, or a module of the wrong kind; lists what
            exists, and a setting that works.
    """
    chosen: list[Target] = []
    for tower in dict.fromkeys(towers):
        here = [target for target in backbone.targets() if target.tower == tower]
        indices = block_indices(backbone, tower, blocks)
        for projection in dict.fromkeys(projections):
            named = [target for target in here if target.projection == projection] or [
                target for target in here if target.name.rpartition(".")[2] == projection
            ]
            fitting = [target for target in here if target.kind == kind]
            _require_all(backbone, named, fitting, indices, projection, tower)
            wrong = [target.name for target in named if target.kind != kind]
            if wrong:
                raise UserError(
                    f"'{method}' adapts {kind} layers, but projection '{projection}' of the {tower} tower is a "
                    f"{'norm' if kind == 'linear' else 'linear layer'} ({wrong[0]}); choose from: "
                    f"{_names(fitting)}"
                )
            chosen += [target for target in named if target.block is None or target.block in indices]
    order = {target.name: position for position, target in enumerate(backbone.targets())}
    return sorted(chosen, key=lambda target: order[target.name])


def in_a_block(target: Target) -> bool:
    """Also of a tower that cannot be split, whose blocks are known by their numbers alone."""
    return target.block is not None or any(part.isdigit() for part in target.name.split(".")[:-1])


def only_outside_blocks(chosen: Sequence[Target]) -> dict[TowerName, list[str]]:
    """The towers in which nothing of a block was chosen, with the names of what was."""
    found: dict[TowerName, list[str]] = {}
    for tower in dict.fromkeys(target.tower for target in chosen):
        here = [target for target in chosen if target.tower == tower]
        if not any(in_a_block(target) for target in here):
            found[tower] = [target.name for target in here]
    return found


def frozen_blocks(backbone: ClipBackbone, chosen: Sequence[Target], tower: TowerName) -> int | None:
    """How many leading blocks of the tower stay frozen; None where nothing of it is adapted, BEFORE_STEM where it is
    something before the blocks."""
    touched = {target.name for target in chosen}
    here = [target for target in backbone.targets() if target.tower == tower]
    first = next((position for position, target in enumerate(here) if target.name in touched), None)
    if first is None:
        return None
    block = here[first].block
    if block is not None:
        return block
    count = tower_blocks(backbone, tower)
    parameters = backbone.tower_parameters(tower)
    in_stem = any(one.part == "stem" and one.name.startswith(f"{here[first].name}.") for one in parameters)
    return BEFORE_STEM if in_stem else count


def block_indices(backbone: ClipBackbone, tower: TowerName, blocks: Blocks) -> list[int]:
    """The blocks of a tower that are meant.

    Raises:
        UserError: the tower has no separate blocks, or fewer.
    """
    count = tower_blocks(backbone, tower)
    if blocks == "all":
        return list(range(count))
    if count == 0:
        raise UserError(f"the {tower} tower of {backbone.config.name} has no separate blocks; use blocks: all")
    if isinstance(blocks, LastBlocks):
        wanted = list(range(max(0, count - blocks.last), count))
        asked, exists = f"last: {blocks.last}", blocks.last <= count
    else:
        wanted = sorted(set(blocks))
        missing = [index for index in wanted if index >= count]
        asked, exists = f"{missing[:10]}", not missing
    if not exists:
        raise UserError(
            f"blocks {asked} do not all exist: the {tower} tower of {backbone.config.name} has {count} blocks, "
            f"0 to {count - 1}"
        )
    return wanted


def _require_all(
    backbone: ClipBackbone,
    named: list[Target],
    fitting: list[Target],
    indices: list[int],
    projection: str,
    tower: TowerName,
) -> None:
    if not named:
        names = sorted({target.projection for target in fitting})
        raise UserError(
            f"projection '{projection}' matches nothing in the {tower} tower{did_you_mean(projection, names)} "
            f"(it has {_names(fitting)}){_what_would_work(backbone, fitting, tower)}"
        )
    if projection in OF_BLOCKS and not any(in_a_block(target) for target in named):
        raise UserError(
            f"projection '{projection}' is one of a block, but the {tower} tower has it outside of its blocks alone "
            f"({', '.join(target.name for target in named[:3])}), where it would train next to nothing (the tower has "
            f"{_names(fitting)}){_what_would_work(backbone, fitting, tower)}"
        )
    inside = {target.block for target in named if target.block is not None}
    missing = [index for index in indices if index not in inside]
    if inside and missing:
        raise UserError(
            f"projection '{projection}' matches only partly: blocks {missing} of the {tower} tower do not have it, "
            f"blocks {sorted(inside)} do; choose blocks that have it"
        )


def _what_would_work(backbone: ClipBackbone, fitting: list[Target], tower: TowerName) -> str:
    """A setting that this tower takes: names of layers that it calls and has in its blocks, or else anywhere."""
    inside = [target for target in fitting if in_a_block(target)] or fitting
    called = _called(backbone, tower, inside)
    names = list(dict.fromkeys(target.projection for target in inside if target.name in called))
    known = (["q", "v"], ["qkv"], ["pool_q", "pool_v"])
    usual = next((group for group in known if set(group) <= set(names)), names[:2])
    return f"; set adapter.projections=[{','.join(usual)}]" if usual else "; adapt the other tower"


def _called(backbone: ClipBackbone, tower: TowerName, targets: Sequence[Target]) -> set[str]:
    """The targets whose forward the tower calls: some have weights that their parent reads itself."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    modules = {target.name: backbone.model.get_submodule(target.name) for target in targets}
    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            if tower == "image":
                blank = torch.zeros(1, 3, *backbone.preprocessing.size, device=backbone.device, dtype=backbone.dtype)
                backbone.encode_image(blank)
            else:
                backbone.encode_text(backbone.tokenize(["a"]))
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _names(targets: list[Target]) -> str:
    inside = dict.fromkeys(target.projection for target in targets if in_a_block(target))
    outside = dict.fromkeys(target.projection for target in targets if not in_a_block(target))
    return f"{' '.join(inside) or 'nothing'} in its blocks, {' '.join(outside) or 'nothing'} outside of them"
