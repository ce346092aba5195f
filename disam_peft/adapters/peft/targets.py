"""The modules of the towers that an adapter attaches to. A request that cannot be met completely is an error."""

from __future__ import annotations

from collections.abc import Sequence

from disam_peft.backbones.base import ClipBackbone, Target, TowerName
from disam_peft.config.adapters import Blocks, LastBlocks
from disam_peft.errors import UserError, did_you_mean


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
    projection into the shared space) is taken once per tower, whatever ``blocks`` says.

    Args:
        kind: ``linear`` or ``norm``, what ``method`` works on.

    Raises:
        UserError: a tower without the projection, a block that the tower does not have, a block without the
            projection, or a module of the wrong kind; lists what exists.
    """
    chosen: list[Target] = []
    for tower in dict.fromkeys(towers):
        here = [target for target in backbone.targets() if target.tower == tower]
        indices = _block_indices(backbone, tower, blocks)
        for projection in dict.fromkeys(projections):
            named = [target for target in here if target.projection == projection]
            fitting = [target for target in here if target.kind == kind]
            _require_all(named, fitting, indices, projection, tower)
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


def frozen_blocks(backbone: ClipBackbone, chosen: Sequence[Target], tower: TowerName) -> int | None:
    """How many leading blocks of the tower stay frozen; None where nothing of it is adapted."""
    touched = {target.name for target in chosen}
    here = [target for target in backbone.targets() if target.tower == tower]
    first = next((position for position, target in enumerate(here) if target.name in touched), None)
    if first is None:
        return None
    block = here[first].block
    if block is not None:
        return block
    behind_blocks = any(target.block is not None for target in here[:first])
    return tower_blocks(backbone, tower) if behind_blocks else 0


def _block_indices(backbone: ClipBackbone, tower: TowerName, blocks: Blocks) -> list[int]:
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
    named: list[Target], fitting: list[Target], indices: list[int], projection: str, tower: TowerName
) -> None:
    if not named:
        names = sorted({target.projection for target in fitting})
        raise UserError(
            f"projection '{projection}' matches nothing in the {tower} tower{did_you_mean(projection, names)} "
            f"(it has {_names(fitting)})"
        )
    inside = {target.block for target in named if target.block is not None}
    missing = [index for index in indices if index not in inside]
    if inside and missing:
        raise UserError(
            f"projection '{projection}' matches only partly: blocks {missing} of the {tower} tower do not have it, "
            f"blocks {sorted(inside)} do; choose blocks that have it"
        )


def _names(targets: list[Target]) -> str:
    inside = dict.fromkeys(target.projection for target in targets if target.block is not None)
    outside = dict.fromkeys(target.projection for target in targets if target.block is None)
    return f"{' '.join(inside) or 'nothing'} in its blocks, {' '.join(outside) or 'nothing'} outside of them"
