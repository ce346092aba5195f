"""The value of each term in the report of a step: that of its public function, however the batch is divided."""

import pytest
import torch

from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import CoralConfig, FishrConfig, IRMConfig, MMDConfig, VRexConfig
from disam_peft.objectives.anchors.feature_anchors import squared_distance
from disam_peft.objectives.anchors.logits_anchor import kl_to_reference
from disam_peft.objectives.anchors.weights_anchor import l2_sp
from disam_peft.objectives.coral import coral
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.objectives.fishr import fishr
from disam_peft.objectives.group_dro import group_dro
from disam_peft.objectives.irm import irm
from disam_peft.objectives.mmd import mmd
from disam_peft.objectives.objective import Objective
from disam_peft.objectives.vrex import vrex
from tests.helpers.anchors import CONFIGS, AnchoredProblem
from tests.helpers.objectives import DOMAINS, EVERYTHING, GROUPDRO, METHODS, Problem, penalised

DIVISIONS = [EVERYTHING, [EVERYTHING[:4], EVERYTHING[4:]]]
EVERY_PENALTY = penalised(
    CoralConfig(weight=0.7),
    MMDConfig(weight=0.3, in_ascent=False),
    VRexConfig(weight=3.0, anneal=5),
    IRMConfig(weight=3.0, anneal=0),
    FishrConfig(weight=40.0, anneal=5),
    GROUPDRO,
)


@pytest.mark.parametrize("micro_batches", DIVISIONS, ids=["whole", "two"])
@pytest.mark.parametrize("method", METHODS)
def test_penalties_are_those_of_the_public_functions(method, micro_batches):
    """Also before ``anneal``, where fishr has the weight 0 and vrex the weight 1."""
    problem = Problem()
    features, logits = (tensor.detach() for tensor in problem(problem.x))
    to_logits = features.requires_grad_() @ problem.head.weight.T
    loss, q_D = group_dro(logits, problem.y, DOMAINS, torch.ones(3, dtype=torch.float64), eta=0.5)
    expected = {
        "coral": coral(features, DOMAINS),
        "mmd": mmd(features, DOMAINS),
        "vrex": vrex(logits, problem.y, DOMAINS),
        "irm": irm(logits, problem.y, DOMAINS),
        "fishr": fishr(features, to_logits, problem.y, DOMAINS)[0],
        "groupdro": loss,
    }
    _, report = problem.step(EVERY_PENALTY(), method, micro_batches)
    assert list(report.terms) == list(expected)
    for kind, value in expected.items():
        assert value.item() != 0
        assert report.terms[kind].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), kind
    assert list(report.domain_terms) == ["groupdro_q"]
    assert (report.domain_terms["groupdro_q"] - q_D).abs().max() <= 1e-12


@pytest.mark.parametrize("mean_over", ["samples", "domains"])
@pytest.mark.parametrize("micro_batches", DIVISIONS, ids=["whole", "two"])
@pytest.mark.parametrize("method", METHODS)
def test_anchors_are_those_of_the_public_functions(method, micro_batches, mean_over):
    problem = AnchoredProblem()
    config = ObjectiveConfig(anchors=CONFIGS["all over domains"].anchors, mean_over=mean_over)
    with torch.no_grad():
        features_BE = torch.nn.functional.normalize(problem.body(problem.x), dim=1)
        logits_BC, of = problem.head(features_BE), problem.reference

        def mean(value_B):
            if mean_over == "samples":
                return value_B.mean()
            return torch.stack([value_B[d == DOMAINS].mean() for d in range(3)]).mean()

        classes_CE = torch.nn.functional.normalize(problem.head.weight, dim=1)
        expected = {
            "logits": mean(kl_to_reference(logits_BC, of.logits_BC)).item(),
            "image_features": mean(squared_distance(features_BE, of.features_BE)).item(),
            "class_features": squared_distance(classes_CE, of.class_features_CE).mean().item(),
            "weights": l2_sp(problem.params, problem.start).item(),
        }
        loss = mean(cross_entropy(logits_BC, problem.y)).item()
    batches = [micro_batches] if isinstance(micro_batches, torch.Tensor) else micro_batches
    objective = problem.started(config)
    report = problem.disam(method).backward_accumulated(
        [problem.call(objective, rows) for rows in batches], [DOMAINS[rows] for rows in batches], objective=objective
    )
    found = {kind: value.item() for kind, value in report.terms.items()}
    assert found == pytest.approx(expected, abs=1e-12) and min(expected.values()) > 1e-3
    weights = {anchor.kind: anchor.weight for anchor in config.anchors}
    added = sum(weights[kind] * value for kind, value in found.items())
    assert report.objective.item() == pytest.approx(loss + added, abs=1e-12)


def test_an_objective_without_terms_has_none():
    _, report = Problem().step(Objective(), "disam", EVERYTHING)
    assert report.terms == {} and report.domain_terms == {}
