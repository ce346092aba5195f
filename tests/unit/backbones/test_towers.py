"""Attention as Linear modules, and towers in two parts: the same numbers as the family's own forward."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import torch
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.open_clip.attention import SplitAttention, fused_state, split_attention
from disam_peft.config.backbone import BackboneConfig

TEXTS = ["a dog", "a sketch of an elephant, isn't it?", "the interior of a very small guitar shop"]


@pytest.fixture(params=["open_clip", "transformers"])
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    name = twins[0] if request.param == "open_clip" else twins[1]
    return load_backbone(BackboneConfig(family=request.param, name=name))


def pixels(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=dtype)


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "causal": lambda: causal(7),
    "per head": lambda: torch.randn(2 * 3, 7, 7, generator=torch.Generator().manual_seed(3)),
    "boolean": lambda: causal(7).isinf(),
}


@pytest.mark.parametrize("mask", MASKS)
def test_split_attention_equals_multihead_attention_in_value_and_gradient(mask: str) -> None:
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(fused.in_proj_bias)
    split = SplitAttention(fused)
    tokens = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    attn_mask = MASKS[mask]()
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.double()

    def run(attention: nn.Module) -> tuple[Tensor, Tensor]:
        out = attention(tokens, tokens, tokens, need_weights=False, attn_mask=attn_mask)[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), tokens)
        return out, gradient

    for ours, theirs in zip(run(split), run(fused), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_projection_gradients_are_the_slices_of_the_fused_gradient() -> None:
    torch.manual_seed(1)
    fused = nn.MultiheadAttention(8, 2, batch_first=True).double()
    split = SplitAttention(fused)
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    for attention in (fused, split):
        attention(tokens, tokens, tokens, need_weights=False)[0].square().sum().backward()
    ours = torch.cat([split.q_proj.weight.grad, split.k_proj.weight.grad, split.v_proj.weight.grad])
    torch.testing.assert_close(ours, fused.in_proj_weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key_width", [8, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_splitting_and_fusing_give_back_every_bit(key_width: int, bias: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=key_width, vdim=key_width, bias=bias, batch_first=True)
    root = nn.ModuleDict({"attn": attention, "norm": nn.LayerNorm(8)})
    before = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    queries, keys = torch.randn(2, 3, 8), torch.randn(2, 5, key_width)
    expected = attention(queries, keys, keys, need_weights=False)[0]
    split_attention(root)
    assert isinstance(root["attn"], SplitAttention)
    torch.testing.assert_close(root["attn"](queries, keys, keys)[0], expected)
    after = fused_state(root)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_split_attention_refuses_what_it_does_not_compute() -> None:
    tokens = torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match="need_weights"):
        SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True))(tokens, tokens, tokens, need_weights=True)
    with pytest.raises(ValueError, match="batch-first"):
        SplitAttention(nn.MultiheadAttention(8, 2, batch_first=False))


def test_openclip_logits_before_and_after_the_split(openclip_name: str) -> None:
    ours = load_backbone(BackboneConfig(name=openclip_name))
    theirs, _, _ = open_clip.create_model_and_transforms(openclip_name)
    theirs.eval()
    assert sum(isinstance(module, SplitAttention) for module in ours.model.modules()) == 6
    assert not any(isinstance(module, nn.MultiheadAttention) for module in ours.model.modules())
    tokens = open_clip.get_tokenizer(openclip_name)(TEXTS)
    with torch.no_grad():
        expected, _ = theirs.get_logits(pixels(), tokens)
        image = nn.functional.normalize(ours.encode_image(pixels()), dim=-1)
        text = nn.functional.normalize(ours.encode_text(ours.tokenize(TEXTS)), dim=-1)
        logits = ours.logit_scale * image @ text.T
    assert expected.std() > 0.5  # else agreement would mean little
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_split_is_bit_identical(backbone: ClipBackbone, dtype: torch.dtype) -> None:
    backbone.to(dtype=dtype)
    images, tokens = pixels(dtype), backbone.tokenize(TEXTS)
    with torch.no_grad():
        image, text = backbone.encode_image(images), backbone.encode_text(tokens)
        assert image.dtype == text.dtype == dtype
        assert (image[0] - image[1]).abs().max() > 0.05
        assert (text[0] - text[1]).abs().max() > 0.05
        assert backbone.image_blocks == backbone.text_blocks == 3
        longest = backbone.cut_prompts(tokens).shape[1]
        for blocks in range(4):
            trunk = backbone.image_trunk(images, blocks)
            assert trunk.shape == (3, 5 if blocks < 3 else 1, backbone.token_width)
            assert torch.equal(backbone.image_head(trunk, blocks), image)
            trunk = backbone.text_trunk(tokens, blocks)
            assert trunk.shape == (3, longest if blocks < 3 else 1, backbone.token_width)
            assert torch.equal(backbone.text_head(trunk, tokens, blocks), text)


def test_a_block_belongs_to_exactly_one_part(backbone: ClipBackbone) -> None:
    calls: list[str] = []
    for name, module in backbone.model.named_modules():
        if name.endswith(("resblocks.0", "resblocks.1", "resblocks.2", "layers.0", "layers.1", "layers.2")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name[-1]))
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        trunk = backbone.image_trunk(pixels(), 2)
        assert calls == ["0", "1"]
        backbone.image_head(trunk, 2)
        assert calls == ["0", "1", "2"]
        calls.clear()
        trunk = backbone.text_trunk(tokens, 1)
        assert calls == ["0"]
        backbone.text_head(trunk, tokens, 1)
        assert calls == ["0", "1", "2"]


def test_gradients_through_the_head_are_identical(backbone: ClipBackbone) -> None:
    names = [target.name for target in backbone.targets() if target.block == 2]
    assert len(names) == 16
    trained = [backbone.model.get_submodule(name).weight for name in names]
    for weight in trained:
        weight.requires_grad_(True)
    images, tokens = pixels(), backbone.tokenize(TEXTS)

    def gradients(blocks: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            image, text = backbone.image_trunk(images, blocks), backbone.text_trunk(tokens, blocks)
        image, text = backbone.image_head(image, blocks), backbone.text_head(text, tokens, blocks)
        return torch.autograd.grad((image @ text.T).square().sum(), trained)

    def whole() -> tuple[Tensor, ...]:
        logits = backbone.encode_image(images) @ backbone.encode_text(tokens).T
        return torch.autograd.grad(logits.square().sum(), trained)

    expected = whole()
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for blocks in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(blocks), expected, strict=True))


def test_adapters_that_come_later_are_seen_by_both_parts(backbone: ClipBackbone) -> None:
    peft = pytest.importorskip("peft")
    images, tokens = pixels(torch.float64), backbone.tokenize(TEXTS)
    with torch.no_grad():
        bare = backbone.to(dtype=torch.float64).encode_image(images)
        bare_text = backbone.encode_text(tokens)
    base = backbone.current_hash()
    linear = [target.name for target in backbone.targets() if target.kind == "linear" and target.block == 1]
    assert len(linear) == 12
    config = peft.LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
    peft.inject_adapter_in_model(config, backbone.model)
    backbone.to(dtype=torch.float64)
    assert backbone.current_hash() == base
    with torch.no_grad():
        image, text = backbone.encode_image(images), backbone.encode_text(tokens)
        assert (image - bare).abs().max() > 1e-3 and (text - bare_text).abs().max() > 1e-3
        for blocks in range(4):
            assert torch.equal(backbone.image_head(backbone.image_trunk(images, blocks), blocks), image)
            assert torch.equal(backbone.text_head(backbone.text_trunk(tokens, blocks), tokens, blocks), text)
    assert [target.name for target in backbone.targets() if target.block == 1 and target.kind == "linear"] == linear


def test_text_from_embeddings_is_exact(backbone: ClipBackbone) -> None:
    tokens = backbone.tokenize(TEXTS)
    embeddings = backbone.embed_tokens(tokens)
    assert embeddings.shape == (3, backbone.context_length, backbone.token_width)
    assert torch.equal(backbone.encode_text_embeddings(embeddings, tokens), backbone.encode_text(tokens))
    # What the embeddings say counts, not the ids at their place.
    changed = embeddings.clone()
    changed[:, 2] = embeddings[[1, 2, 0], 2]
    moved = (backbone.encode_text_embeddings(changed, tokens) - backbone.encode_text(tokens)).abs().amax(dim=1)
    assert (moved > 1e-3).all()


def test_prompts_may_be_cut_to_the_longest(backbone: ClipBackbone) -> None:
    tokens = backbone.tokenize(TEXTS)
    longest = int(tokens.argmax(dim=1).max()) + 1
    assert 3 < longest < 20
    cut = backbone.cut_prompts(tokens)
    assert torch.equal(cut, tokens[:, :longest])
    with torch.no_grad():
        expected = backbone.encode_text(tokens)
        assert torch.equal(backbone.encode_text(cut), expected)
        from_embeddings = backbone.encode_text_embeddings(backbone.embed_tokens(cut), cut)
        assert torch.equal(from_embeddings, expected)
        trunk = backbone.text_trunk(cut, 2)
        assert torch.equal(backbone.text_head(trunk, cut, 2), expected)
        padded = nn.functional.pad(trunk, (0, 0, 0, 4))  # as among other prompts, of which one is longer
        assert (backbone.text_head(padded, tokens, 2) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("blocks", [-1, 4])
def test_a_split_outside_the_tower_is_refused(backbone: ClipBackbone, blocks: int) -> None:
    tokens = backbone.tokenize(TEXTS)
    with pytest.raises(ValueError, match="it has 3"):
        backbone.image_trunk(pixels(), blocks)
    with pytest.raises(ValueError, match="it has 3"):
        backbone.text_head(tokens, tokens, blocks)


def test_targets_are_complete_ordered_and_unique_as_suffixes(backbone: ClipBackbone) -> None:
    targets = backbone.targets()
    modules = dict(backbone.model.named_modules())
    names = [target.name for target in targets]
    for tower in ("image", "text"):
        for block in range(3):
            roles = [target.projection for target in targets if (target.tower, target.block) == (tower, block)]
            assert roles == ["norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"]
    expected = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.LayerNorm)}
    assert set(names) == expected and len(names) == len(expected)
    for target in targets:
        assert isinstance(modules[target.name], nn.Linear if target.kind == "linear" else nn.LayerNorm)
        assert [name for name in modules if name == target.name or name.endswith("." + target.name)] == [target.name]
    # In the order in which the forward pass calls them.
    called: list[str] = []
    for name in names:
        modules[name].register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        backbone.encode_image(pixels())
        backbone.encode_text(backbone.tokenize(TEXTS))
    assert called == names


def test_autocast_narrows_the_towers_without_breaking_them(backbone: ClipBackbone) -> None:
    images, tokens = pixels(), backbone.tokenize(TEXTS)
    with torch.no_grad():
        image, text = backbone.encode_image(images), backbone.encode_text(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            near_image, near_text = backbone.encode_image(images), backbone.encode_text(tokens)
    assert 0 < (near_image - image).abs().max() < 0.1
    assert 0 < (near_text - text).abs().max() < 0.1
