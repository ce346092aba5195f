"""Batches that lack what a term compares: one image of a domain, one domain, one class. Values by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.config.losses import ContrastiveConfig, SigmoidConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.objectives.contrastive import contrastive
from disam_peft.objectives.mmd import mmd
from disam_peft.objectives.objective import PENALTIES, Objective
from disam_peft.objectives.run_objective import build_objective
from tests.helpers.objectives import DOMAINS, SCALE, Problem

ONE_OF_EACH = torch.tensor([0, 1, 2])  # their domains are 0, 1 and 2
OF_DOMAIN_0 = torch.tensor([0, 3, 4, 7])
KINDS: dict[str, Any] = {config.model_fields["kind"].default: config for config in PENALTIES}


def step(kind, rows, method="disam", **settings):
    """(gradients, objective, mean loss) with one penalty of weight 1 from the first step on."""
    config = KINDS[kind](weight=1.0, anneal=0, **settings)
    gradients, report = Problem().step(
        Objective(ObjectiveConfig(penalties=[config], mean_over="domains")), method, rows
    )
    return gradients, report.objective.item(), report.loss.item()


@pytest.mark.parametrize("method", ["erm", "disam"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows", [ONE_OF_EACH, OF_DOMAIN_0, torch.tensor([5])], ids=["one of each", "one domain", "one"]
)
def test_everything_stays_finite(kind, rows, method):
    gradients, value, _ = step(kind, rows, method)
    assert math.isfinite(value) and bool(torch.isfinite(gradients).all())


def penalty_by_hand(kind):
    """On one image of each of three domains."""
    problem = Problem()
    with torch.no_grad():
        features, logits = problem(problem.x[ONE_OF_EACH])
    losses = nn.functional.cross_entropy(logits, problem.y[ONE_OF_EACH], reduction="none")
    if kind == "coral":  # no covariances: the distances of the means alone
        return sum((features[a] - features[b]).square().mean().item() for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    if kind == "vrex":
        return losses.var(correction=0).item()
    if kind == "groupdro":  # in the place of the mean
        q = (0.01 * losses).softmax(0)
        return (q @ losses - losses.mean()).item()
    if kind == "mmd":
        return mmd(features, DOMAINS[ONE_OF_EACH]).item()
    return 0.0  # irm: no two images to multiply; fishr: no variance


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_of_each_domain(kind):
    _, value, mean = step(kind, ONE_OF_EACH)
    assert value - mean == pytest.approx(penalty_by_hand(kind), abs=1e-12)
    if kind in ("coral", "vrex", "groupdro", "mmd"):
        assert abs(value - mean) > 1e-7


def test_irm_of_its_authors_squares_the_gradient_of_single_images():
    problem = Problem()
    _, value, mean = step("irm", ONE_OF_EACH, variant="v1")
    logits = problem(problem.x[ONE_OF_EACH])[1].detach()
    by_scale = (logits.softmax(1) * logits).sum(1) - logits[torch.arange(3), problem.y[ONE_OF_EACH]]
    assert value - mean == pytest.approx(by_scale.square().mean().item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_domain_alone(kind):
    """What compares domains is 0, and so is its gradient; q of one domain is 1; IRM has its own gradient."""
    gradients, value, mean = step(kind, OF_DOMAIN_0)
    plain, report = Problem().step(Objective(), "disam", OF_DOMAIN_0)
    assert mean == pytest.approx(report.loss.item(), abs=1e-15)
    if kind == "irm":
        assert abs(value - mean) > 1e-4
    else:
        assert value == pytest.approx(mean, abs=1e-12)
        assert (gradients - plain).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_with_one_source_domain_is_named_where_it_is_zero(kind, recwarn):
    build_objective(ObjectiveConfig(penalties=[KINDS[kind](anneal=0)]), ["unnamed"], 10)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (kind != "irm")
    for message in told:
        assert f"objective.penalties has {kind!r}, but there is one source domain ('unnamed')" in message
        assert message.endswith("add a domain, or remove the penalty")


def test_an_anneal_that_is_longer_than_the_run_is_named_for_each_that_has_one(recwarn):
    penalties = [KINDS[kind]() for kind in KINDS]
    build_objective(ObjectiveConfig(penalties=penalties), ["art", "photo"], 100)
    told = sorted(str(warning.message).split()[2] for warning in recwarn)
    assert told == ["'fishr'", "'irm'", "'vrex'"]


def test_contrastive_on_one_class_is_the_loss_of_equal_captions():
    """Nothing tells the captions apart, so images are compared for them: log B of each, up to how they differ."""
    problem = Problem()
    rows = (problem.y == problem.y.mode().values).nonzero()[:, 0]
    assert len(rows) > 2
    objective = Objective(ObjectiveConfig(loss=ContrastiveConfig()), seed=5)
    objective.begin_batch(problem.y[rows], num_classes=4)
    with torch.no_grad():
        features = nn.functional.normalize(problem.body(problem.x[rows]), dim=1)
        captions = nn.functional.normalize(problem.head.weight, dim=1)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def forward():
        return objective.forward(
            features @ captions.T + w,
            problem.y[rows],
            features + w,
            scale=SCALE,
            caption_features_NE=captions,
            place_B=torch.arange(len(rows)),
            num_places=len(rows),
        )

    report = DISAM([w], 0.0).backward(forward, DOMAINS[rows], objective=objective)
    wanted = contrastive(features, captions[problem.y[rows]], SCALE)
    assert report.objective.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert math.isfinite(w.grad.item())


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_sigmoid_without_a_bias_says_yes_to_one_class_where_nothing_is_preferred(classes):
    """Whatever all logits of an image have in common: 25, as in CLIP, or nothing."""
    for common in (0.0, 25.0):
        logits = torch.full((2, classes), common, dtype=torch.float64, requires_grad=True)
        loss = Objective(ObjectiveConfig(loss=SigmoidConfig())).forward(logits, torch.tensor([0, classes - 1])).loss_B
        p = 1 / max(2, classes)  # of one class no image can be told to be of another
        wanted = -math.log(p) - (classes - 1) * math.log(1 - p)
        assert loss.tolist() == pytest.approx([wanted] * 2, abs=1e-12)
