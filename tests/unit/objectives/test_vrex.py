"""V-REx, and CORAL as a rehearsal of a penalty on features, against DomainBed's own code."""

import json

import numpy as np
import pytest
import torch

from disam_peft import DISAM
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import BasePenaltyConfig, VRexConfig
from disam_peft.objectives.coral import Coral
from disam_peft.objectives.objective import Objective
from disam_peft.objectives.vrex import VRex
from tests.helpers.paths import ROOT

REFERENCE = np.load(ROOT / "tests" / "reference" / "penalties.npz")
CASES = json.loads(str(REFERENCE["meta"]))["cases"]
NAMES = {
    method: sorted(name for name, about in CASES.items() if about["method"] == method) for method in ("vrex", "coral")
}


def of_case(name, *keys):
    return [torch.from_numpy(np.asarray(REFERENCE[f"{name}/{key}"])) for key in keys]


def gradient_of(objective, forward, domains, leaf, count):
    """(gradient, report) of a plain step in ``count`` micro-batches, which is the objective's own gradient."""
    rows = torch.arange(len(domains)).tensor_split(count)
    report = DISAM([leaf], rho=0.0).backward_accumulated(
        [lambda of=of: objective.forward(*forward(of)) for of in rows],
        [domains[of] for of in rows],
        objective=objective,
    )
    return leaf.grad, report


def test_every_case_is_driven():
    """Those of other methods by ``test_penalty_references.py``."""
    assert [len(NAMES[method]) for method in ("vrex", "coral")] == [10, 5]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", NAMES["vrex"])
def test_vrex(name, gap, count):
    """``gap``: the ids have a domain between them that the batch lacks."""
    logits, labels, domains = of_case(name, "logits", "labels", "domains")
    loss, penalty, gradient = of_case(name, "loss", "penalty", "objective_grad_logits")
    logits.requires_grad_()
    weight = CASES[name]["penalty_weight"]
    # the weight before annealing is 1, whatever the weight after it is
    config = VRexConfig(weight=10.0, anneal=500) if weight == 1.0 else VRexConfig(weight=weight, anneal=0)
    objective = Objective(ObjectiveConfig(penalties=[config]))
    domains = domains * 2 if gap else domains
    found, report = gradient_of(objective, lambda of: (logits[of], labels[of]), domains, logits, count)
    assert (found - gradient).abs().max() <= 1e-10
    assert report.objective.item() == pytest.approx(loss.item(), abs=1e-10)
    without, _ = gradient_of(
        Objective(ObjectiveConfig(mean_over="domains")), lambda of: (logits[of], labels[of]), domains, logits, count
    )
    mean_K = torch.stack([report.domain_losses[k] for k in range(len(report.domain_losses))])
    assert loss.item() - mean_K.mean().item() == pytest.approx(weight * penalty.item(), abs=1e-10)
    if len(mean_K) > 1:
        assert (without - gradient).abs().max() > 1e-4, "the penalty matters"


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", NAMES["coral"])
def test_coral_through_the_seam(name, gap, count):
    """A statistic of its own, of second order, whose gradient runs to the features: values of the authors' code."""
    features, labels, domains, classifier = of_case(name, "features", "labels", "domains", "classifier")
    [penalty] = of_case(name, "convention_penalty" if name == "coral_single_sample" else "penalty")
    features.requires_grad_()
    domains = domains * 2 if gap else domains
    gamma = CASES[name]["gamma"]

    def forward(of):
        return features[of] @ classifier.T, labels[of], features[of]

    plain, about = gradient_of(Objective(ObjectiveConfig(mean_over="domains")), forward, domains, features, count)
    plain = plain.clone()
    objective = Objective(ObjectiveConfig(mean_over="domains"), penalties=[Coral(BasePenaltyConfig(weight=gamma))])
    found, report = gradient_of(objective, forward, domains, features, count)
    assert report.objective.item() - about.objective.item() == pytest.approx(gamma * penalty.item(), abs=1e-10)
    if name == "coral_single_sample":
        [of_penalty] = of_case(name, "convention_grad_features")
        assert ((found - plain) / gamma - of_penalty).abs().max() <= 1e-10
    else:
        [of_objective, value] = of_case(name, "objective_grad_features", "update_loss")
        assert (found - of_objective).abs().max() <= 1e-10
        assert about.objective.item() == pytest.approx(value.item(), abs=1e-10)


def test_the_weight_changes_after_anneal_steps():
    weights = [VRex(VRexConfig(weight=10.0, anneal=3)).weight(step) for step in range(5)]
    assert weights == [1.0, 1.0, 1.0, 10.0, 10.0]
    assert VRex(VRexConfig(weight=0.2, anneal=0)).weight(0) == 0.2
    assert [VRex(VRexConfig()).weight(step) for step in (0, 499, 500)] == [1.0, 1.0, 10.0], "DomainBed's default"


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_the_number_of_the_step_is_counted_and_resumed(rho):
    """Losses (1, 3) of two domains: Lbar = 2, Var = 1, so the objective is 2 + weight."""
    w = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    config = ObjectiveConfig(penalties=[VRexConfig(weight=10.0, anneal=2)])
    objective, domains = Objective(config), torch.tensor([0, 1])

    def value(objective):
        return DISAM([w], rho, 0.5).backward(lambda: w * 1.0, domains, objective=objective).objective.item()

    assert [value(objective) for _ in range(4)] == pytest.approx([3.0, 3.0, 12.0, 12.0])
    begun = Objective(config)
    value(begun)
    resumed = Objective(config)
    resumed.load_state_dict(begun.state_dict())
    assert [value(resumed) for _ in range(2)] == pytest.approx([3.0, 12.0])


def test_two_quadratics_by_hand():
    """Losses (w-1)^2/2 and (w-3)^2/2: Var = (w-2)^2. At w = 0 Lbar = 5/2 and Var = 4, with gradients -2 and -4."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 3.0], dtype=torch.float64)
    objective = Objective(ObjectiveConfig(penalties=[VRexConfig(weight=0.25, anneal=0)]))
    report = DISAM([w], 0.0).backward(lambda: (w - target).square() / 2, torch.tensor([0, 1]), objective=objective)
    assert w.grad.item() == pytest.approx(-3.0, abs=1e-14)
    assert report.objective.item() == pytest.approx(3.5, abs=1e-14)
    assert report.loss.item() == 2.5
    # the perturbation climbs J - lambda Var = Lbar + (1/4 - lambda) Var: with lambda 1/2 its gradient is -2 + 1 = -1,
    # with lambda 1 it is -2 + 3 = +1, so w + e is -0.1 or 0.1; there the gradient of J is (w - 2) + (w - 2)/2
    for variance_weight, perturbed in ((0.5, -0.1), (1.0, 0.1)):
        DISAM([w], 0.1, variance_weight).backward(
            lambda: (w - target).square() / 2, torch.tensor([0, 1]), objective=objective
        )
        assert w.grad.item() == pytest.approx(1.5 * (perturbed - 2), abs=1e-14)
