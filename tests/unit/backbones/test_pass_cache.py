"""What is kept between the passes of a step: the same bits, fewer calls, and never an old result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.pass_cache import PassCache, with_cache
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.peft_adapters import LoraAdapterConfig
from tests.helpers.adapter_cells import CELLS, FAMILIES, FULL_CELLS, PEFT_CELLS, PROMPTS, mostly_slow, tiny_backbone

QV = LoraAdapterConfig(rank=2, seed=1, blocks=[1, 2])


def make(twins: tuple[str, str], family: str, config: Any = QV) -> ClipClassifier:
    backbone = tiny_backbone(twins, family)
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, PROMPTS), PROMPTS).double().train()
    move(classifier)
    return classifier


def move(classifier: ClipClassifier) -> None:
    with torch.no_grad():
        for number, p in enumerate(classifier.trainable().values()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number), dtype=p.dtype)


def frozen_of(classifier: ClipClassifier) -> Tensor:
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return classifier.encode_frozen(pixels)


def gradients(classifier: ClipClassifier, logits: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logits.square().sum(), list(classifier.trainable().values()), allow_unused=True))


def calls_of(backbone: ClipBackbone, block: int) -> Counter[str]:
    """Counts the calls of the layers with weights in an image block, as hooks on them see what is computed."""
    calls: Counter[str] = Counter()
    for target in backbone.targets():
        if target.tower != "image" or target.block != block:
            continue
        module: Any = backbone.model.get_submodule(target.name)
        inner = getattr(module, "base_layer", module)

        def counting(*args: Any, name: str = target.projection, compute: Any = inner.forward, **kwargs: Any) -> Any:
            calls[name] += 1
            return compute(*args, **kwargs)

        inner.forward = counting
    return calls


@pytest.mark.parametrize("cell", mostly_slow([*(name for name in PEFT_CELLS if name != "lora-text"), *FULL_CELLS]))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_has_the_bits_of_a_pass_alone(twins: tuple[str, str], family: str, cell: str) -> None:
    classifier = make(twins, family, CELLS[cell])
    frozen = frozen_of(classifier)
    repeated = classifier.cached_logits(frozen)
    for _ in range(3):
        alone, again = classifier.logits(frozen), repeated()
        assert torch.equal(again, alone)
        for one, other in zip(gradients(classifier, again), gradients(classifier, alone), strict=True):
            assert one is other is None or torch.equal(one, other)
        move(classifier)  # as a step's perturbation does


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_of_the_first_trained_block_run_once(twins: tuple[str, str], family: str) -> None:
    classifier = make(twins, family)
    frozen = frozen_of(classifier)
    calls = calls_of(classifier.backbone, 1)
    repeated = classifier.cached_logits(frozen)
    for _ in range(3):
        repeated()
    assert calls == {"norm1": 1, "q": 1, "k": 1, "v": 1, "out": 3, "norm2": 3, "fc1": 3, "fc2": 3}
    calls.clear()
    classifier.logits(frozen)
    classifier.cached_logits(frozen)()  # another step: nothing is left over
    assert set(calls.values()) == {2}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_attention_is_kept_where_the_mlp_alone_is_trained(twins: tuple[str, str], family: str) -> None:
    classifier = make(twins, family, LoraAdapterConfig(projections=["fc2"], rank=2, seed=1, blocks=[1, 2]))
    frozen = frozen_of(classifier)
    calls = calls_of(classifier.backbone, 1)
    repeated = classifier.cached_logits(frozen)
    first, second = repeated(), repeated()
    assert torch.equal(first, second) and torch.equal(first, classifier.logits(frozen))
    assert {name: calls[name] for name in ("norm1", "q", "out")} == {"norm1": 2, "q": 2, "out": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_draws_in_every_pass(twins: tuple[str, str], family: str) -> None:
    classifier = make(twins, family, LoraAdapterConfig(rank=2, dropout=0.5, seed=1, blocks=[1, 2]))
    frozen = frozen_of(classifier)

    def two(logits: Any) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        return logits(), logits(), torch.rand(())

    repeated = classifier.cached_logits(frozen)
    ours, theirs = two(repeated), two(lambda: classifier.logits(frozen))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])


def test_the_name_of_the_version_before_still_works_and_warns(twins: tuple[str, str]) -> None:
    classifier = make(twins, "open_clip")
    frozen = frozen_of(classifier)
    with pytest.warns(DeprecationWarning, match="is now called cached_logits"):
        old = classifier.repeated_logits(frozen)
    assert torch.equal(old(), classifier.cached_logits(frozen)())


def test_a_frozen_module_with_dropout_inside_is_not_kept() -> None:
    """In training mode alone: in eval mode dropout draws nothing."""
    inner = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).requires_grad_(False)
    cache: PassCache = {}
    block = with_cache(nn.Sequential(inner, nn.Linear(64, 4)), cache)
    x = torch.randn(3, 4)
    assert not torch.equal(block(x), block(x))
    inner.eval()
    kept = with_cache(nn.Sequential(inner, nn.Linear(64, 4)), cache := {})
    assert torch.equal(kept(x), kept(x)) and list(cache) == [".0"]


def block_and_input() -> tuple[nn.Sequential, Tensor, PassCache]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    block[0].requires_grad_(False)
    return block, torch.randn(3, 4, dtype=torch.float64), {}


def test_a_change_in_place_of_input_or_result_is_noticed() -> None:
    block, x, cache = block_and_input()
    kept = with_cache(block, cache)
    assert torch.equal(kept(x), block(x)) and list(cache) == [".0"]
    x.add_(1)
    assert torch.equal(kept(x), block(x))
    next(kept.children())(x).mul_(2)
    assert torch.equal(kept(x), block(x))


def test_another_tensor_precision_or_graph_is_no_repetition() -> None:
    block, x, cache = block_and_input()
    kept = with_cache(block.float(), cache)
    x = x.float()
    for given in (x, x.clone(), 2 * x, x):
        assert torch.equal(kept(given), block(given))
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(x).dtype == torch.bfloat16
    assert kept(x).dtype == torch.float32
    with_graph = x.clone().requires_grad_()
    before = cache[".0"]
    kept(with_graph).sum().backward()
    assert with_graph.grad is not None and cache[".0"] is before


def test_inference_mode_leaves_nothing_that_training_could_stumble_over() -> None:
    block, x, cache = block_and_input()
    kept = with_cache(block, cache)
    with torch.inference_mode():
        kept(x.clone())
    assert not cache
    with torch.inference_mode():
        kept(x)
    kept(x).sum().backward()
    assert block[2].weight.grad is not None


def test_a_compiled_block_is_left_whole() -> None:
    block, _, cache = block_and_input()
    block.compile(backend="eager")
    assert with_cache(block, cache) is block
