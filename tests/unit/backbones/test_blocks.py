"""What is left out of the towers changes nothing: value and gradient against each family's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.blocks import BlockParts, replace_quick_gelu
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.open_clip.attention import split_attention
from disam_peft.backbones.open_clip.resblocks import parts_of
from disam_peft.backbones.packed_prompts import PackedPrompts
from disam_peft.config.backbone import BackboneConfig
from tests.helpers.tiny import tiny_openclip
from tests.helpers.towers import assert_same, pixels, whole_image, whole_text

TEXTS = ["a dog", "a sketch of an elephant, isn't it?", "the interior of a very small guitar shop", "x"]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=["float32", "float64"]
)


@pytest.fixture(params=["open_clip", "transformers"])
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    name = twins[0] if request.param == "open_clip" else twins[1]
    return load_backbone(BackboneConfig(family=request.param, name=name))


def variant(folder: Path, **overrides: Any) -> ClipBackbone:
    return load_backbone(BackboneConfig(name=tiny_openclip(folder, **overrides))).to(dtype=torch.float64)


ADAPTERS: dict[str, Callable[[list[str]], PeftConfig]] = {
    "lora": lambda names: LoraConfig(r=2, target_modules=names, init_lora_weights=False),
    "dora": lambda names: LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=True),
    "ia3": lambda names: IA3Config(
        target_modules=names,
        feedforward_modules=[name for name in names if name.endswith(("fc2", "c_proj"))],
        init_ia3_weights=False,
    ),
}


def adapt(backbone: ClipBackbone, method: str, tower: str, blocks: set[int], dtype: torch.dtype) -> list[Tensor]:
    """Attach to all six projections; the trained parameters, moved away from where they start."""
    chosen = [target for target in backbone.targets() if target.tower == tower and target.block in blocks]
    names = [target.name for target in chosen if target.kind == "linear"]
    assert len(names) == 6 * len(blocks)
    torch.manual_seed(0)
    inject_adapter_in_model(ADAPTERS[method](names), backbone.model)
    backbone.to(dtype=dtype)
    trained = [p for p in backbone.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.05 * torch.randn(parameter.shape)
    return trained  # type: ignore[return-value]


# -- one position in the last block --------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_class_token_alone_in_the_last_image_block(
    backbone: ClipBackbone, method: str, count: int, dtype: torch.dtype
) -> None:
    trained, images = adapt(backbone, method, "image", {1, 2}, dtype), pixels(count, dtype)
    hidden = backbone.image_trunk(images, 1).detach()
    assert_same(
        lambda: backbone.image_head(hidden, 1), lambda: whole_image(backbone, images), trained, TOLERANCE[dtype]
    )


@dtypes
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("texts", [TEXTS, pytest.param(TEXTS[:1], marks=pytest.mark.slow)], ids=len)
def test_last_token_alone_in_the_last_text_block(
    backbone: ClipBackbone, method: str, texts: list[str], dtype: torch.dtype
) -> None:
    trained, tokens = adapt(backbone, method, "text", {1, 2}, dtype), backbone.tokenize(texts)
    hidden = backbone.text_trunk(tokens, 1).detach()
    assert_same(
        lambda: backbone.text_head(hidden, tokens, 1), lambda: whole_text(backbone, tokens), trained, TOLERANCE[dtype]
    )


def test_the_last_block_computes_what_is_pooled_and_no_more(backbone: ClipBackbone) -> None:
    seen: dict[tuple[str, str], int] = {}
    for target in backbone.targets():
        if target.block == 2:
            key = (target.tower, target.projection)
            module = backbone.model.get_submodule(target.name)
            module.register_forward_hook(lambda _, inputs, __, key=key: seen.update({key: inputs[0].shape[1]}))
    tokens = backbone.tokenize(TEXTS)
    longest = int(tokens.argmax(dim=1).max()) + 1
    with torch.no_grad():
        backbone.encode_image(pixels(2, torch.float32))
        backbone.encode_text(tokens)
    for tower, length in (("image", 5), ("text", longest)):
        alone = {name for name in ("q", "out", "norm2", "fc1", "fc2") if seen[tower, name] == 1}
        assert alone == {"q", "out", "norm2", "fc1", "fc2"}
        assert {seen[tower, name] for name in ("norm1", "k", "v")} == {length}


IMAGE_TOWERS: dict[str, tuple[dict[str, Any], bool]] = {
    "scaled residuals": ({"ls_init_value": 0.3}, True),
    "token outputs beside": ({"output_tokens": True}, True),
    "norm before pooling": ({"final_ln_after_pool": True}, True),
    "average pooling": ({"pool_type": "avg"}, False),
    "attention pooling": ({"attentional_pool": True, "attn_pooler_heads": 2}, False),
    "block of another kind": ({"block_type": "custom", "qk_norm": True}, False),
}


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_image_towers_of_other_kinds(tmp_path: Path, name: str) -> None:
    overrides, alone = IMAGE_TOWERS[name]
    backbone = variant(tmp_path, vision_cfg=overrides)
    last, lengths = backbone.model.get_submodule("visual.transformer.resblocks.2.mlp.c_fc"), []
    last.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    last.weight.requires_grad_(True)

    def theirs() -> Tensor:
        output = whole_image(backbone, pixels(3))
        return output[0] if isinstance(output, tuple) else output

    assert_same(lambda: backbone.encode_image(pixels(3)), theirs, [last.weight], 1e-12)
    assert lengths == [1 if alone else 5, 5]
    trunk = backbone.image_trunk(pixels(3), 3)
    assert torch.equal(backbone.image_head(trunk, 3), backbone.encode_image(pixels(3)))


BIDIRECTIONAL = {"no_causal_mask": True, "pool_type": "last"}
TEXT_TOWERS: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # settings; are prompts cut; is the last block computed for one position; can a shared part run once
    "scaled residuals": ({"ls_init_value": 0.3}, True, True, True),
    "end by its id": ({"pool_type": "eos", "eos_id": 49407}, True, True, True),
    "first": ({"pool_type": "first"}, True, True, False),
    "last": ({"pool_type": "last"}, False, True, True),
    "bidirectional": (BIDIRECTIONAL, False, True, False),
    "bidirectional, highest id": ({"no_causal_mask": True}, False, True, False),
    "padding masked": ({"no_causal_mask": True, "pad mask": True}, False, False, False),
    "class token behind": ({"embed_cls": True}, False, False, False),
    "block of another kind": ({"block_type": "custom", "qk_norm": True}, True, False, False),
}


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_text_towers_of_other_kinds(tmp_path: Path, name: str) -> None:
    settings, cut, alone, shares = TEXT_TOWERS[name]
    known = {key: value for key, value in settings.items() if key != "pad mask"}
    backbone = variant(tmp_path, custom_text="embed_cls" in settings, text_cfg={"context_length": 20, **known})
    if "pad mask" in settings:
        backbone.model.text.use_pad_mask = True
    tokens = backbone.tokenize(TEXTS)
    last, shapes = backbone.model.get_submodule("text.transformer.resblocks.2.mlp.c_fc"), []
    last.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[1]))
    weight: Any = last.weight.requires_grad_(True)
    assert_same(lambda: backbone.encode_text(tokens), lambda: whole_text(backbone, tokens), [weight], 1e-12)
    assert (backbone.cut_prompts(tokens).shape[1] < 20) is cut
    assert (shapes[0] == 1) is alone
    assert (backbone.pack_prompts(tokens, 1) is not None) is shares
    for blocks in range(4):
        trunk = backbone.text_trunk(tokens, blocks)
        assert torch.equal(backbone.text_head(trunk, tokens, blocks), backbone.encode_text(tokens))
    embeddings = backbone.embed_tokens(tokens)
    assert torch.equal(backbone.encode_text_embeddings(embeddings, tokens), backbone.encode_text(tokens))


# -- prompts that share their first tokens -------------------------------------------------------------------


def embedded(backbone: ClipBackbone, tokens: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Leaves: the embeddings that all prompts share, and the rest of each."""
    embeddings = backbone.embed_tokens(tokens)
    return embeddings[0, :shared].clone().requires_grad_(), embeddings[:, shared:].clone().requires_grad_()


@dtypes
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1:2], ["a dog", "a cat"]], ids=["unequal", "one", "equal"])
def test_shared_tokens_run_once(backbone: ClipBackbone, texts: list[str], shared: int, dtype: torch.dtype) -> None:
    backbone.to(dtype=dtype)
    tokens = backbone.tokenize([f"one two three {text}" for text in texts])
    prefix, suffix = embedded(backbone, tokens, shared)
    rows = backbone.pack_prompts(tokens, shared)
    assert rows is not None and rows.lengths == tuple((tokens.argmax(dim=1) + 1 - shared).tolist())

    def theirs() -> Tensor:
        return whole_text(backbone, tokens, torch.cat([prefix.expand(len(texts), -1, -1), suffix], dim=1))

    def ours() -> Tensor:
        return backbone.encode_packed_prompts(prefix, rows.pack(suffix), rows)

    assert_same(ours, theirs, [prefix, suffix], TOLERANCE[dtype])


def test_shared_tokens_with_an_adapter_in_the_text_tower(backbone: ClipBackbone) -> None:
    trained = adapt(backbone, "lora", "text", {0, 2}, torch.float64)
    tokens = backbone.tokenize([f"one two three {text}" for text in TEXTS])
    prefix, suffix = embedded(backbone, tokens, 4)
    rows = backbone.pack_prompts(tokens, 4)
    assert rows is not None
    assert_same(
        lambda: backbone.encode_packed_prompts(prefix, rows.pack(suffix), rows),
        lambda: whole_text(backbone, tokens),
        trained,
        1e-12,
    )


@pytest.mark.parametrize("recomputed", [1, 3])
def test_blocks_computed_again_change_no_bit(backbone: ClipBackbone, recomputed: int) -> None:
    tokens = backbone.tokenize([f"one two three {text}" for text in TEXTS])
    prefix, suffix = embedded(backbone, tokens, 4)
    rows = backbone.pack_prompts(tokens, 4)
    assert rows is not None
    calls: list[str] = []
    for target in backbone.targets():
        if target.tower == "text" and target.projection == "fc1":
            module = backbone.model.get_submodule(target.name)
            module.register_forward_hook(lambda *_, block=target.block: calls.append(str(block)))

    def run(blocks: int) -> tuple[Tensor, ...]:
        calls.clear()
        features = backbone.encode_packed_prompts(prefix, rows.pack(suffix), rows, blocks)
        return (features, *torch.autograd.grad(features.square().sum(), [prefix, suffix]))

    plain = run(0)
    assert calls == ["0", "1", "2"]
    assert all(torch.equal(one, other) for one, other in zip(run(recomputed), plain, strict=True))
    assert calls == ["0", "1", "2", *(["1", "0"] if recomputed == 3 else ["0"])]  # the last block is never repeated


def test_prompts_that_end_within_the_shared_part_are_no_layout(backbone: ClipBackbone) -> None:
    tokens = backbone.tokenize(["a dog", "a"])  # 4 and 3 tokens with the markers
    assert backbone.pack_prompts(tokens, 2) is not None
    assert backbone.pack_prompts(tokens, 3) is None
    assert backbone.pack_prompts(tokens, 0) is None


@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
def test_memory_for_backward_is_what_it_is_taken_for(activation: type[nn.Module]) -> None:
    # At the width of real towers, where nothing else counts.
    blocks = nn.ModuleList([ResidualAttentionBlock(256, 4, act_layer=activation).eval() for _ in range(3)])
    split_attention(blocks)
    replace_quick_gelu(blocks, QuickGELU)
    blocks.requires_grad_(False)
    parts = [part for part in map(parts_of, blocks) if part is not None]
    assert len(parts) == 3 and isinstance(parts[0], BlockParts)
    rows = PackedPrompts([3, 4, 6, 3, 5] * 12, 17)
    hidden = torch.randn(17 + sum(rows.lengths), 256, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in blocks.parameters()}

    def kept(count: int, recomputed: int) -> float:
        """In widths of a token."""
        sizes: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rows(parts[:count], hidden, recomputed)
        return sum(t.untyped_storage().nbytes() for at, t in sizes.items() if at not in weights) / 4 / 256

    wanted = rows.kept_widths()
    assert 0.85 * wanted < kept(3, 0) - kept(2, 0) < 1.05 * wanted
    assert kept(3, 2) < kept(1, 0) + 1.2 * 2 * len(hidden)
