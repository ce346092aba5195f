"""CoOp: learned context in the prompt."""

from __future__ import annotations

import pytest
import torch

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone, tiny_classifier

NAMES = ("cat", "polar bear", "fire truck", "{}", "Žluťoučký kůň")


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param)


@pytest.mark.parametrize("class_specific", [False, True])
def test_words_give_the_zero_shot_logits_of_that_template(backbone: ClipBackbone, class_specific: bool) -> None:
    prompts = ClassPrompts(NAMES, ("the templates play no part {}",))
    config = CoOpConfig(init="a photo of a", class_specific=class_specific)
    coop = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts)
    wanted = zero_shot(backbone, NAMES, ["a photo of a {}."])
    assert (coop(pixels()) - wanted(pixels())).abs().max() < 1e-12
    assert tuple(coop.trainable()["context"].shape) == ((5, 4, 32) if class_specific else (4, 32))


def test_random_context_takes_the_place_of_words(backbone: ClipBackbone) -> None:
    # With the embeddings of "a photo of a" put where the random ones were, the prompt is that sentence.
    adapter = build_adapter(CoOpConfig(context_tokens=4, seed=0), backbone, PROMPTS)
    start = int(backbone.tokenize(["a"])[0, 0] == backbone.tokenize(["b"])[0, 0])
    words = backbone.embed_tokens(backbone.tokenize(["a photo of a"]))[0, start : start + 4]
    drawn = adapter.state()["context"]
    assert 0.015 < drawn.std() < 0.025
    adapter.load_state({"context": words})
    coop = ClipClassifier(backbone, adapter, PROMPTS)
    wanted = zero_shot(backbone, PROMPTS.class_names, ["a photo of a {}."])
    assert (coop(pixels()) - wanted(pixels())).abs().max() < 1e-12


def test_contexts_of_classes_are_independent(backbone: ClipBackbone) -> None:
    for config, changed in ((CoOpConfig(class_specific=True, seed=0), [1]), (CoOpConfig(seed=0), [0, 1, 2])):
        classifier = tiny_classifier(backbone, config)
        before = classifier.class_features()
        context = classifier.trainable()["context"]
        with torch.no_grad():
            (context[1] if config.class_specific else context).add_(0.5)
        moved = (classifier.class_features() != before).any(dim=1)
        assert moved.nonzero().flatten().tolist() == changed


def test_sixteen_tokens_by_default_and_a_seed(backbone: ClipBackbone) -> None:
    first = build_adapter(CoOpConfig(seed=0), backbone, PROMPTS).state()["context"]
    assert tuple(first.shape) == (16, 32)
    state = torch.get_rng_state()
    assert torch.equal(build_adapter(CoOpConfig(seed=0), backbone, PROMPTS).state()["context"], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(build_adapter(CoOpConfig(seed=1), backbone, PROMPTS).state()["context"], first)


def test_class_names_of_different_lengths_end_where_they_end(backbone: ClipBackbone) -> None:
    # Were the gap's ids or the shifted end wrong, the features of one class would depend on who else is there.
    alone = build_adapter(CoOpConfig(context_tokens=4, seed=0), backbone, ClassPrompts(("polar bear",), ("{}",)))
    among = build_adapter(CoOpConfig(context_tokens=4, seed=0), backbone, PROMPTS)
    one = ClipClassifier(backbone, alone, ClassPrompts(("polar bear",), ("{}",))).class_features()
    three = ClipClassifier(backbone, among, PROMPTS).class_features()
    assert (three[1] - one[0]).abs().max() < 1e-12
    assert (three[0] - one[0]).abs().max() > 1e-2


def test_row_19_a_prompt_that_does_not_fit_the_context(backbone: ClipBackbone) -> None:
    names = ClassPrompts(("cat", "very " * 5 + "long cat"), ("{}",))
    fits = CoOpConfig(context_tokens=77 - 2 - 8)
    build_adapter(fits, backbone, names)
    with pytest.raises(UserError, match=r"class 'very very .* long cat' has 78 tokens with 68 of context.* takes 77"):
        build_adapter(CoOpConfig(context_tokens=68), backbone, names)
    with pytest.raises(UserError, match=r"long cat.*(has 79|79 tokens)"):
        build_adapter(CoOpConfig(init=" ".join(["the"] * 69)), backbone, names)


def test_context_tokens_must_agree_with_the_words(backbone: ClipBackbone) -> None:
    build_adapter(CoOpConfig(init="a photo of a", context_tokens=4), backbone, PROMPTS)
    with pytest.raises(UserError, match="context_tokens is 5, but init 'a photo of a' has 4 tokens"):
        build_adapter(CoOpConfig(init="a photo of a", context_tokens=5), backbone, PROMPTS)


def test_words_that_melt_into_the_class_name_are_refused(backbone: ClipBackbone) -> None:
    with pytest.raises(UserError, match="does not stay a sequence"):
        build_adapter(CoOpConfig(init="   "), backbone, PROMPTS)
