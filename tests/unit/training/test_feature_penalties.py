"""Penalties on features and heads in a step of training, on the normalised features of a CLIP."""

import pytest
import torch
from accelerate.state import AcceleratorState

from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import (
    BasePenaltyConfig,
    CoralConfig,
    FishrConfig,
    GroupDROConfig,
    IRMConfig,
    MMDConfig,
)
from disam_peft.disam.disam import DISAM
from disam_peft.objectives.coral import Coral
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers.adapter_cells import pixels, tiny_backbone, tiny_classifier

DOMAINS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0])


def coral(features_BE):
    """By its definition, over the whole batch at once."""
    of_domain = [features_BE[d == DOMAINS] for d in range(3)]
    pairs = [(a, b) for a in range(3) for b in range(a)]
    means, covariances = [f.mean(0) for f in of_domain], [f.T.cov() for f in of_domain]
    terms = [
        (means[a] - means[b]).square().mean() + (covariances[a] - covariances[b]).square().mean() for a, b in pairs
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("cell", ["lora-image", "clip_adapter"])
@pytest.mark.parametrize("micro_batches", [MicroBatches(1, 8, "whole"), MicroBatches(3, 3, "two_phase")])
def test_the_gradient_is_that_of_the_definition(twins, cell, micro_batches):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).double().train()
    params, images = list(classifier.trainable().values()), pixels(8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    frozen = classifier.encode_frozen(images)
    features = torch.nn.functional.normalize(classifier.features(frozen), dim=-1)
    loss = torch.nn.functional.cross_entropy(classifier.logits(frozen), labels) + 50.0 * coral(features)
    wanted = torch.autograd.grad(loss, params, allow_unused=True)

    objective = Objective(ObjectiveConfig(), penalties=[Coral(BasePenaltyConfig(weight=50.0))])
    disam = DISAM(params, rho=0.0, num_domains=3)
    gradient = StepGradient(classifier, disam, micro_batches, start_accelerator("no"), objective)
    report = gradient({"pixels": images, "labels": labels, "domains": DOMAINS})
    assert report.objective.item() == pytest.approx(loss.item(), abs=1e-12)
    assert report.objective.item() - report.loss.item() > 1e-3
    for p, expected in zip(params, wanted, strict=True):
        assert (p.grad - expected).abs().max() <= 1e-12


def test_a_penalty_on_frozen_features_says_that_it_has_no_effect(twins):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), "probe-zero_shot").double().train()
    params = list(classifier.trainable().values())
    objective = Objective(ObjectiveConfig(), penalties=[Coral(BasePenaltyConfig(weight=50.0))])
    disam = DISAM(params, rho=0.05, num_domains=3)
    gradient = StepGradient(classifier, disam, MicroBatches(1, 8, "whole"), start_accelerator("no"), objective)
    batch = {"pixels": pixels(8), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), "domains": DOMAINS}
    with pytest.warns(UserWarning, match=r"penalty Coral depends on nothing that is trained") as caught:
        gradient(batch)
        gradient(batch)
    assert len(caught) == 1


def test_a_loop_of_ones_own_that_gives_no_features_is_told_so():
    objective = Objective(ObjectiveConfig(), penalties=[Coral(BasePenaltyConfig(weight=1.0))])
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"needs the image features.*third argument of Objective.forward"):
        DISAM([logits], rho=0.0).backward(
            lambda: objective.forward(logits, torch.zeros(8, dtype=torch.long)), DOMAINS, objective=objective
        )


def variances(classifier, frozen, labels):
    """Of the gradients of each image's loss by the head, (3, C, E or E + 1), from one autograd for each image."""
    features = torch.nn.functional.normalize(classifier.features(frozen), dim=-1)
    bias = classifier.adapter.head_bias
    if classifier.adapter.kind == "linear_probe":
        weight = classifier.adapter.weight
        added = classifier.adapter.bias
    else:
        weight, added = classifier.backbone.logit_scale * classifier.class_features(), torch.zeros(3).double()

    def loss(weight, added, feature, label):
        return torch.nn.functional.cross_entropy(feature @ weight.T + added, label)

    def gradient(feature, label):
        of_weight, of_bias = torch.func.grad(loss, argnums=(0, 1))(weight, added, feature, label)
        return of_weight if bias is None else torch.cat([of_weight, of_bias[:, None]], dim=1)

    gradients = torch.stack([gradient(x, y) for x, y in zip(features, labels, strict=True)])
    return torch.stack([gradients[d == DOMAINS].var(dim=0, correction=0) for d in range(3)])


@pytest.mark.parametrize("cell", ["probe-zero_shot", "probe without bias", "coop-shared", "lora-image"])
@pytest.mark.parametrize("micro_batches", [MicroBatches(1, 8, "whole"), MicroBatches(3, 3, "two_phase")])
def test_fishr_is_that_of_the_head(twins, cell, micro_batches):
    """A probe's own weights, and its bias where that is trained; else the class features times the logit scale."""
    adapter = LinearProbeConfig(bias=False) if cell == "probe without bias" else cell
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), adapter).double().train()
    params, images = list(classifier.trainable().values()), pixels(8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    frozen = classifier.encode_frozen(images)
    of_head = variances(classifier, frozen, labels)
    assert of_head.shape[2] - classifier.backbone.embed_dim == (1 if cell == "probe-zero_shot" else 0)
    penalty = (of_head - of_head.mean(0)).square().mean()
    plain = torch.nn.functional.cross_entropy(classifier.logits(frozen), labels)
    of_penalty = torch.autograd.grad(1e6 * penalty, params, retain_graph=True)
    assert max(g.abs().max() for g in of_penalty) > 1e-3, "it acts"
    wanted = torch.autograd.grad(plain + 1e6 * penalty, params)

    objective = Objective(ObjectiveConfig(penalties=[FishrConfig(weight=1e6, anneal=0)]))
    gradient = StepGradient(
        classifier, DISAM(params, rho=0.0, num_domains=3), micro_batches, start_accelerator("no"), objective
    )
    report = gradient({"pixels": images, "labels": labels, "domains": DOMAINS})
    assert report.objective.item() == pytest.approx((plain + 1e6 * penalty).item(), rel=1e-12)
    for p, expected in zip(params, wanted, strict=True):
        assert (p.grad - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


EVERY_PENALTY = ObjectiveConfig(
    penalties=[
        CoralConfig(weight=50.0),
        MMDConfig(),
        IRMConfig(weight=2.0, anneal=0),
        FishrConfig(weight=1e5, anneal=0),
        GroupDROConfig(weight=0.5, eta=0.3),
    ]
)


@pytest.mark.parametrize("cell", ["coop-shared", "probe-random"])
def test_of_frozen_features_each_penalty_without_an_effect_is_named(twins, cell):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).double().train()
    params = list(classifier.trainable().values())
    gradient = StepGradient(
        classifier,
        DISAM(params, rho=0.05, num_domains=3),
        MicroBatches(1, 8, "whole"),
        start_accelerator("no"),
        Objective(EVERY_PENALTY),
    )
    with pytest.warns(UserWarning, match="depends on nothing that is trained") as caught:
        gradient({"pixels": pixels(8), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), "domains": DOMAINS})
    assert [str(warning.message).split()[2] for warning in caught] == ["Coral", "MMD"]


def test_under_autocast_sums_are_of_float64_and_near_those_of_float32(twins):
    """Features and logits leave the autocast in bfloat16, and everything that is summed is wider."""
    found = {}
    for precision in ("no", "bf16"):
        classifier = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), "lora-image").train()
        params, objective = list(classifier.trainable().values()), Objective(EVERY_PENALTY)
        AcceleratorState._reset_state()
        accelerator = start_accelerator(precision)
        disam = DISAM(params, rho=0.05, num_domains=3)
        gradient = StepGradient(classifier, disam, MicroBatches(1, 8, "whole"), accelerator, objective)
        batch = {"pixels": pixels(8), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), "domains": DOMAINS}
        report = gradient(batch)
        assert bool(report.is_finite)
        assert {value.dtype for value in objective.penalties[3].state_dict().values()} == {torch.int64, torch.float64}
        found[precision] = report.objective.item(), torch.cat([p.grad.flatten() for p in params])
    AcceleratorState._reset_state()
    assert found["bf16"][0] == pytest.approx(found["no"][0], rel=0.1)
    cosine = torch.nn.functional.cosine_similarity(found["bf16"][1], found["no"][1], dim=0)
    assert 0.9 < cosine < 1 - 1e-9
