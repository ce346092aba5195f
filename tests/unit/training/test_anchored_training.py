"""Anchors in training: where the reference comes from, how often it is computed, and the gradient of a step."""

import pytest
import torch
from torch import nn

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.anchors import (
    ClassFeaturesAnchorConfig,
    ImageFeaturesAnchorConfig,
    LogitsAnchorConfig,
    WeightsAnchorConfig,
)
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.disam.disam import DISAM
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.fit import fit
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers import accumulated_runs
from tests.helpers.adapter_cells import LAST_TWO, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.class_means import ClassMeans, ClassMeansConfig

DOMAINS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
BATCH = {"pixels": pixels(8), "labels": LABELS, "domains": DOMAINS}
ALL = [
    LogitsAnchorConfig(weight=5.0),
    ImageFeaturesAnchorConfig(),
    ClassFeaturesAnchorConfig(),
    WeightsAnchorConfig(weight=0.2),
]
DIVISIONS = [MicroBatches(1, 8, "whole"), MicroBatches(3, 3, "two_phase")]


def unit(features):
    return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("micro_batches", DIVISIONS, ids=["whole", "micro-batches"])
@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_the_gradient_is_that_of_the_definitions(twins, family, micro_batches):
    """Both towers adapted, so that every anchor acts; the references are another classifier's."""
    classifier = tiny_classifier(tiny_backbone(twins, family), "lora-both").train()
    params = list(classifier.trainable().values())
    zero_shot = ClipClassifier(tiny_backbone(twins, family), None, PROMPTS)
    frozen = classifier.encode_frozen(BATCH["pixels"])
    logits, reference = classifier.logits(frozen), zero_shot(BATCH["pixels"])
    images = (unit(classifier.features(frozen)), unit(zero_shot.backbone.encode_image(BATCH["pixels"])))
    classes = (classifier.class_features(), zero_shot.class_features())
    start = [p.detach() - 0.1 for p in params]
    p, q = reference.softmax(1), logits.softmax(1)
    loss = nn.functional.cross_entropy(logits, LABELS)
    wanted_value = (
        loss
        + 5.0 * (p * (p / q).log()).sum(1).mean()
        + 10.0 * (images[0] - images[1]).abs().mean()
        + 8.0 * (2 - 2 * (classes[0] * classes[1]).sum(1)).mean()
        + 0.2 * 0.5 * sum((w - w0).square().sum() for w, w0 in zip(params, start, strict=True))
    )
    wanted = torch.autograd.grad(wanted_value, params)

    objective = Objective(ObjectiveConfig(anchors=ALL))
    objective.remember_start(params)
    objective.load_state_dict(objective.state_dict() | {"anchors": {"class_features": {}, "weights": {"start": start}}})
    disam = DISAM(params, rho=0.0, num_domains=3)
    report = StepGradient(classifier, disam, micro_batches, start_accelerator("no"), objective)(BATCH)
    assert report.objective.item() == pytest.approx(wanted_value.item(), abs=1e-12)
    assert report.loss.item() == pytest.approx(loss.item(), abs=1e-12)
    for parameter, expected in zip(params, wanted, strict=True):
        assert (parameter.grad - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("cell", "image_forwards", "text_forwards"), [("lora-image", 1, 0), ("coop-shared", 0, 1)])
@pytest.mark.parametrize("micro_batches", DIVISIONS, ids=["whole", "micro-batches"])
def test_the_reference_is_computed_once_for_all_passes(
    twins, cell, image_forwards, text_forwards, micro_batches, monkeypatch
):
    """Under DISAM in two phases there are up to four forward passes of a micro-batch. A frozen tower has computed its
    features anyway; the templates, which CoOp has no use for, run once for the whole run."""
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).train()
    heads, texts = [], []
    head, text = classifier.backbone.image_head, classifier.backbone.encode_text

    def counted_head(*arguments):
        heads.append(torch.is_grad_enabled())
        return head(*arguments)

    def counted_text(*arguments):
        texts.append(1)
        return text(*arguments)

    monkeypatch.setattr(classifier.backbone, "image_head", counted_head)
    monkeypatch.setattr(classifier.backbone, "encode_text", counted_text)

    def counts(*anchors):
        heads.clear(), texts.clear()
        disam = DISAM(classifier.trainable().values(), rho=0.3, variance_weight=0.6, num_domains=3)
        objective = Objective(ObjectiveConfig(anchors=list(anchors)))
        gradient = StepGradient(classifier, disam, micro_batches, start_accelerator("no"), objective)
        for _ in range(2):
            gradient(BATCH)
        return len(heads), len(texts)

    plain, _ = counts()
    assert counts(LogitsAnchorConfig()) == (plain + 2 * micro_batches.count * image_forwards, text_forwards)
    assert counts(LogitsAnchorConfig())[1] == 0, "kept"


def test_the_reference_draws_no_random_numbers_and_has_no_dropout(twins):
    config = LoraAdapterConfig(blocks=LAST_TWO, rank=2, dropout=0.4, seed=1)
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), config).train()
    frozen, before = classifier.encode_frozen(pixels()), torch.get_rng_state()
    found = classifier.zero_shot_outputs(frozen)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.logits_BC, ClipClassifier(tiny_backbone(twins, "open_clip"), None, PROMPTS)(pixels()))


def test_a_model_that_moves_has_its_reference_anew(twins):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), "coop-shared")
    assert classifier.zero_shot_class_features().dtype == torch.float64
    classifier.backbone.to(dtype=torch.float32)
    found = classifier.zero_shot_class_features()
    wanted = ClipClassifier(tiny_backbone(twins, "open_clip", torch.float32), None, PROMPTS).class_features()
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


@pytest.mark.parametrize("cell", ["probe-random", "coop-shared"])
def test_an_anchor_of_frozen_features_is_named(twins, cell):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).train()
    config = ClassFeaturesAnchorConfig() if cell == "probe-random" else ImageFeaturesAnchorConfig()
    disam = DISAM(classifier.trainable().values(), rho=0.1, num_domains=3)
    objective = Objective(ObjectiveConfig(anchors=[config]))
    gradient = StepGradient(classifier, disam, MicroBatches(1, 8, "whole"), start_accelerator("no"), objective)
    with pytest.warns(UserWarning, match=f"the anchor '{config.kind}' depends on nothing that is trained here"):
        gradient(BATCH)


@pytest.mark.parametrize(("precision", "rounding"), [("no", 1e-5), ("bf16", 0.02)])
def test_at_the_start_all_distances_are_zero(twins, domains_folder, precision, rounding):
    """LoRA starts at zero-shot. (Under autocast up to its rounding: the last block and the text features are computed
    along another path where they are trained.)"""
    dataset = load(DataConfig(root=domains_folder))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    config = LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1)
    lora = tiny_classifier(backbone, config, scramble=0.0, prompts=prompts)
    found = {}
    fit(
        lora,
        dataset,
        objective=ObjectiveConfig(anchors=ALL),
        config=TrainConfig(steps=3, batch_size=12, workers=0, log_every=1, learning_rate=0.02, warmup_steps=0),
        augment=AugmentConfig(kind="none"),
        accelerator=accumulated_runs.fresh_accelerator(precision),
        on_event=lambda name, **values: found.setdefault(values.get("step"), values) if name == "step" else None,
    )
    assert abs(found[1]["objective"] - found[1]["loss"]) < rounding
    assert found[3]["objective"] > found[3]["loss"] + 2 * rounding


def test_weights_are_held_where_a_fitted_start_put_them(twins, domains_folder):
    dataset = load(DataConfig(root=domains_folder))
    prompts, backbone = ClassPrompts(dataset.prompt_names, ("a {}.",)), tiny_backbone(twins, "open_clip", torch.float32)
    classifier = ClipClassifier(backbone, ClassMeans.build(ClassMeansConfig(), backbone, prompts), prompts)
    found = []
    fit(
        classifier,
        dataset,
        objective=ObjectiveConfig(anchors=[WeightsAnchorConfig(weight=1.0)]),
        config=TrainConfig(steps=2, batch_size=12, workers=0, log_every=1, learning_rate=0.1, warmup_steps=0),
        augment=AugmentConfig(kind="none"),
        accelerator=accumulated_runs.fresh_accelerator("no"),
        on_event=lambda name, **values: found.append(values) if name == "step" else None,
    )
    assert found[0]["objective"] == found[0]["loss"], "it started there, not at 0"
    assert found[1]["objective"] > found[1]["loss"] + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "pieces"), [("lora-image", 4), ("lora-image", 6), ("coop-shared", 3)])
def test_runs_in_micro_batches_and_from_stores(twins, domains_folder, cell, pieces):
    objective = f"anchors of {cell.split('-')[0]}"

    def run(pieces, **options):
        return accumulated_runs.run(twins, domains_folder, pieces, cell=cell, objective=objective, steps=2, **options)

    whole, events = run(1)
    in_pieces, _ = run(pieces)
    assert (in_pieces - whole).abs().max() <= 1e-12
    assert (run(1, source="feature store")[0] - whole).abs().max() <= 1e-12
    plain, _ = accumulated_runs.run(twins, domains_folder, 1, cell=cell, steps=2)
    assert (plain - whole).abs().max() > 1e-5, "the anchors matter"
    [first, *_] = (values for name, values in events if name == "step")
    assert first["objective"] > first["loss"] + 1e-6
