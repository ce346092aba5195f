"""Text towers of transformers in models of open_clip: every result is compared with open_clip's own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError
from disam_peft.export.merged import TOLERANCE, export_merged
from tests.helpers.adapter_cells import LABELS, PROMPTS, pixels, tiny_classifier
from tests.helpers.hf_texts import BLOCKS, CONTEXT_LENGTH, TEXTS, tiny_hf_text, tiny_hf_text_name
from tests.helpers.towers import relative

SENTENCES = ["a dog", "a sketch of an elephant", "a guitar on the wall of a room"]
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("kind", TEXTS)]


def plain(kind: str) -> Any:
    """The same checkpoint as open_clip itself loads it."""
    return open_clip.create_model(tiny_hf_text_name(kind)).eval().requires_grad_(False)


def tokens_of(backbone: ClipBackbone) -> Tensor:
    tokens = backbone.tokenize(SENTENCES)
    assert tokens.shape == (3, CONTEXT_LENGTH)
    assert (tokens[0] == 1).any() and not (tokens[:, 0] == 1).any()  # padded, at the end
    return tokens


@torch.no_grad()
def test_every_split_gives_the_towers_own_features(kind: str) -> None:
    backbone, theirs = tiny_hf_text(kind), plain(kind)
    tokens = tokens_of(backbone)
    wanted = theirs.text(tokens)
    assert wanted.std(dim=0).mean() > 1e-2 * wanted.abs().max()  # features of different texts differ
    assert backbone.text_blocks == BLOCKS == len(backbone.blocks("text"))
    longest = int((tokens != 1).sum(dim=1).max())
    assert torch.equal(backbone.cut_prompts(tokens), tokens[:, :longest]) and longest < CONTEXT_LENGTH
    for given in (
        tokens,
        torch.cat([tokens, torch.full((1, CONTEXT_LENGTH), 7)]),
    ):  # cut, or one that fills the context
        hidden = [backbone.text_trunk(given, blocks) for blocks in range(BLOCKS + 1)]
        found = [backbone.text_head(one, given, blocks) for blocks, one in enumerate(hidden)]
        assert all(torch.equal(one, found[0]) for one in found)
        uncut = len(given) > len(tokens)
        assert hidden[0].shape[1] == (CONTEXT_LENGTH if uncut else longest)
        assert torch.equal(found[0], theirs.text(given)) if uncut else relative(found[0], wanted) < 2e-6
    embeddings = backbone.embed_tokens(tokens)
    assert embeddings.shape[-1] == backbone.token_width
    assert torch.equal(backbone.encode_text_embeddings(embeddings, tokens), backbone.encode_text(tokens))
    assert relative(backbone.encode_text_embeddings(embeddings.flip(0), tokens), wanted) > 1e-2


def test_gradients_do_not_depend_on_the_split(kind: str) -> None:
    config = LoraAdapterConfig(towers=["text"], blocks=LastBlocks(last=2), rank=2, seed=1)
    backbone = tiny_hf_text(kind)
    tokens = tokens_of(backbone)
    classifier = tiny_classifier(backbone, config)
    assert classifier.adapter is not None and classifier.adapter.text_split == BLOCKS - 2
    weights = list(classifier.trainable().values())
    assert len(weights) == 8

    def gradients(features: Tensor) -> tuple[Tensor, ...]:
        probe = torch.linspace(-1, 1, features.numel()).view_as(features)
        return torch.autograd.grad((features * probe).sum(), weights)

    with torch.no_grad():
        hidden = [backbone.text_trunk(tokens, blocks) for blocks in range(BLOCKS - 1)]
    found = [gradients(backbone.text_head(one, tokens, blocks)) for blocks, one in enumerate(hidden)]
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))
    wanted = gradients(backbone.model.get_submodule("text")(tokens))
    assert relative(*(torch.cat([one.flatten() for one in given]) for given in (found[0], wanted))) < 4e-6


def test_a_learned_context_has_the_gradient_of_finite_differences(kind: str) -> None:
    config = CoOpConfig(context_tokens=2, seed=1)
    classifier = tiny_classifier(tiny_hf_text(kind, torch.float64), config, scramble=0.5)
    frozen = classifier.encode_frozen(pixels())
    (context,) = classifier.trainable().values()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(classifier.logits(frozen), LABELS), context)
    direction = torch.randn(context.shape, generator=torch.Generator().manual_seed(4)).to(context)

    @torch.no_grad()
    def loss_at(step: float) -> float:
        context.add_(direction, alpha=step)
        loss = nn.functional.cross_entropy(classifier.logits(frozen), LABELS).item()
        context.sub_(direction, alpha=step)
        return loss

    # mT5 computes the variance of its norms in float32, whatever the weights are.
    step, limit = (1e-3, 1e-3) if kind == "mt5" else (1e-5, 1e-6)
    numeric, exact = (loss_at(step) - loss_at(-step)) / (2 * step), (gradient * direction).sum().item()
    assert abs(exact) > 1e-4
    assert abs(numeric - exact) < limit * abs(exact)


@torch.no_grad()
def test_a_merged_adapter_is_loaded_by_open_clip(kind: str, tmp_path: Path) -> None:
    backbone = tiny_hf_text(kind)
    tokens = tokens_of(backbone)
    config = LoraAdapterConfig(towers=["text"], projections=["q", "k", "v", "out"], rank=2, seed=1)
    classifier = tiny_classifier(backbone, config)
    assert export_merged(tmp_path / "merged", classifier) <= TOLERANCE
    model: Any = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}").eval()
    wanted = backbone.encode_text(tokens)
    assert relative(model.text(tokens), wanted) < 3e-6
    assert relative(plain(kind).text(tokens), wanted) > 1e-3


def test_names_mean_what_they_mean_in_other_towers(kind: str) -> None:
    backbone = tiny_hf_text(kind)
    targets = [target for target in backbone.targets() if target.tower == "text"]
    inside = {target.projection for target in targets if target.block is not None}
    outside = {target.projection for target in targets if target.block is None}
    mlp = {"wi_0", "wi_1", "wo"} if kind == "mt5" else {"fc1", "fc2", "norm1", "norm2"}
    assert inside == {"q", "k", "v", "out"} | mlp and inside.isdisjoint(outside)
    every = {one.name for one in backbone.tower_parameters("text")}
    assert every == {name for name in backbone.base_parameters() if name.startswith("text.")}
    for last in range(1, BLOCKS + 1):  # no adapter would be built if a trained weight lay in the frozen part
        adapter = build_adapter(
            FullConfig(towers=["text"], blocks=LastBlocks(last=last), stem=False), backbone, PROMPTS
        )
        assert adapter.text_split == BLOCKS - last
        adapter.detach(backbone)


def test_row_79_the_norm_of_the_embeddings_is_trained(kind: str) -> None:
    config = PeftAdapterConfig(method="ln_tuning", towers=["text"], projections=["stem_norm"], seed=1)
    if kind in ("m2m", "mt5"):
        with pytest.raises(UserError, match="'stem_norm' matches nothing in the text tower"):
            build_adapter(config, tiny_hf_text(kind), PROMPTS)
        return
    with pytest.warns(UserWarning, match="nothing of its blocks is adapted"):
        adapter = build_adapter(config, tiny_hf_text(kind), PROMPTS)
    assert adapter.text_split == BEFORE_STEM and len(adapter.trainable()) == 2


LIBRARY = {"roberta": ["query", "value"], "xlm-roberta": ["query", "value"], "bert": ["query", "value"]}
LIBRARY |= {"m2m": ["q_proj", "v_proj"], "mt5": ["q", "v"]}


def test_a_recipe_of_0_1_with_the_librarys_names_stays_valid(kind: str) -> None:
    def names(projections: list[str]) -> set[str]:
        config = LoraAdapterConfig(towers=["text"], projections=projections)
        return set(build_adapter(config, tiny_hf_text(kind), PROMPTS).trainable())

    assert len(names(["q", "v"])) == 4 * BLOCKS
    assert names(LIBRARY[kind]) == names(["q", "v"])
