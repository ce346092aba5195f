"""ClipClassifier: zero-shot, prompts, and what it keeps between calls."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.prompts import ClassPrompts, fill_templates
from disam_peft.adapters.registry import ADAPTERS, build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone, tiny_classifier


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param)


def test_zero_shot_is_the_ensemble_written_out(backbone: ClipBackbone) -> None:
    names, templates = ("cat", "polar bear", "fire truck"), ("a photo of a {}.", "a drawing of the {}!", "{}")
    logits = zero_shot(backbone, names, templates)(pixels())
    by_hand = torch.empty(6, 3, dtype=torch.float64)
    for column, name in enumerate(names):
        total = torch.zeros(16, dtype=torch.float64)
        for template in templates:
            feature = backbone.encode_text(backbone.tokenize([template.replace("{}", name)]))[0]
            total += feature / feature.norm()
        direction = total / total.norm()
        for row, image in enumerate(backbone.encode_image(pixels())):
            by_hand[row, column] = backbone.logit_scale * (image / image.norm() * direction).sum()
    assert (logits - by_hand).abs().max() < 1e-12 * by_hand.abs().max()
    assert by_hand.std() > 0.1


def test_both_families_agree_on_the_same_weights(twins: tuple[str, str]) -> None:
    first, second = (zero_shot(tiny_backbone(twins, family), PROMPTS.class_names, PROMPTS.templates)(pixels())
                     for family in FAMILIES)  # fmt: skip
    assert (first - second).abs().max() < 1e-10


def test_many_prompts_are_encoded_in_chunks(backbone: ClipBackbone) -> None:
    names = tuple(f"thing {number}" for number in range(130))
    templates = ("a {}.", "the {}!")
    many = zero_shot(backbone, names, templates).class_features()  # 260 prompts: more than one chunk
    few = zero_shot(backbone, names[:129:128], templates).class_features()
    assert (many[:129:128] - few).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (("cat", "  "), ("a {}.",), "name of class 1 is empty"),
        (("cat",), ("a photo.",), r"'a photo.' needs exactly one \{\}"),
        (("cat",), ("a {} {}.",), r"needs exactly one \{\}"),
        (("cat",), (), "no prompt template"),
        ((), ("a {}.",), "no classes"),
    ],
)
def test_row_20_prompts_that_cannot_be_used(
    backbone: ClipBackbone, names: tuple[str, ...], templates: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        zero_shot(backbone, names, templates)
    with pytest.raises(UserError, match=message):
        build_adapter(LoraAdapterConfig(), backbone, ClassPrompts(names, templates))


def test_row_20_braces_in_a_name_are_braces() -> None:
    prompts = ClassPrompts(("{0.__class__}", "{", "{}"), ("a {}.", "{name} {}"))
    assert fill_templates(prompts) == [
        "a {0.__class__}.",
        "{name} {0.__class__}",
        "a {.",
        "{name} {",
        "a {}.",
        "{name} {}",
    ]


@pytest.mark.parametrize("name", ["Žluťoučký kůň", "قطة", "北极熊", "🐱 cat"])
def test_row_21_names_in_any_script(backbone: ClipBackbone, name: str) -> None:
    logits = zero_shot(backbone, (name, "dog"), ("a photo of a {}.",))(pixels())
    assert torch.isfinite(logits).all()
    assert (logits[:, 0] - logits[:, 1]).abs().min() > 1e-3


def test_row_22_a_second_adapter_needs_the_first_one_gone(backbone: ClipBackbone) -> None:
    first = build_adapter(LoraAdapterConfig(), backbone, PROMPTS)
    for config in (LoraAdapterConfig(towers=["text"]), LinearProbeConfig()):
        with pytest.raises(UserError, match="already carries an adapter"):
            build_adapter(config, backbone, PROMPTS)
    first.detach(backbone)
    build_adapter(LoraAdapterConfig(towers=["text"]), backbone, PROMPTS)


def test_row_23_nothing_to_train(backbone: ClipBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(LinearProbeAdapter):
        def trainable(self) -> dict[str, nn.Parameter]:
            return {}

    monkeypatch.setitem(ADAPTERS, LinearProbeConfig, Idle)
    with pytest.raises(UserError, match="'linear_probe' has no trainable parameter"):
        build_adapter(LinearProbeConfig(), backbone, PROMPTS)


def test_text_prepared_during_an_evaluation_can_be_trained_on(backbone: ClipBackbone) -> None:
    classifier = tiny_classifier(backbone, "lora-text")
    with torch.inference_mode():
        classifier(pixels())
    classifier(pixels()).sum().backward()
    assert all(p.grad is not None for p in classifier.trainable().values())


def test_class_features_follow_the_backbone_to_another_precision(backbone: ClipBackbone) -> None:
    classifier = zero_shot(backbone, PROMPTS.class_names, PROMPTS.templates)
    assert classifier(pixels()).dtype == torch.float64
    before = classifier.frozen_text()
    classifier.to(torch.bfloat16)
    frozen = classifier.frozen_text()
    assert frozen is not before
    wanted = zero_shot(backbone, PROMPTS.class_names, PROMPTS.templates).class_features()
    assert torch.equal(classifier.class_features(), wanted) and wanted.dtype == torch.float32
    assert classifier(pixels(dtype=torch.bfloat16)).dtype == torch.float32
    assert classifier.frozen_text() is frozen  # computed once per precision, not once per call


def test_logits_keep_float32_under_autocast(backbone: ClipBackbone) -> None:
    classifier = zero_shot(backbone.to(dtype=torch.float32), PROMPTS.class_names, PROMPTS.templates)
    features = classifier.encode_frozen(pixels(dtype=torch.float32))
    wanted = classifier.logits(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier.logits(features), wanted)


def test_zero_shot_is_the_same_wherever_its_frozen_part_ends(backbone: ClipBackbone) -> None:
    wanted = ClipClassifier(backbone, None, PROMPTS)(pixels())
    for split in range(4):
        classifier = ClipClassifier(backbone, None, PROMPTS, image_split=split)
        frozen = classifier.encode_frozen(pixels())
        assert torch.equal(frozen, backbone.image_trunk(pixels(), split))
        assert torch.equal(classifier.logits(frozen), wanted)
    adapter = build_adapter(LoraAdapterConfig(blocks=[2]), backbone, PROMPTS)
    with pytest.raises(ValueError, match="image_split=1 is for zero-shot; this adapter's is 2"):
        ClipClassifier(backbone, adapter, PROMPTS, image_split=1)


def test_training_mode_is_the_adapters_alone(backbone: ClipBackbone) -> None:
    classifier = tiny_classifier(backbone, "lora-image").train()
    assert classifier.training and classifier.adapter is not None and classifier.adapter.training
    assert not backbone.model.training


def test_adapter_configs_need_no_torch() -> None:
    check = "import sys; from disam_peft.config.adapters import AdapterConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
