"""Penalties on image features in a step of training: CORAL on the normalised features of a CLIP."""

import pytest
import torch

from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import BasePenaltyConfig
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
