"""Losses on a CLIP: the gradient of a step by their definitions, what they refuse, and what a run draws."""

import pytest
import torch
from torch import nn

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.common.random import keyed_uniforms
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.losses import ContrastiveConfig, CrossEntropyConfig, FocalConfig, MarginSoftmaxConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.objectives.contrastive import Contrastive, contrastive
from disam_peft.objectives.margin_softmax import margin_softmax
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.fit import fit
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers import accumulated_runs
from tests.helpers.adapter_cells import pixels, tiny_backbone, tiny_classifier

DOMAINS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
BATCH = {"pixels": pixels(8), "labels": LABELS, "domains": DOMAINS}
DIVISIONS = [MicroBatches(1, 8, "whole"), MicroBatches(3, 3, "two_phase")]


def features_of(classifier):
    return nn.functional.normalize(classifier.features(classifier.encode_frozen(BATCH["pixels"])), dim=-1)


def require_step(classifier, objective, micro_batches, value):
    """A step over the batch gives this value and its gradient."""
    params = list(classifier.trainable().values())
    wanted = torch.autograd.grad(value, params)
    disam = DISAM(params, rho=0.0, num_domains=3)
    report = StepGradient(classifier, disam, micro_batches, start_accelerator("no"), objective)(BATCH)
    assert report.objective.item() == pytest.approx(value.item(), abs=1e-12)
    plain = nn.functional.cross_entropy(classifier(BATCH["pixels"]), LABELS)
    assert report.loss.item() == pytest.approx(plain.item(), abs=1e-12), "records show the plain cross entropy"
    assert abs(report.objective.item() - report.loss.item()) > 1e-3
    for parameter, expected in zip(params, wanted, strict=True):
        assert (parameter.grad - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("micro_batches", DIVISIONS, ids=["whole", "micro-batches"])
@pytest.mark.parametrize("cell", ["lora-image", "lora-text", "lora-both", "clip_adapter", "coop-shared", "coop-class"])
def test_contrastive_is_clips_loss_over_the_whole_batch(twins, cell, micro_batches):
    """Pairs of an image and its caption, in the plain way; the text tower runs once more for them here."""
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).train()
    if cell.startswith("coop"):
        templates, captions_NE = 1, classifier.class_features()
    else:
        templates = 2
        captions_NE = nn.functional.normalize(classifier.backbone.encode_text(classifier._tokens_NL), dim=-1)
    drawn = torch.from_numpy(keyed_uniforms(8, 7, "captions", 0) * templates).long()
    assert len(drawn.unique()) == templates
    scale = classifier.backbone.logit_scale
    value = contrastive(features_of(classifier), captions_NE[LABELS * templates + drawn], scale)
    objective = Objective(ObjectiveConfig(loss=ContrastiveConfig()), seed=7)
    require_step(classifier, objective, micro_batches, value)


@pytest.mark.parametrize("micro_batches", DIVISIONS, ids=["whole", "micro-batches"])
@pytest.mark.parametrize("cell", ["lora-both", "coop-shared"])
def test_margins_have_a_gradient_where_the_text_is_trained(twins, cell, micro_batches):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).train()
    frozen = classifier.encode_frozen(BATCH["pixels"])
    found = margin_softmax(
        classifier.features(frozen), classifier.class_features(), LABELS, classifier.backbone.logit_scale, 0.4
    )
    objective = Objective(ObjectiveConfig(loss=MarginSoftmaxConfig(margin=0.4)))
    require_step(classifier, objective, micro_batches, found.mean())


def test_plain_contrastive_loss_by_hand():
    """Two pairs with the logits [[a, b], [c, d]]."""
    features = torch.eye(2, dtype=torch.float64)
    captions = torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    a, b, c, d = (2 * features @ captions.T).flatten().exp().tolist()
    rows, columns = [a / (a + b), d / (c + d)], [a / (a + c), d / (b + d)]
    wanted = -torch.tensor([*rows, *columns], dtype=torch.float64).log().mean()
    assert contrastive(features, captions, 2.0).item() == pytest.approx(wanted.item(), abs=1e-14)


def drawn_in(step, seed, count=40):
    objective = Objective(ObjectiveConfig(loss=ContrastiveConfig()), seed=seed)
    objective.load_state_dict(objective.state_dict() | {"steps_begun": step})
    objective.begin_batch(torch.zeros(count, dtype=torch.int64), num_classes=3, templates=4)
    assert isinstance(objective._loss, Contrastive)
    return objective._loss._begun()


def test_captions_are_drawn_by_seed_step_and_place():
    first, again = drawn_in(3, 0), drawn_in(3, 0)
    assert torch.equal(first.template_P, again.template_P), "as after a resume"
    assert set(first.template_P.tolist()) == {0, 1, 2, 3}
    for other in (drawn_in(4, 0), drawn_in(3, 1)):
        assert (first.template_P != other.template_P).any()
    assert first.count_N.tolist() == first.template_P.bincount(minlength=12).tolist()


def test_the_batch_has_to_be_told_and_mixtures_have_no_caption():
    objective = Objective(ObjectiveConfig(loss=ContrastiveConfig()))
    given = {"features_BE": torch.eye(2), "scale": torch.ones(()), "caption_features_NE": torch.eye(2)}
    labels, place = torch.tensor([0, 1]), {"place_B": torch.tensor([0, 1]), "num_places": 2}
    with pytest.raises(ValueError, match=r"call Objective.begin_batch\(labels, ...\)"):
        objective.forward(torch.zeros(2, 2), labels, **given, **place)
    objective.begin_batch(labels, num_classes=2)
    with pytest.raises(ValueError, match="needs the features of every prompt"):
        objective.forward(torch.zeros(2, 2), labels, **{**given, "caption_features_NE": None}, **place)
    objective.forward(torch.zeros(2, 2), labels, **given, **place)
    with pytest.raises(ValueError, match="a mixed image has no caption"):
        objective.forward(torch.zeros(2, 2), labels, **given, **place, other_labels_B=labels, share_B=torch.ones(2))


@pytest.fixture
def fitted(twins, domains_folder):
    """The records of two steps of a run with this loss."""

    def run(loss, config=None, precision="no"):
        dataset = load(DataConfig(root=domains_folder))
        prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.", "art of a {}."))
        backbone = tiny_backbone(twins, "open_clip", torch.float32)
        config = config or LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1)
        events = []
        fit(
            tiny_classifier(backbone, config, scramble=0.0, prompts=prompts),
            dataset,
            objective=ObjectiveConfig(loss=loss),
            config=TrainConfig(steps=2, batch_size=12, workers=0, log_every=1, learning_rate=0.02, warmup_steps=0),
            augment=AugmentConfig(kind="none"),
            accelerator=accumulated_runs.fresh_accelerator(precision),
            on_event=lambda name, **values: events.append(values) if name == "step" else None,
        )
        return events

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [ContrastiveConfig(), MarginSoftmaxConfig(), FocalConfig(class_weights="effective_number")],
    ids=lambda loss: loss.kind,
)
def test_half_precision_comes_to_the_same_up_to_its_rounding(fitted, loss):
    wide, narrow = fitted(loss), fitted(loss, precision="bf16")
    assert narrow[0]["objective"] == pytest.approx(wide[0]["objective"], rel=0.05)
    assert len(narrow) == 2 and narrow[1]["objective"] != narrow[0]["objective"], "no step was skipped"


def test_class_weights_of_a_class_that_is_not_there(fitted, domains_folder):
    name = load(DataConfig(root=domains_folder)).classes[0]
    with pytest.raises(UserError, match=rf"has the class '{name}x'.*did you mean '{name}'"):
        fitted(CrossEntropyConfig(class_weights={f"{name}x": 2.0}))
    [first, _] = fitted(CrossEntropyConfig(class_weights={name: 5.0}))
    assert abs(first["objective"] - first["loss"]) > 1e-3


@pytest.mark.parametrize("loss", [ContrastiveConfig(), MarginSoftmaxConfig()], ids=lambda loss: loss.kind)
def test_a_head_of_its_own_is_refused(fitted, loss):
    with pytest.raises(UserError, match=f"objective.loss.kind={loss.kind} compares image features with class features"):
        fitted(loss, LinearProbeConfig())
