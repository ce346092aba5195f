"""What every objective must do: values and gradients by their definitions, however the batch is divided."""

import math
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import pytest
import torch
from torch import nn

from disam_peft.common.random import keyed_uniforms
from disam_peft.config.losses import CrossEntropyConfig, LossConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import BasePenaltyConfig, GroupDROConfig, PenaltyConfig, VRexConfig
from disam_peft.disam.domain_objective import DomainsOfSamples, Forward
from disam_peft.errors import UserError
from disam_peft.objectives.base import Penalty, domain_mean_weights
from disam_peft.objectives.coral import Coral
from disam_peft.objectives.group_dro import GroupDRO
from disam_peft.objectives.mmd import GAMMAS
from disam_peft.objectives.objective import LOSSES, PENALTIES, Objective
from disam_peft.objectives.run_objective import build_objective
from tests.helpers.objectives import (
    CASES,
    DOMAINS,
    EVERYTHING,
    METHODS,
    OBJECTIVES,
    SCALE,
    TEMPLATES,
    TRAIN_COUNTS,
    Problem,
    coral_objective,
    weights_of_classes,
)

MIXED = [EVERYTHING[:2], EVERYTHING[2:7], EVERYTHING[7:]]
OF_ONE_DOMAIN = [torch.tensor(rows) for rows in ([1, 6, 8], [0, 3], [2, 5], [4, 7, 9, 10])]


def members(union):
    """The config classes of a union, or the one class that stands for a union of one."""
    union = get_args(union)[0] if get_origin(union) is Annotated else union
    return set(get_args(union)) if get_origin(union) in (Union, UnionType) else {union}


def test_the_unions_of_configs_are_the_tables():
    assert members(LossConfig) == set(LOSSES) != set()
    assert members(PenaltyConfig) == set(PENALTIES) != set()
    for config, penalty in PENALTIES.items():
        assert issubclass(config, BasePenaltyConfig)
        assert isinstance(penalty(config()), Penalty)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config_class", PENALTIES, ids=lambda config: config().kind)
def test_every_penalty_of_the_table_acts_and_is_exact_over_micro_batches(config_class, method):
    """Whatever it is: a new member of the table is driven without a line here. Its values are its own test's."""

    def step(micro_batches, *penalties):
        objective = Objective(ObjectiveConfig(penalties=list(penalties), mean_over="domains"))
        gradients, report = Problem().step(objective, method, micro_batches)
        return gradients, report.objective.item()

    without, plain_value = step(EVERYTHING)
    for config in (config_class(), config_class(anneal=0, weight=1.0)):
        if config.anneal > 0 and config.weight_before_anneal == 0:
            continue
        whole, value = step(EVERYTHING, config)
        assert (whole - without).abs().max() > 1e-6 and abs(value - plain_value) > 1e-6
        for micro_batches in (MIXED, OF_ONE_DOMAIN):
            gradients, same_value = step(micro_batches, config)
            assert (gradients - whole).abs().max() <= 1e-12
            assert same_value == pytest.approx(value, abs=1e-12)


PAIRS = [(0, 1), (0, 2), (1, 2)]


def coral_of(groups):
    means = [(groups[a].mean(0) - groups[b].mean(0)).square().mean() for a, b in PAIRS]
    covariances = [(groups[a].T.cov() - groups[b].T.cov()).square().mean() for a, b in PAIRS]
    return (sum(means) + sum(covariances)) / 3


def mmd_of(groups):
    def kernel(x, y):
        distance = (x[:, None] - y[None]).square().sum(-1)
        return sum(torch.exp(-gamma * distance) for gamma in GAMMAS).mean()

    return sum(kernel(groups[a], groups[a]) + kernel(groups[b], groups[b]) for a, b in PAIRS) / 3 - 2 / 3 * sum(
        kernel(groups[a], groups[b]) for a, b in PAIRS
    )


def irm_of(logits, labels, *, halves):
    """Gradients by a factor of the logits, from autograd: over all rows of a domain or over its even and odd ones."""

    def by_scale(rows):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = nn.functional.cross_entropy(logits[rows] * scale, labels[rows])
        return torch.autograd.grad(loss, scale, create_graph=True)[0]

    rows_of = [torch.eq(DOMAINS, d).nonzero()[:, 0] for d in range(3)]
    if not halves:
        return sum(by_scale(rows).square() for rows in rows_of) / 3
    return sum(by_scale(rows[::2]) * by_scale(rows[1::2]) for rows in rows_of) / 3


def fishr_of(features, logits, labels):
    """From one gradient for each sample, in the first step."""
    residual = logits.softmax(1) - nn.functional.one_hot(labels, logits.shape[1])
    gradients = residual[:, :, None] * features[:, None, :]
    variances = torch.stack([gradients[d == DOMAINS].var(dim=0, correction=0) for d in range(3)])
    return (variances - variances.mean(0)).square().mean()


def penalties_of(problem, name, features, logits, mean, mean_K, q_K, *, climbed):
    """The sum of weight * penalty of a case, by the definitions."""
    groups = [features[d == DOMAINS] for d in range(3)]
    if name.startswith("vrex"):
        return 3.0 * mean_K.var(correction=0)
    if name.startswith("coral"):
        return 0.7 * coral_of(groups)
    if name == "mmd":
        return 0.7 * mmd_of(groups)
    if name.startswith("irm"):
        return 3.0 * irm_of(logits, problem.y, halves=name == "irm")
    if name.startswith("fishr"):
        return 40.0 * fishr_of(features, logits, problem.y)
    if name == "groupdro sagawa":
        return (q_K * mean_K).sum() - mean
    if name.startswith("groupdro"):
        return 0.7 * ((q_K * mean_K).sum() - mean)
    if name == "several":
        climbs = 0.7 * coral_of(groups) + 3.0 * irm_of(logits, problem.y, halves=True)
        climbs = climbs + 0.7 * ((q_K * mean_K).sum() - mean)
        return climbs if climbed else climbs + 0.3 * mmd_of(groups)
    return 0.0


def losses_by_definition(problem, name, features, logits):
    """The losses of a case (B,), and what belongs to the whole batch beside their mean."""
    labels, none = problem.y, logits.new_zeros(())
    if name == "weighed focal":
        p_B = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return weights_of_classes()[labels] * (1 - p_B) ** 2 * -p_B.log(), none
    if name == "margin softmax":
        text = problem.class_features()[0]
        logits = logits - 0.4 * SCALE * text[labels] @ text.T
        return nn.functional.cross_entropy(logits, labels, reduction="none"), none
    if name == "sigmoid":
        sign = 2 * nn.functional.one_hot(labels, 4) - 1
        centred = logits - logits.mean(1, keepdim=True) - math.log(3)
        return -(sign * centred).sigmoid().log().sum(1), none
    if "contrastive" in name:
        # one caption for each image, drawn by seed, step and place; CLIP's loss in both directions
        drawn = torch.from_numpy(keyed_uniforms(len(labels), 5, "captions", 0) * TEMPLATES).long()
        pairs_BB = SCALE * features @ problem.class_features()[1][labels * TEMPLATES + drawn].T
        true_B = pairs_BB.diagonal()
        return (pairs_BB.logsumexp(1) - true_B) / 2, (pairs_BB.logsumexp(0) - true_B).mean() / 2
    smoothing = 0.2 if name in ("label smoothing", "vrex over samples") else 0.0
    return nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing), none


def definition(problem, name, q_K=None, *, climbed):
    """The objective of a case on the whole batch, with a graph, from its definition: (objective, losses (B,))."""
    features = problem.body(problem.x)
    logits = problem.head(features)
    loss_B, of_batch = losses_by_definition(problem, name, features, logits)
    mean_K = torch.stack([loss_B[d == DOMAINS].mean() for d in range(3)])
    averages_domains = name.startswith(("vrex", "coral", "mmd", "irm")) and "samples" not in name
    value = mean_K.mean() if averages_domains or name == "mean over domains" else loss_B.mean()
    value = value + of_batch
    if not (climbed and "not climbed" in name):
        value = value + penalties_of(problem, name, features, logits, value, mean_K, q_K, climbed=climbed)
    return value, loss_B


def q_of(name, mean_K):
    """q after the first step, from the losses at w."""
    if name == "groupdro sagawa":
        mean_K = mean_K + 2.0 / TRAIN_COUNTS.double().sqrt()
        mean_K = mean_K / mean_K.sum()
    return (0.5 * mean_K).exp() / (0.5 * mean_K).exp().sum()


def expected_step(name, method):
    """(gradients, objective at w, plain cross entropy at w) of one step by autograd through the definitions."""
    problem, (rho, variance_weight) = Problem(), METHODS[method]
    params = problem.params
    with torch.no_grad():
        _, loss_B = definition(problem, "mean over samples", climbed=False)
        mean_K = torch.stack([loss_B[d == DOMAINS].mean() for d in range(3)])
    q_K = q_of(name, mean_K)
    objective = definition(problem, name, q_K, climbed=False)[0].item()
    if rho > 0:
        value, loss_B = definition(problem, name, q_K, climbed=True)
        per_domain_K = torch.stack([loss_B[d == DOMAINS].mean() for d in range(3)])
        value = value - variance_weight * per_domain_K.var(correction=0)
        ascent = torch.autograd.grad(value, params)
        norm = torch.cat([g.reshape(-1) for g in ascent]).norm()
        with torch.no_grad():
            for p, g in zip(params, ascent, strict=True):
                p.add_(rho * g / norm)
    gradients = torch.autograd.grad(definition(problem, name, q_K, climbed=False)[0], params)
    return torch.cat([g.reshape(-1) for g in gradients]), objective, mean_K[DOMAINS].mean().item()


@pytest.fixture(scope="module")
def expected():
    found = {}

    def of(name, method):
        if (name, method) not in found:
            found[name, method] = expected_step(name, method)
        return found[name, method]

    return of


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_step_is_the_one_of_the_definition(expected, name, method):
    gradients, objective, loss = expected(name, method)
    found, report = Problem().step(OBJECTIVES[name](), method, EVERYTHING)
    assert (found - gradients).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(objective, abs=1e-12)
    assert report.loss.item() == pytest.approx(loss, abs=1e-12), "records compare methods by the plain cross entropy"
    assert bool(report.is_finite)
    if name != "mean over samples":
        assert (gradients - expected("mean over samples", method)[0]).abs().max() > 1e-3, "the objective matters"


def test_what_is_not_climbed_is_descended_all_the_same(expected):
    for name in ("vrex", "coral", "fishr", "groupdro"):
        assert torch.equal(expected(name, "erm")[0], expected(f"{name} not climbed", "erm")[0])
        difference = expected(name, "sam")[0] - expected(f"{name} not climbed", "sam")[0]
        assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("mode", ["auto", pytest.param("two_phase", marks=pytest.mark.slow), "per_domain"])
@pytest.mark.parametrize("micro_batches", [MIXED, OF_ONE_DOMAIN, [EVERYTHING]], ids=["mixed", "of one domain", "one"])
def test_micro_batches_give_the_same_step(expected, name, method, mode, micro_batches):
    objective = OBJECTIVES[name]()
    if mode == "per_domain" and (micro_batches is not OF_ONE_DOMAIN or objective.has_statistics):
        with pytest.raises(ValueError, match="mode='per_domain' is not possible"):
            Problem().step(objective, method, micro_batches, mode)
        return
    found, report = Problem().step(objective, method, micro_batches, mode)
    gradients, value, loss = expected(name, method)
    assert (found - gradients).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(value, abs=1e-12)
    assert report.loss.item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("mode", ["auto", pytest.param("two_phase", marks=pytest.mark.slow)])
def test_masked_samples_count_nowhere(expected, name, method, mode):
    """Padding of a domain that is there and of one that nobody else has, in a micro-batch and as one of its own."""
    problem = Problem()
    problem.x = torch.cat([problem.x, torch.full((2, 6), 1e3, dtype=torch.float64)])
    problem.y = torch.cat([problem.y, problem.y[:2]])
    objective, domains = OBJECTIVES[name](), torch.cat([DOMAINS, torch.tensor([1, 3])])
    rows = [torch.cat([MIXED[0], torch.tensor([11])]), *MIXED[1:], torch.tensor([12])]
    masks = [torch.tensor([True, True, False]), None, None, torch.tensor([False])]
    problem.begin(objective, rows, masks)
    problem.disam(method, num_domains=5).backward_accumulated(
        [problem.call(objective, of) for of in rows],
        [domains[of] for of in rows],
        masks,
        mode=mode,
        objective=objective,
    )
    assert (problem.gradients() - expected(name, method)[0]).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("name", "method", "forwards"),
    [
        ("mean over domains", "sam", {1: 2, 3: 3 + 3}),  # a mean, whose weights follow from the counts
        ("vrex", "erm", {1: 1, 3: 3 + 2}),
        ("vrex", "disam", {1: 2, 3: 2 * (3 + 2)}),
        ("vrex not climbed", "sam", {1: 2, 3: 3 + (3 + 2)}),
        ("coral", "disam", {1: 2, 3: 2 * (3 + 2)}),
    ],
)
def test_the_number_of_forward_passes(name, method, forwards):
    for count, expected_calls in forwards.items():
        problem, calls = Problem(), []
        problem.body.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        problem.step(OBJECTIVES[name](), method, MIXED if count == 3 else [EVERYTHING])
        assert len(calls) == expected_calls, (count, name, method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_default_is_the_plain_mean_bit_for_bit(dtype, method):
    problem = Problem(dtype)
    plain = problem.disam(method).backward(problem.losses, DOMAINS)
    wanted = problem.gradients()
    found, report = problem.step(Objective(), method, EVERYTHING)
    assert torch.equal(found, wanted)
    for name, value in vars(plain).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(report, name), value), name
    assert torch.equal(report.objective, report.loss)


def test_a_loop_of_ones_own_needs_losses_alone(expected):
    """V-REx on ``lambda: losses``: an objective of the losses asks for nothing else."""
    problem = Problem()
    problem.disam("sam").backward(problem.losses, DOMAINS, objective=OBJECTIVES["vrex"]())
    assert (problem.gradients() - expected("vrex", "sam")[0]).abs().max() <= 1e-12
    with pytest.raises(ValueError, match="needs outputs of the model beside the losses"):
        problem.disam("sam").backward(problem.losses, DOMAINS, objective=coral_objective())


# -- state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "two_phase", "per_domain"])
def test_state_moves_once_a_step_and_goes_on_where_it_was(mode):
    def penalty_after(steps, objective):
        problem = Problem()
        for _ in range(steps):
            gradients, _ = problem.step(objective, "disam", OF_ONE_DOMAIN, mode)
        return gradients, objective.penalties[0].q_D

    build = OBJECTIVES["groupdro"]
    gradients, q_D = penalty_after(3, build())
    assert q_D.sum().item() == pytest.approx(1.0)
    once = penalty_after(1, build())[1]
    assert (q_D - once).abs().max() > 1e-3, "it does move"
    problem = Problem()
    with torch.no_grad():
        loss_B = problem.losses()
    grown = torch.stack([(0.5 * loss_B[d == DOMAINS].mean()).exp() for d in range(3)])
    assert (once - grown / grown.sum()).abs().max() <= 1e-12, "by the losses of pass 1, once"
    before = build()
    penalty_after(2, before)
    resumed = build()
    resumed.load_state_dict(before.state_dict())
    found = penalty_after(1, resumed)
    assert torch.equal(found[0], gradients)
    assert torch.equal(found[1], q_D)


def test_state_is_not_spoiled_by_losses_that_are_not_finite():
    objective = OBJECTIVES["groupdro"]()
    problem = Problem()
    problem.step(objective, "sam", EVERYTHING)
    q_D = objective.penalties[0].q_D.clone()
    problem.x[0] = torch.inf
    _, report = problem.step(objective, "sam", EVERYTHING)
    assert not bool(report.is_finite)
    assert torch.equal(objective.penalties[0].q_D, q_D)


def test_the_state_of_other_penalties_is_refused():
    with pytest.raises(UserError, match=r"its penalties differ \(here \['GroupDRO'\]; saved \['VRex'\]\)"):
        OBJECTIVES["groupdro"]().load_state_dict(OBJECTIVES["vrex"]().state_dict())


def test_a_penalty_that_is_not_finite_is_reported():
    """Finite losses, and features that are not: the step must not be taken."""
    problem, objective = Problem(), coral_objective()

    def call():
        features = problem.body(problem.x)
        return objective.forward(problem.head(features), problem.y, features * torch.inf)

    for method in METHODS:
        report = problem.disam(method).backward(call, DOMAINS, objective=objective)
        assert bool(torch.isfinite(report.loss))
        assert not bool(report.is_finite), method


def test_penalties_that_do_not_keep_their_word():
    class OneTooFew(Coral):
        num_statistics = 3

    class NotPerSample(Coral):
        def statistics(self, outputs, domains):
            return domains.sums(outputs.features.mean(dim=0)), domains.outer_sums(outputs.features)

    for penalty, message in (
        (OneTooFew, "gave 2 tensors, but num_statistics is 3"),
        (NotPerSample, "its first dimens"),
    ):
        objective = Objective(penalties=[penalty(BasePenaltyConfig())])
        with pytest.raises(ValueError, match=message):
            Problem().step(objective, "sam", EVERYTHING)


def test_a_constant_penalty_changes_nothing_but_the_value(expected):
    class Constant(Penalty):
        def value(self, sums):
            return sums.count_D.sum() * 0 + 2.0

    found, report = Problem().step(Objective(penalties=[Constant(BasePenaltyConfig(weight=3.0))]), "sam", EVERYTHING)
    gradients, value, _ = expected("mean over samples", "sam")
    assert (found - gradients).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(value + 6.0, abs=1e-12)


class MeanFeature(Penalty):
    """As the documentation of ``objectives/base.py`` writes it."""

    num_statistics = 1

    def statistics(self, outputs, domains):
        return (domains.sums(outputs.features),)

    def value(self, sums):
        (sum_DE,) = sums.statistics
        mean_DE = sums.mean_of(sum_DE)
        return sums.over_domains(mean_DE.square().sum(dim=1))


def test_several_penalties_see_their_own_sums(expected):
    problem = Problem()
    features = problem.body(problem.x).detach()
    wanted = sum(features[d == DOMAINS].mean(0).square().sum().item() for d in range(3)) / 3
    penalties = [
        MeanFeature(BasePenaltyConfig(weight=2.0)),
        GroupDRO(GroupDROConfig(weight=0.0)),
        Coral(BasePenaltyConfig(weight=0.7)),
    ]
    _, report = problem.step(Objective(ObjectiveConfig(mean_over="domains"), penalties=penalties), "erm", MIXED)
    assert report.objective.item() == pytest.approx(expected("coral", "erm")[1] + 2.0 * wanted, abs=1e-12)


def test_of_several_penalties_some_are_climbed(expected):
    """The perturbation is that of the climbed one alone, and the descent is that of both."""
    settings = ObjectiveConfig(mean_over="domains")

    def norm_and_objective(*penalties):
        report = Problem().step(Objective(settings, penalties=penalties), "sam", EVERYTHING)[1]
        return report.ascent_norm.item(), report.objective.item()

    climbed = MeanFeature(BasePenaltyConfig(weight=2.0))
    alone = norm_and_objective(climbed)
    both = norm_and_objective(climbed, Coral(BasePenaltyConfig(weight=0.7, in_ascent=False)))
    assert both[0] == pytest.approx(alone[0], abs=1e-14)
    assert both[1] > alone[1] + 1e-3
    all_climbed = norm_and_objective(climbed, Coral(BasePenaltyConfig(weight=0.7)))
    assert abs(all_climbed[0] - alone[0]) > 1e-3


def test_sums_are_of_float64_and_skip_what_is_masked():
    """Of float32 features with a large mean a float32 sum of squares would lose the variance."""
    value_BF = 4096.0 + torch.tensor([[0.0, 1.0], [2.0, 1.0], [7.0, 7.0], [1.0, 3.0]])
    mask_B = torch.tensor([True, True, False, True])
    domains = DomainsOfSamples(torch.tensor([0, 0, 0, 2]), 3, mask_B)
    sums, outer = domains.sums(value_BF), domains.outer_sums(value_BF)
    assert sums.dtype == outer.dtype == torch.float64
    assert (sums - 4096 * torch.tensor([[2.0], [0.0], [1.0]])).tolist() == [[2.0, 2.0], [0.0, 0.0], [1.0, 3.0]]
    exact = value_BF[:2].double()
    assert torch.equal(outer[0], exact.T @ exact)
    assert outer[1].abs().max() == 0


def test_weights_of_the_mean_over_domains():
    found = domain_mean_weights(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64))
    assert found.tolist() == [1 / 8, 0.0, 1 / 2]


@pytest.mark.parametrize("micro_batches", [EVERYTHING, MIXED, OF_ONE_DOMAIN], ids=["at once", "mixed", "of one domain"])
@pytest.mark.parametrize("in_ascent", [True, False])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_steps_are_counted_in_every_mode(method, in_ascent, micro_batches):
    config = ObjectiveConfig(penalties=[VRexConfig(weight=5.0, anneal=2, in_ascent=in_ascent)])
    objective = Objective(config)
    found = [Problem().step(objective, method, micro_batches)[1].objective.item() for _ in range(4)]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[2] == pytest.approx(found[3], abs=1e-12)
    assert found[2] > found[1] + 1e-3


# -- what a recipe says ----------------------------------------------------------------------------------------


def test_settings_without_effect_are_named():
    vrex = ObjectiveConfig(penalties=[VRexConfig()])
    with pytest.warns(UserWarning, match=r"there is one source domain \('photo'\)") as found:
        build_objective(vrex, ["photo"], 1000)
    assert len(found) == 1
    with pytest.warns(UserWarning, match=r"weight 1 in the last of train.steps=500 steps, and never weight=10"):
        build_objective(vrex, ["art", "photo"], 500)


@pytest.mark.filterwarnings("error")
def test_settings_with_an_effect_are_not():
    build_objective(ObjectiveConfig(penalties=[VRexConfig()]), ["art", "photo"], 501)
    build_objective(ObjectiveConfig(loss=CrossEntropyConfig(label_smoothing=0.1)), ["photo"], 1)


def test_one_domain_in_a_batch_is_a_mean(expected):
    """The variance over one domain is 0, and so is its gradient."""
    rows = OF_ONE_DOMAIN[0]
    plain, _ = Problem().step(Objective(), "disam", rows)
    found, report = Problem().step(OBJECTIVES["vrex"](), "disam", rows)
    assert (plain - found).abs().max() <= 1e-15
    assert report.objective.item() == pytest.approx(report.loss.item(), abs=1e-15)
    assert not math.isnan(report.ascent_norm.item())


def test_a_forward_reports_other_losses_than_it_descends():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    from disam_peft import DISAM

    report = DISAM([w], 0.0).backward(lambda: Forward(w * 3.0, reported_B=w.detach()), torch.tensor([0, 4]))
    assert w.grad.tolist() == [1.5, 1.5]
    assert (report.loss.item(), report.objective.item()) == (1.5, 4.5)
    assert report.domain_losses.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"shape \(B,\), not \(\)"):
        DISAM([w], 0.0).backward(lambda: Forward(w * 3.0, reported_B=w.sum()), torch.tensor([0, 4]))
