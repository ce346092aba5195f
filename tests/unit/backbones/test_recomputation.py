"""Blocks that are computed again in backward: to the bit the gradients of the plain ones, with less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.recomputation import is_recomputed, recomputed
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.disam.disam import DISAM
from tests.helpers.adapter_cells import CELLS, DOMAINS, LABELS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.hf_texts import tiny_hf_text
from tests.helpers.timm_towers import tiny_timm

DROPPING = LoraAdapterConfig(towers=["image", "text"], rank=2, dropout=0.3, seed=1)


def kept(classifier: ClipClassifier) -> int:
    """Numbers that a training pass keeps for its backward, without those of parameters."""
    frozen, own = classifier.encode_frozen(pixels()), {p.data_ptr() for p in classifier.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # the logits live as long as the count: no address is given to two tensors
        logits = classifier.logits(frozen)
    assert logits.requires_grad
    return sum(seen.values())


def gradients(classifier: ClipClassifier) -> tuple[list[Tensor | None], Tensor]:
    """Of one step of DISAM with a third backward pass for its cosine; and the random numbers that follow it."""
    classifier.train()
    torch.manual_seed(5)
    params = list(classifier.trainable().values())
    disam = DISAM(params, rho=0.05, variance_weight=0.3, num_domains=2, ascent_cosine=True)
    logits = classifier.cached_logits(classifier.encode_frozen(pixels()))
    disam.backward(lambda: nn.functional.cross_entropy(logits(), LABELS, reduction="none"), DOMAINS)
    return [p.grad for p in params], torch.rand(3)


def assert_exact(backbone: Callable[[], ClipBackbone], config: AdapterConfig) -> None:
    plain, other = (tiny_classifier(backbone(), config) for _ in range(2))
    blocks = [*other.backbone.blocks("image"), *other.backbone.blocks("text")]
    wanted, drawn = gradients(plain)
    before = kept(plain)
    with recomputed(blocks):
        found, drawn_after = gradients(other)
        after = kept(other)
    assert not any(is_recomputed(block) for block in blocks)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(drawn, drawn_after), "the generator is where it was left without it"
    assert after < 0.6 * before


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_a_step_with_dropout_has_the_same_bits(twins: tuple[str, str], family: str) -> None:
    assert_exact(lambda: tiny_backbone(twins, family), DROPPING)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip", "eva02-b", "vitamin", "convnext", "fastvit"])
def test_towers_of_timm(family: str) -> None:
    projections = ["fc1", "fc2"] if family == "convnext" else ["q", "v"]
    config = LoraAdapterConfig(projections=projections, rank=2, dropout=0.3, seed=1)
    assert_exact(lambda: tiny_timm(family, torch.float64), config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "m2m", "mt5"])
def test_text_towers_of_transformers(kind: str) -> None:
    config = LoraAdapterConfig(towers=["text"], rank=2, dropout=0.3, seed=1)
    assert_exact(lambda: tiny_hf_text(kind, torch.float64), config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coop-shared", "full-both", "visual_prompts", "maple"])
def test_prompts_and_whole_towers(twins: tuple[str, str], kind: str) -> None:
    """Visual prompts enter by hooks of the blocks, and MaPLe's also by such as are gone when backward comes."""
    assert_exact(lambda: tiny_backbone(twins, "open_clip"), CELLS[kind])


@pytest.mark.slow
def test_autocast_is_that_of_the_forward_pass(twins: tuple[str, str]) -> None:
    """Backward runs outside of it, as in training."""
    found = []
    for on in (False, True):
        classifier = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), DROPPING)
        frozen = classifier.encode_frozen(pixels(dtype=torch.float32))
        blocks = classifier.backbone.blocks("image") if on else []
        with recomputed(blocks), torch.autocast("cpu", torch.bfloat16):
            loss = classifier.logits(frozen).logsumexp(dim=1).sum()
        found.append(torch.autograd.grad(loss, list(classifier.trainable().values())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
