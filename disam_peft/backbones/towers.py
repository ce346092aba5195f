"""What both families need to run a part of a tower with the family's own forward, and to list its adaptable modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from disam_peft.backbones.base import Target, TowerName, TowerParameter
from disam_peft.backbones.pass_cache import PassCache, with_cache
from disam_peft.backbones.recomputation import is_recomputed, where_recomputed
from disam_peft.errors import UserError


class Given(nn.Module):
    """Takes the place of an embedding or stem and returns a value that was computed before, whatever its arguments."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.value


def some_blocks(
    stack: Iterable[nn.Module], which: slice, last: nn.Module | None, cache: PassCache | None
) -> nn.ModuleList:
    """The blocks ``which`` of a stack. ``last``, if given, takes the place of the last block of the whole stack. Blocks
    that are ``recomputed`` keep only their inputs.

    Args:
        cache: see ``ClipBackbone.image_head``; None: every block computes everything.
    """
    blocks = list(stack)
    if last is not None:
        blocks[-1] = last
    chosen = blocks[which]
    keeps = cache is not None and bool(chosen) and chosen[0] is not last  # that one hardly computes anything
    if cache is not None and keeps and not is_recomputed(chosen[0]):
        chosen[0] = with_cache(chosen[0], cache)
    return nn.ModuleList(where_recomputed(chosen))


def check_split(blocks: int, available: int, tower: TowerName) -> None:
    """Raises ValueError unless a tower of ``available`` blocks can be split after ``blocks`` of them."""
    if not 0 <= blocks <= available:
        raise ValueError(f"cannot split the {tower} tower after {blocks} blocks: it has {available}")


BlockRoles = Mapping[str, tuple[str, Literal["linear", "norm"]]]
"""Path within a block -> (projection, kind), in the order of the forward pass."""

BERT_ROLES: BlockRoles = {
    "attention.self.query": ("q", "linear"),
    "attention.self.key": ("k", "linear"),
    "attention.self.value": ("v", "linear"),
    "attention.output.dense": ("out", "linear"),
    "attention.output.LayerNorm": ("norm1", "norm"),
    "intermediate.dense": ("fc1", "linear"),
    "output.dense": ("fc2", "linear"),
    "output.LayerNorm": ("norm2", "norm"),
}
"""BERT's block, whose norms follow the sums: ``norm1`` that of the attention and ``norm2`` that of the MLP."""


def block_targets(model: nn.Module, tower: TowerName, block: int, prefix: str, roles: BlockRoles) -> Iterator[Target]:
    """The targets of one block, as far as the block has them as Linear or LayerNorm."""
    modules = dict(model.get_submodule(prefix).named_modules())
    for path, (projection, kind) in roles.items():
        wanted = nn.Linear if kind == "linear" else nn.LayerNorm
        if isinstance(modules.get(path), wanted):
            yield Target(f"{prefix}.{path}", tower, block, projection, kind)


def loose_targets(model: nn.Module, tower: TowerName, prefix: str, skip: tuple[str, ...] = ()) -> Iterator[Target]:
    """Every Linear and LayerNorm below ``prefix`` (itself included), except under the prefixes ``skip``.

    Batch norms are left out: their running statistics belong to the frozen weights. So are Linear layers whose
    weights are handed to a fused function by their parent and whose forward is therefore never called.
    """
    fused = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "AttentionPool2d"
    )
    for path, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if path.startswith(fused) or any(path == one or path.startswith(f"{one}.") for one in skip):
            continue
        projection = path.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear):
            yield Target(path, tower, None, projection, "linear")
        elif isinstance(module, nn.LayerNorm):
            yield Target(path, tower, None, projection, "norm")


def tower_targets(
    model: nn.Module,
    tower: TowerName,
    roots: Sequence[str],
    stack: str,
    blocks: int,
    roles: BlockRoles,
    stem_norm: str,
) -> list[Target]:
    """Every target of one tower in the order of the forward pass.

    Args:
        roots: modules that make up the tower; the blocks are in the first.
        stack: full name of the list of blocks.
        blocks: their number; 0 where the tower has no such list.
        stem_norm: last name of the norm that comes before the blocks.
    """
    skip = (stack,) if blocks else ()
    loose = [target for root in roots for target in loose_targets(model, tower, root, skip)]
    found = [target for target in loose if target.projection == stem_norm]
    for block in range(blocks):
        found += block_targets(model, tower, block, f"{stack}.{block}", roles)
    return found + [target for target in loose if target.projection != stem_norm]


def tower_parameters(
    model: nn.Module, roots: Sequence[str], stack: str, blocks: int, stem: Sequence[str], projection: Sequence[str]
) -> list[TowerParameter]:
    """Every parameter of one tower, in the order of the model.

    Args:
        roots: modules that make up the tower.
        stack: full name of the list of blocks.
        blocks: their number; 0 where the tower cannot be split.
        stem, projection: full names of the modules and parameters that come before the blocks, and of the projection
            into the shared space.
    """

    def within(name: str, places: Sequence[str]) -> bool:
        return any(name == place or name.startswith(f"{place}.") for place in places)

    found = []
    for name, _ in model.named_parameters():
        if not within(name, roots):
            continue
        is_norm = is_norm_layer(model.get_submodule(name.rpartition(".")[0]))
        if blocks == 0:
            found.append(TowerParameter(name, "whole", None, is_norm))
        elif within(name, [stack]):
            number = int(name.removeprefix(f"{stack}.").partition(".")[0])
            found.append(TowerParameter(name, "block", number, is_norm))
        elif within(name, stem):
            found.append(TowerParameter(name, "stem", None, is_norm))
        else:
            found.append(TowerParameter(name, "projection" if within(name, projection) else "end", None, is_norm))
    return found


def is_norm_layer(module: nn.Module) -> bool:
    """Whether it is a normalisation layer, of torch or of a library."""
    known = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, known) or type(module).__name__.endswith("Norm")


def end_of_text(name: str, configured: int | Sequence[int] | None, prompt: Sequence[int], own: int | None) -> int:
    """The token at which a text tower reads a prompt's feature: the configured one if prompts end with it, otherwise
    the tokenizer's own, with a warning.

    A tower looks for the first such token. One that never comes, or comes before the words, would give every text the
    same feature.

    Args:
        name: of the backbone, for messages.
        configured: what the model's config says.
        prompt: the tokens of some text, without padding.
        own: the tokenizer's token for the end of a text.

    Raises:
        UserError: prompts end with neither.
    """

    def ends(token: int | None) -> bool:
        return token is not None and token in prompt and prompt.index(token) == len(prompt) - 1

    candidates = [configured] if isinstance(configured, int) or configured is None else list(configured)
    for token in candidates:
        if token is not None and ends(token):
            return token
    said = f"the config of '{name}' gives eos_token_id {configured}, with which prompts do not end"
    if own is None or not ends(own):
        raise UserError(
            f"{said}, nor do they with the tokenizer's end of text, {own} (they are like {list(prompt)}): every text "
            "would have the same feature; give the tokenizer that belongs to this model, or set eos_token_id"
        )
    warnings.warn(f"{said}: the tokenizer's, {own}, is taken", stacklevel=2)
    return own


def check_length(text: str, count: int, context_length: int) -> None:
    """Raises UserError for a text that the family's tokenizer would truncate silently."""
    if count > context_length:
        raise UserError(
            f"the text '{text}' has {count} tokens, but this model's context holds {context_length}: shorten the "
            "class name or the template"
        )


def refuse_adapter_keys(found: Mapping[str, Tensor], expected: frozenset[str]) -> None:
    """Raises UserError if a state dict to be saved is not that of the plain architecture."""
    extra = sorted(found.keys() - expected)
    missing = sorted(expected - found.keys())
    if extra or missing:
        some = ", ".join((extra or missing)[:3])
        raise UserError(
            f"cannot save this model: {len(extra)} weights too many and {len(missing)} missing against the "
            f"backbone ({some}, ...); an adapter is still attached, merge it first"
        )
