"""Anchors: their distances, their steps by the definitions however the batch is divided, and their state."""

import math
import warnings
from typing import get_args

import pytest
import torch
from torch import nn

from disam_peft.config.anchors import (
    AnchorConfig,
    BaseAnchorConfig,
    BaseModelAnchorConfig,
    ClassFeaturesAnchorConfig,
    ImageFeaturesAnchorConfig,
    LogitsAnchorConfig,
    WeightsAnchorConfig,
)
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.errors import UserError
from disam_peft.objectives.anchors.base import ModelAnchor, SampleAnchor
from disam_peft.objectives.anchors.feature_anchors import cosine_distance, l1_distance, squared_distance
from disam_peft.objectives.anchors.logits_anchor import kl_to_reference, l1_to_reference
from disam_peft.objectives.anchors.weights_anchor import l2_sp
from disam_peft.objectives.base import Reference
from disam_peft.objectives.objective import ANCHORS, Objective
from tests.helpers.anchors import CASES, CONFIGS, AnchoredProblem, expected_step, step
from tests.helpers.objectives import DOMAINS, EVERYTHING, METHODS

MIXED = [EVERYTHING[:2], EVERYTHING[2:7], EVERYTHING[7:]]
OF_ONE_DOMAIN = [torch.tensor(rows) for rows in ([1, 6, 8], [0, 3], [2, 5], [4, 7, 9, 10])]


@pytest.fixture(scope="module")
def expected():
    found = {}

    def of(name, method):
        if (name, method) not in found:
            found[name, method] = expected_step(name, method)
        return found[name, method]

    return of


# -- the distances -----------------------------------------------------------------------------------------------


def test_the_divergence_is_from_zero_shot_to_the_adapted_model():
    """p = (1/2, 1/2) and q = (1/5, 4/5): KL(p || q) = log(5/4), and KL(q || p) would be another number."""
    reference = torch.zeros(1, 2, dtype=torch.float64)
    logits = torch.tensor([[0.0, math.log(4.0)]], dtype=torch.float64, requires_grad=True)
    found = kl_to_reference(logits, reference)
    assert found.item() == pytest.approx(math.log(5 / 4), abs=1e-15)
    found.sum().backward()
    assert (logits.grad - torch.tensor([[-0.3, 0.3]], dtype=torch.float64)).abs().max() < 1e-15, "q - p"
    assert kl_to_reference(logits + 7, reference - 3).item() == pytest.approx(math.log(5 / 4), abs=1e-14)


def test_the_divergence_is_torchs_and_promptsrcs():
    """PromptSRC's code divides the sum by samples and classes."""
    torch.manual_seed(0)
    logits, reference = 30 * torch.randn(2, 7, 5, dtype=torch.float64)
    published = nn.functional.kl_div(
        logits.log_softmax(1), reference.log_softmax(1), reduction="sum", log_target=True
    ) / (7 * 5)
    assert kl_to_reference(logits, reference).mean().item() / 5 == pytest.approx(published.item(), rel=1e-14)


def test_a_certain_reference_is_finite():
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)
    found = kl_to_reference(logits, torch.tensor([[500.0, 0.0]]))
    found.sum().backward()
    assert found.item() == 300.0
    assert logits.grad.tolist() == [[-1.0, 1.0]]


def test_distances_of_two_vectors():
    a, b = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert l1_distance(a, b).tolist() == pytest.approx([0.6, 1.0])
    assert squared_distance(a, b).tolist() == pytest.approx([0.8, 2.0])
    assert cosine_distance(a, b).tolist() == pytest.approx([0.4, 1.0])
    assert l1_to_reference(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 2.0, 1.0]])).tolist() == [1.0]
    start = [torch.tensor([1.0, 2.0]), torch.tensor([[0.0]])]
    assert l2_sp([torch.tensor([2.0, 0.0]), torch.tensor([[4.0]])], start).item() == 0.5 * (1 + 4 + 16)


# -- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_step_is_the_one_of_the_definition(expected, name, method):
    gradients, objective, loss = expected(name, method)
    found, report = step(name, method, EVERYTHING)
    assert (found - gradients).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(objective, abs=1e-12)
    assert report.loss.item() == pytest.approx(loss, abs=1e-12), "records compare methods by the plain cross entropy"
    assert objective > loss + 1e-2 and bool(report.is_finite)


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("mode", ["auto", pytest.param("two_phase", marks=pytest.mark.slow), "per_domain"])
@pytest.mark.parametrize("micro_batches", [MIXED, OF_ONE_DOMAIN], ids=["mixed", "of one domain"])
def test_micro_batches_give_the_same_step(expected, name, method, mode, micro_batches):
    sums_of_outputs = any(isinstance(anchor, BaseModelAnchorConfig) for anchor in CONFIGS[name].anchors)
    if mode == "per_domain" and (micro_batches is MIXED or sums_of_outputs):
        with pytest.raises(ValueError, match="mode='per_domain' is not possible"):
            step(name, method, micro_batches, mode=mode)
        return
    found, report = step(name, method, micro_batches, mode=mode)
    gradients, objective, loss = expected(name, method)
    assert (found - gradients).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(objective, abs=1e-12)
    assert report.loss.item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("mode", ["auto", pytest.param("two_phase", marks=pytest.mark.slow)])
def test_masked_samples_count_nowhere(expected, name, method, mode):
    """Padding of a domain that is there and of one that nobody else has, in a micro-batch and as one of its own."""
    problem = AnchoredProblem()
    problem.x = torch.cat([problem.x, torch.full((2, 6), 1e3, dtype=torch.float64)])
    problem.y = torch.cat([problem.y, problem.y[:2]])
    of = problem.reference
    logits_BC, features_BE = (torch.cat([tensor, tensor[:2] + 1]) for tensor in (of.logits_BC, of.features_BE))
    problem.reference = Reference(logits_BC, features_BE, of.class_features_CE)
    objective, domains = problem.started(CONFIGS[name]), torch.cat([DOMAINS, torch.tensor([1, 3])])
    rows = [torch.cat([MIXED[0], torch.tensor([11])]), *MIXED[1:], torch.tensor([12])]
    problem.disam(method, num_domains=5).backward_accumulated(
        [problem.call(objective, some) for some in rows],
        [domains[some] for some in rows],
        [torch.tensor([True, True, False]), None, None, torch.tensor([False])],
        mode=mode,
        objective=objective,
    )
    assert (problem.gradients() - expected(name, method)[0]).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("name", "method", "forwards"),
    [
        ("kl", "sam", 3 + 3),
        ("class squared", "erm", 3),
        ("class not climbed", "sam", 3 + 3),
        ("weights", "sam", 3 + 3),
        ("weights", "disam", (3 + 2) + 3),  # the variance waits for all losses; pass 2 does not
    ],
)
def test_a_distance_of_the_model_costs_no_forward_pass(name, method, forwards):
    problem, calls = AnchoredProblem(), []
    problem.body.register_forward_hook(lambda *_: calls.append(1))
    problem.step(problem.started(CONFIGS[name]), method, MIXED)
    assert len(calls) == forwards


def test_what_is_not_climbed_leaves_the_perturbation_alone():
    plain = AnchoredProblem()
    norm = plain.step(Objective(), "disam", EVERYTHING)[1].ascent_norm.item()
    for name in ("class not climbed", "weights not climbed"):
        assert step(name, "disam", EVERYTHING)[1].ascent_norm.item() == pytest.approx(norm, abs=1e-14)
    assert abs(step("weights", "disam", EVERYTHING)[1].ascent_norm.item() - norm) > 1e-2


def test_a_distance_that_is_not_finite_is_seen():
    problem = AnchoredProblem()
    objective = problem.started(CONFIGS["weights not climbed"])
    state = objective.state_dict()
    state["anchors"]["weights"]["start"][0][0, 0] = math.inf
    objective.load_state_dict(state)
    assert not bool(problem.step(objective, "erm", EVERYTHING)[1].is_finite)


# -- the table, state, and what is said -------------------------------------------------------------------------


def test_the_union_of_configs_is_the_table():
    configs = get_args(get_args(AnchorConfig)[0])
    assert set(configs) == set(ANCHORS) != set()
    for config, anchor in ANCHORS.items():
        assert issubclass(config, BaseAnchorConfig)
        assert isinstance(anchor(config()), ModelAnchor if issubclass(config, BaseModelAnchorConfig) else SampleAnchor)


@pytest.mark.parametrize("config_class", ANCHORS, ids=lambda config: config().kind)
@pytest.mark.parametrize("method", METHODS)
def test_every_anchor_of_the_table_acts_and_is_exact_over_micro_batches(config_class, method):
    """Whatever it is: a new member of the table is driven without a line here."""

    def found(micro_batches, *anchors):
        problem = AnchoredProblem()
        objective = problem.started(ObjectiveConfig(anchors=list(anchors)))
        gradients, report = problem.step(objective, method, micro_batches)
        return gradients, report.objective.item()

    whole, value = found(EVERYTHING, config_class())
    without, plain_value = found(EVERYTHING)
    assert (whole - without).abs().max() > 1e-3 and value > plain_value + 1e-3
    for micro_batches in (MIXED, OF_ONE_DOMAIN):
        gradients, same_value = found(micro_batches, config_class())
        assert (gradients - whole).abs().max() <= 1e-12
        assert same_value == pytest.approx(value, abs=1e-12)


def test_the_defaults_are_the_published_ones():
    assert (LogitsAnchorConfig().weight, LogitsAnchorConfig().distance) == (1.0, "kl")
    assert (ImageFeaturesAnchorConfig().weight, ImageFeaturesAnchorConfig().distance) == (10.0, "l1")
    assert (ClassFeaturesAnchorConfig().weight, ClassFeaturesAnchorConfig().distance) == (8.0, "squared")
    assert WeightsAnchorConfig().weight == 0.1
    assert not ObjectiveConfig(anchors=[LogitsAnchorConfig()]).is_plain_mean


def test_the_start_is_state_and_comes_back_to_the_bit():
    problem = AnchoredProblem()
    objective = problem.started(CONFIGS["all and vrex"])
    wanted, _ = problem.step(objective, "disam", MIXED)

    resumed, other = Objective(CONFIGS["all and vrex"]), AnchoredProblem()
    resumed.remember_start(other.params)  # of a fresh model, or one that has trained: not where the run started
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(other.step(resumed, "disam", MIXED)[0], wanted)
    with pytest.raises(UserError, match="its anchors differ"):
        Objective().load_state_dict(objective.state_dict() | {"penalties": {}})


def test_the_state_of_an_objective_that_knew_no_anchors_is_taken():
    Objective().load_state_dict({"steps_begun": 3, "penalties": {}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LogitsAnchorConfig(), "needs the outputs of zero-shot classification"),
        (WeightsAnchorConfig(), "does not know where the trained tensors started"),
    ],
)
def test_what_a_loop_of_ones_own_leaves_out_is_named(config, message):
    problem = AnchoredProblem()
    objective = Objective(ObjectiveConfig(anchors=[config]))
    with pytest.raises(ValueError, match=message):
        problem.disam("sam").backward(
            lambda: objective.forward(problem.head(problem.body(problem.x)), problem.y), DOMAINS, objective=objective
        )


@pytest.mark.parametrize("frozen", [{"image_features"}, {"class_features"}, {"image_features", "class_features"}])
def test_an_anchor_of_what_is_frozen_is_named_once(frozen):
    problem = AnchoredProblem()
    objective = problem.started(ObjectiveConfig(anchors=[ImageFeaturesAnchorConfig(), ClassFeaturesAnchorConfig()]))

    def call():
        features = nn.functional.normalize(problem.body(problem.x), dim=1)
        classes = nn.functional.normalize(problem.head.weight, dim=1)
        return objective.forward(
            problem.head(features),
            problem.y,
            features.detach() if "image_features" in frozen else features,
            class_features_CE=classes.detach() if "class_features" in frozen else classes,
            reference=problem.reference,
        )

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            problem.disam("sam").backward(call, DOMAINS, objective=objective)
    told = [str(warning.message) for warning in found]
    assert len(told) == len(frozen)
    assert all(
        any(f"the anchor {kind!r} depends on nothing that is trained" in text for text in told) for kind in frozen
    )
