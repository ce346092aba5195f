"""Text towers of open_clip that are models of transformers: RoBERTa, XLM-RoBERTa, BERT, M2M (NLLB) and mT5.

They read in both directions and mask the padding by its token id, so that every call gets the ids, also where the
embeddings are given. The parts of a tower are clones of it in which some modules are exchanged, and every forward pass
is the library's own. Shapes: C prompts, L tokens, W token width, H heads, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from open_clip.hf_model import ClsPooler, HFTextEncoder, MeanPooler
from torch import Tensor, nn

from disam_peft.backbones import towers
from disam_peft.backbones.base import Target, TowerParameter
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.open_clip.resblocks import pooled
from disam_peft.backbones.recomputation import where_recomputed

_ROOT = "text"


class HfText(ABC):
    """One kind of such a tower. It holds no module: each call is given the tower as it is by then."""

    table: ClassVar[str]
    """Of the token embeddings; this and the next names are paths in ``text.transformer``."""
    stack: ClassVar[str]
    stem: ClassVar[tuple[str, ...]]
    roles: ClassVar[towers.BlockRoles]

    def blocks(self, text: Any) -> list[nn.Module]:
        return list(text.transformer.get_submodule(self.stack))

    def embed(self, text: Any, tokens_CL: Tensor) -> Tensor:
        """The embeddings (C, L, W) that the tower adds positions to."""
        return text.transformer.get_submodule(self.table)(tokens_CL)

    def cut(self, text: Any, tokens_CL: Tensor) -> Tensor:
        """The prompts without what is padding in all of them. The mask hides it from every other token."""
        return tokens_CL[:, : int(_seen(text, tokens_CL).any(dim=0).nonzero().max()) + 1]

    def trunk(self, text: Any, tokens_CL: Tensor, blocks: int, embeddings_CLW: Tensor | None = None) -> Tensor:
        """See ``ClipBackbone.text_trunk``.

        Args:
            embeddings_CLW: in the place of those of the tokens.
        """
        tokens_CL = self.cut(text, tokens_CL)
        table = None if embeddings_CLW is None else towers.Given(embeddings_CLW[:, : tokens_CL.shape[1]])
        part = self._first(text.transformer, blocks, table)
        return part(input_ids=tokens_CL, attention_mask=_seen(text, tokens_CL)).last_hidden_state

    def head(self, text: Any, hidden: Tensor, tokens_CL: Tensor, blocks: int) -> Tensor:
        """See ``ClipBackbone.text_head``."""
        rest = shallow_clone(text, transformer=self._rest(text.transformer, blocks, hidden))
        return pooled(rest(tokens_CL[:, : hidden.shape[1]]))

    @abstractmethod
    def _first(self, transformer: Any, blocks: int, table: nn.Module | None) -> Any:
        """The model up to the first ``blocks`` blocks, with other token embeddings if they are given."""

    @abstractmethod
    def _rest(self, transformer: Any, blocks: int, hidden: Tensor) -> Any:
        """The model from there on, whatever ids it is given."""

    def targets(self, model: Any) -> list[Target]:
        place = f"{_ROOT}.transformer"
        stack = f"{place}.{self.stack}"
        loose = [_named(target) for target in towers.loose_targets(model, "text", _ROOT, skip=(stack,))]
        of_stem = [one for one in loose if one.name.startswith(tuple(f"{place}.{name}" for name in self.stem))]
        in_blocks = [
            target
            for block in range(len(self.blocks(model.text)))
            for target in towers.block_targets(model, "text", block, f"{stack}.{block}", self.roles)
        ]
        stem = [replace(one, projection=f"stem_{one.kind}") for one in of_stem]
        return [*stem, *in_blocks, *(one for one in loose if one not in of_stem)]

    def parameters(self, model: Any) -> list[TowerParameter]:
        place = f"{_ROOT}.transformer"
        stem = [f"{place}.{name}" for name in self.stem]
        count = len(self.blocks(model.text))
        return towers.tower_parameters(model, [_ROOT], f"{place}.{self.stack}", count, stem, [f"{_ROOT}.proj"])


class _Bert(HfText):
    table, stack, stem = "embeddings.word_embeddings", "encoder.layer", ("embeddings",)
    roles: ClassVar[towers.BlockRoles] = towers.BERT_ROLES

    def _first(self, transformer: Any, blocks: int, table: nn.Module | None) -> Any:
        exchanged: dict[str, Any] = {"encoder": _with(transformer.encoder, layer=transformer.encoder.layer[:blocks])}
        if table is not None:
            exchanged["embeddings"] = shallow_clone(transformer.embeddings, word_embeddings=table)
        clone = shallow_clone(transformer, **exchanged)
        clone._modules["pooler"] = None  # it would see unfinished tokens, for nothing
        return clone

    def _rest(self, transformer: Any, blocks: int, hidden: Tensor) -> Any:
        encoder = _with(transformer.encoder, layer=transformer.encoder.layer[blocks:])
        return shallow_clone(transformer, embeddings=towers.Given(hidden), encoder=encoder)


class _M2m(HfText):
    table, stack, stem = "embed_tokens", "layers", ("embed_tokens", "embed_positions")
    roles: ClassVar[towers.BlockRoles] = {
        "self_attn_layer_norm": ("norm1", "norm"),
        "self_attn.q_proj": ("q", "linear"),
        "self_attn.k_proj": ("k", "linear"),
        "self_attn.v_proj": ("v", "linear"),
        "self_attn.out_proj": ("out", "linear"),
        "final_layer_norm": ("norm2", "norm"),
        "fc1": ("fc1", "linear"),
        "fc2": ("fc2", "linear"),
    }

    def _first(self, transformer: Any, blocks: int, table: nn.Module | None) -> Any:
        own = {} if table is None else {"embed_tokens": table}
        return _with(transformer, layers=transformer.layers[:blocks], layer_norm=nn.Identity(), **own)

    def _rest(self, transformer: Any, blocks: int, hidden: Tensor) -> Any:
        stem = {"embed_tokens": towers.Given(hidden), "embed_positions": towers.Given(hidden.new_zeros(()))}
        return _with(transformer, layers=transformer.layers[blocks:], **stem)


class _Mt5(HfText):
    table, stack, stem = "embed_tokens", "block", ("embed_tokens",)
    roles: ClassVar[towers.BlockRoles] = {
        **{f"layer.0.SelfAttention.{letter}": (letter, "linear") for letter in "qkv"},
        "layer.0.SelfAttention.o": ("out", "linear"),
        **{f"layer.1.DenseReluDense.{name}": (name, "linear") for name in ("wi_0", "wi_1", "wo")},
    }

    def _first(self, transformer: Any, blocks: int, table: nn.Module | None) -> Any:
        own = {} if table is None else {"embed_tokens": table}
        return _with(transformer, block=transformer.block[:blocks], final_layer_norm=nn.Identity(), **own)

    def _rest(self, transformer: Any, blocks: int, hidden: Tensor) -> Any:
        rest = list(transformer.block[blocks:])
        if blocks:
            rest.insert(0, _Positions(transformer.block[0].layer[0].SelfAttention))
        return _with(transformer, block=rest, embed_tokens=towers.Given(hidden))


class _Positions(nn.Module):
    """In the place of mT5's first block where it ran already: it alone knows the bias of the positions and hands it on;
    without one, later blocks would silently take zeros."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_CLW: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        length = hidden_CLW.shape[1]
        bias_1HLL = self.attention.compute_bias(length, length, device=hidden_CLW.device)
        return hidden_CLW, bias_1HLL, None


_KINDS: dict[tuple[str, str], type[HfText]] = {
    ("RobertaModel", "RobertaLayer"): _Bert,
    ("XLMRobertaModel", "XLMRobertaLayer"): _Bert,
    ("BertModel", "BertLayer"): _Bert,
    ("M2M100Encoder", "M2M100EncoderLayer"): _M2m,
    ("MT5Stack", "MT5Block"): _Mt5,
}
"""By the classes of the model and of its blocks in transformers, which this folder does not import."""


def hf_text(text: nn.Module) -> HfText | None:
    """The kind of a text tower; None for one that is not known exactly."""
    if type(text) is not HFTextEncoder or type(text.pooler) not in (MeanPooler, ClsPooler):
        return None
    model: Any = text.transformer
    for (name, block), kind in _KINDS.items():
        if _is_of_transformers(model, name):
            found = kind()
            return found if all(_is_of_transformers(one, block) for one in found.blocks(text)) else None
    return None


def _is_of_transformers(module: nn.Module, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith("transformers.models.")


def _with(module: Any, **children: nn.Module | list[nn.Module]) -> Any:
    """A shallow clone in which some children are exchanged; blocks are given as a list of them."""
    modules = {
        name: nn.ModuleList(where_recomputed(child)) if isinstance(child, (list, nn.ModuleList)) else child
        for name, child in children.items()
    }
    return shallow_clone(module, **modules)


def _seen(text: Any, tokens_CL: Tensor) -> Tensor:
    """As ``HFTextEncoder`` has it."""
    return (tokens_CL != text.config.pad_token_id).to(torch.int64)


def _named(target: Target) -> Target:
    """Names that no layer of a block has."""
    place = target.name.removeprefix(f"{_ROOT}.")
    if place.startswith("transformer.pooler."):
        return replace(target, projection=f"pool_{target.projection}")
    return replace(target, projection=f"proj_{target.projection}") if target.projection.isdigit() else target
