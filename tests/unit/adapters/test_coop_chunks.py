"""CoOp's shortcuts: the same features and gradients as whole prompts through the whole tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.coop.class_chunks import plan_chunks
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.blocks import shallow_clone
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.towers import Given
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.disam.disam import DISAM
from tests.helpers.adapter_cells import FAMILIES, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.tiny import tiny_openclip

NAMES = ("cat", "a very long name of many words", "fire truck", "{}", "Žluťoučký kůň")
TOLERANCE = {torch.float32: 7e-6, torch.float64: 1e-12}


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param)


def coop(backbone: ClipBackbone, names: tuple[str, ...] = NAMES, **config: Any) -> ClipClassifier:
    prompts = ClassPrompts(names, ("{}",))
    return ClipClassifier(backbone, build_adapter(CoOpConfig(seed=0, **config), backbone, prompts), prompts)


def by_hand(backbone: ClipBackbone, names: tuple[str, ...], context: Tensor) -> Tensor:
    """Whole prompts, padded to the whole context, through the family's own forward."""
    model: Any = backbone.model
    words = context.shape[-2]
    tokens = backbone.tokenize([f"{' '.join(['x'] * words)} {name}." for name in names])
    embeddings = backbone.embed_tokens(tokens)
    middle = context.to(embeddings.dtype).expand(len(names), -1, -1)
    embeddings = torch.cat([embeddings[:, :1], middle, embeddings[:, 1 + words :]], dim=1)
    if backbone.family == "open_clip":
        features = shallow_clone(model.text, token_embedding=Given(embeddings))(tokens)
    else:
        stem = shallow_clone(model.text_model.embeddings, token_embedding=Given(embeddings))
        pooled = shallow_clone(model.text_model, embeddings=stem)(input_ids=tokens).pooler_output
        features = model.text_projection(pooled)
    return nn.functional.normalize(features, dim=-1)


def gradient(features: Tensor, context: Tensor) -> Tensor:
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((features * probe.to(features)).sum(), context)[0]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]], ids=len)
@pytest.mark.parametrize("class_specific", [False, True])
def test_features_and_gradients_are_those_of_whole_prompts(
    backbone: ClipBackbone, class_specific: bool, names: tuple[str, ...], dtype: torch.dtype
) -> None:
    classifier = coop(backbone.to(dtype=dtype), names, context_tokens=5, class_specific=class_specific)
    context = classifier.trainable()["context"]
    ours, theirs = classifier.class_features(), by_hand(backbone, names, context)
    assert relative(ours, theirs) <= TOLERANCE[dtype]
    wanted = gradient(theirs, context)
    assert wanted.norm() > 1e-3
    assert relative(gradient(ours, context), wanted) <= TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_tower_that_sees_both_ways_gets_whole_prompts(tmp_path: Path, class_specific: bool) -> None:
    text = {"context_length": 30, "no_causal_mask": True}
    backbone = load_backbone(BackboneConfig(name=tiny_openclip(tmp_path, text_cfg=text))).to(dtype=torch.float64)
    lengths: list[int] = []
    first = backbone.model.get_submodule("text.transformer.resblocks.0")
    first.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    plain = coop(backbone, context_tokens=5, class_specific=class_specific)
    context = plain.trainable()["context"]
    ours, theirs = plain.class_features(), by_hand(backbone, NAMES, context)
    assert relative(ours, theirs) <= 1e-12 and lengths == [30, 30]
    chunked = coop(backbone, context_tokens=5, class_specific=class_specific, memory_budget_gb=1e-6)
    wanted = gradient(theirs, context)
    assert relative(gradient(ours, context), wanted) <= 1e-12
    assert relative(gradient(chunked.class_features(), chunked.trainable()["context"]), wanted) <= 1e-12
    assert lengths[2:] == [30] * 2 * len(NAMES)  # class by class, in the forward pass and again in backward


# -- memory --------------------------------------------------------------------------------------------------


def budgets(backbone: ClipBackbone, names: tuple[str, ...], shared: int) -> dict[str, float]:
    """In 10^9 bytes: what everything takes, half of it, and what not even the inputs of the blocks fit into."""
    tokens = backbone.cut_prompts(backbone.tokenize([f"{'x ' * 5}{name}." for name in names]))
    rows = backbone.pack_prompts(tokens, shared)
    assert rows is not None
    everything = 3 * rows.kept_widths() * 32 * backbone.dtype.itemsize / 1e9
    return {"all": everything, "blocks": 0.5 * everything, "chunks": 0.05 * everything}


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_budget_changes_the_memory_and_not_the_gradient(backbone: ClipBackbone, class_specific: bool) -> None:
    kind = {"context_tokens": 5, "class_specific": class_specific}
    free = coop(backbone, **kind)
    wanted = gradient(free.class_features(), free.trainable()["context"])
    calls: list[int] = []
    for target in backbone.targets():
        if target.tower == "text" and target.projection == "fc1":
            backbone.model.get_submodule(target.name).register_forward_hook(lambda *_: calls.append(1))
    forwards = {}
    for name, budget in budgets(backbone, NAMES, 1 if class_specific else 6).items():
        bound = coop(backbone, memory_budget_gb=budget, **kind)
        calls.clear()
        features = bound.class_features()
        assert relative(features, free.class_features()) <= 1e-13
        calls.clear()
        assert relative(gradient(features, bound.trainable()["context"]), wanted) <= 1e-12
        forwards[name] = len(calls)
    # Blocks that ran again in backward: none; the first two of three; all three of every chunk.
    assert forwards["all"] == 0
    assert forwards["blocks"] == 2
    assert forwards["chunks"] % 3 == 0 and forwards["chunks"] >= 6


def test_plans_recompute_no_more_than_they_must(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    names = tuple(f"thing {number}" for number in range(100))
    tokens = backbone.cut_prompts(backbone.tokenize([f"{'x ' * 5}{name}." for name in names]))
    everything = budgets(backbone, names, 6)["all"]
    assert plan_chunks(backbone, tokens, 6, None).recomputed_blocks == 0
    plans = [plan_chunks(backbone, tokens, 6, share * everything) for share in (1.001, 0.99, 0.8, 0.45)]
    assert [(len(plan.chunks), plan.recomputed_blocks) for plan in plans] == [(1, 0), (1, 2), (1, 2), (1, 3)]
    few = plan_chunks(backbone, tokens, 6, 0.1 * everything).chunks
    assert [part.stop - part.start for part in few] == [10] * 10
    assert few[0].start == 0 and few[-1].stop == 100
    assert len(plan_chunks(backbone, tokens, 6, 1e-12).chunks) == 100  # never less than a class at a time


def test_a_step_within_a_budget_is_the_same_step(backbone: ClipBackbone) -> None:
    results = []
    for budget in (None, *budgets(backbone, NAMES, 6).values()):
        classifier = coop(backbone, context_tokens=5, memory_budget_gb=budget).train()
        parameters = list(classifier.trainable().values())
        frozen = classifier.encode_frozen(pixels())

        def loss(classifier: ClipClassifier = classifier, frozen: Tensor = frozen) -> Tensor:
            return nn.functional.cross_entropy(classifier.logits(frozen), LABELS, reduction="none")

        step = DISAM(parameters, rho=0.05, variance_weight=0.5, num_domains=2, ascent_cosine=True)
        step.backward(loss, torch.tensor([0, 0, 0, 1, 1, 1]))
        results.append(parameters[0].grad)
    assert len(results) == 4 and results[0] is not None and results[0].norm() > 1e-4
    assert all(relative(one, results[0]) <= 1e-11 for one in results[1:])


# -- what is frozen runs once --------------------------------------------------------------------------------


def count_blocks(backbone: ClipBackbone) -> dict[str, int]:
    """How often a block of each tower has run since."""
    calls = {"image": 0, "text": 0}
    for target in backbone.targets():
        if target.projection == "fc1":

            def count(*_: object, tower: str = target.tower) -> None:
                calls[tower] += 1

            backbone.model.get_submodule(target.name).register_forward_hook(count)
    return calls


CASES = {
    # config -> blocks of (image, text) run by the preparation, and by each pass
    "coop": (CoOpConfig(context_tokens=4, seed=0), (3, 0), (0, 3)),
    "image": (LoraAdapterConfig(blocks=[2], rank=2), (2, 3), (1, 0)),
    "text": (LoraAdapterConfig(towers=["text"], blocks=[1, 2], rank=2), (3, 1), (0, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pass_repeats_nothing_that_is_frozen(backbone: ClipBackbone, case: str) -> None:
    config, once, each = CASES[case]
    classifier = tiny_classifier(backbone, config, prompts=PROMPTS)
    calls = count_blocks(backbone)
    frozen = classifier.encode_frozen(pixels())
    classifier.frozen_text()
    assert (calls["image"], calls["text"]) == once
    for number in (1, 2):
        classifier.logits(frozen)
        assert (calls["image"], calls["text"]) == tuple(a + number * b for a, b in zip(once, each, strict=True))


def test_text_lora_over_more_prompts_than_run_at_once(backbone: ClipBackbone) -> None:
    # Chunks of unequal length: only the last one holds the long name.
    names = (*(f"thing {number}" for number in range(256)), "a name of very many words indeed")
    prompts = ClassPrompts(names, ("a {}.",))
    config = LoraAdapterConfig(towers=["text"], blocks=[1, 2], projections=["q", "v", "fc1"], rank=2, seed=1)
    classifier = tiny_classifier(backbone, config, prompts=prompts)
    tokens = backbone.tokenize([f"a {name}." for name in names[-2:]])
    longest = int(tokens.argmax(dim=1).max()) + 1
    hidden = classifier.frozen_text().hidden
    assert hidden is not None and hidden.shape[:2] == (257, longest)
    model: Any = backbone.model
    if backbone.family == "open_clip":
        whole = model.text(tokens)
    else:
        whole = model.get_text_features(input_ids=tokens).pooler_output
    ours, trained = classifier.class_features()[-2:], list(classifier.trainable().values())
    theirs = nn.functional.normalize(whole, dim=-1)
    assert relative(ours, theirs) <= 1e-12
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad((features * probe).sum(), trained) for features in (ours, theirs))
    for one, other in zip(*gradients, strict=True):
        assert other.norm() > 1e-4 and relative(one, other) <= 1e-12


@pytest.mark.parametrize("how", ["half weights", "autocast"])
def test_half_precision_is_near(backbone: ClipBackbone, how: str) -> None:
    backbone.to(dtype=torch.float32)
    classifier = coop(backbone, context_tokens=5)
    context = classifier.trainable()["context"]
    theirs = by_hand(backbone, NAMES, context).detach()
    if how == "half weights":
        classifier.to(torch.bfloat16)
        classifier.adapter.float()  # as it is trained: only the backbone is half
        classifier.adapter._chunks.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        features = classifier.class_features()
    assert 1e-4 < relative(features, theirs) < 0.05
    found = gradient(features, classifier.trainable()["context"])
    assert found.dtype == torch.float32 and torch.isfinite(found).all() and found.norm() > 1e-3
