"""State per domain: ids that come and go, what is not finite, what comes back from a checkpoint."""

import math

import pytest
import torch

from disam_peft import DISAM
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import FishrConfig, GroupDROConfig
from disam_peft.errors import UserError
from disam_peft.objectives.domain_state import DomainState
from disam_peft.objectives.fishr import Fishr
from disam_peft.objectives.group_dro import GroupDRO, group_dro, group_dro_sagawa
from disam_peft.objectives.objective import Objective
from tests.helpers.objectives import DOMAINS, EVERYTHING, METHODS, OBJECTIVES, Problem


def ids(*values):
    return torch.tensor(values)


def rows(*values):
    return torch.tensor([[value] for value in values], dtype=torch.float64)


def test_new_ids_find_their_place_and_old_ones_keep_theirs():
    state = DomainState()
    state.bring_into_play(ids(3, 9), rows(1, 2))
    assert state.value_D.tolist() == [[1], [2]]
    state.value_A = rows(10, 20)
    state.bring_into_play(ids(0, 5, 9), rows(7, 8, 0))
    assert state.value_D.tolist() == [[7], [8], [20]], "9 is known already"
    assert state.value_A.tolist() == [[7], [10], [8], [20]], "3 is not in play, and keeps its value"
    assert state.among_all(rows(1, 2, 3)).tolist() == [[1], [0], [2], [3]]
    again = DomainState()
    again.load_state_dict(state.state_dict())
    again.bring_into_play(ids(3, 4), rows(0, 6))
    assert again.value_D.tolist() == [[10], [6]]
    assert again.value_A.tolist() == [[7], [10], [6], [8], [20]]
    assert DomainState().state_dict() == {}


def test_the_same_ids_are_not_looked_at_again(monkeypatch):
    """Comparing them would wait for the device. A run that says how many domains there are has one tensor of ids."""
    from disam_peft.disam.domain_sums import domain_index

    domains, state = torch.tensor([0, 1, 1]), DomainState()
    state.bring_into_play(domain_index(domains, 3)[0], rows(1, 2, 3))
    monkeypatch.setattr(torch, "isin", lambda *_: pytest.fail("looked at"))
    monkeypatch.setattr(torch, "searchsorted", lambda *_: pytest.fail("looked at"))
    state.bring_into_play(domain_index(domains[:1], 3)[0], rows(0, 0, 0))
    assert state.value_D.tolist() == [[1], [2], [3]]


# -- GroupDRO --------------------------------------------------------------------------------------------------


def losses_step(objective, losses, domains, **options):
    w = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    report = DISAM([w], rho=0.0, **options).backward(lambda: w * 1.0, torch.tensor(domains), objective=objective)
    return w.grad, report


def groupdro(**settings):
    objective = Objective(ObjectiveConfig(penalties=[GroupDROConfig(**settings)]))
    return objective, objective.penalties[0]


@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("num_domains", [None, 15])
def test_a_domain_that_the_batch_lacks_keeps_its_q(gap, num_domains):
    """By hand: two steps with domains 0 and 1 of 3, then one with all of them. The ids may have gaps."""
    objective, _ = groupdro(eta=math.log(2.0))
    options = {"num_domains": num_domains}
    if num_domains is None:  # all three are there once, with equal losses, or the third would not be known
        losses_step(objective, [1.0, 1.0, 1.0], [0, gap, 2 * gap], **options)
    for q0, q1 in ((2 / 3, 1 / 3), (4 / 5, 1 / 5)):  # 2^1 : 2^0, and again
        gradient, report = losses_step(objective, [1.0, 0.0], [0, gap], **options)
        assert gradient.tolist() == pytest.approx([q0, q1]), "those of the batch sum to one"
        assert report.objective.item() == pytest.approx(q0)
    gradient, _ = losses_step(objective, [0.0, 0.0, 0.0], [0, gap, 2 * gap], **options)
    assert gradient.tolist() == pytest.approx([2 / 3 * 4 / 5, 2 / 3 * 1 / 5, 1 / 3])


def test_sagawa_lets_absent_groups_take_part():
    """Of three groups two are there: q is 2 : 1 : 1 over four, and a fourth id of a held-out domain is no group."""
    objective, penalty = groupdro(eta=math.log(2.0), variant="sagawa")
    objective.prepare(torch.tensor([5, 5, 5, 0]))
    gradient, _ = losses_step(objective, [1.0, 0.0], [0, 1], num_domains=4)
    assert gradient.tolist() == pytest.approx([1 / 2, 1 / 4])
    assert isinstance(penalty, GroupDRO)
    assert penalty.q_D.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4, 0])


def test_with_a_share_the_mean_stays_in_the_objective():
    objective, _ = groupdro(eta=math.log(2.0), weight=0.25)
    gradient, report = losses_step(objective, [1.0, 0.0, 0.0, 0.0], [0, 1, 1, 1])
    assert gradient.tolist() == pytest.approx([3 / 16 + 1 / 6, *[3 / 16 + 1 / 36] * 3])
    assert report.objective.item() == pytest.approx(3 / 16 + 1 / 6)


def test_no_loss_is_too_large_and_no_q_too_small():
    objective, penalty = groupdro(eta=1.0)
    for _ in range(2):
        gradient, _ = losses_step(objective, [5000.0, 0.0], [0, 1])
        assert gradient.tolist() == [1.0, 0.0]
    for _ in range(3):
        gradient, _ = losses_step(objective, [0.0, 5000.0], [0, 1])
    assert gradient.tolist() == [0.0, 1.0], "what has fallen to e^-10000 can rise again"
    assert torch.isfinite(penalty.q_D).all()


@pytest.mark.parametrize("eta", [0.01, 1e308])
def test_q_is_not_spoiled_by_what_moves_it(eta):
    """A model that is sure of all its answers has losses of exactly 0 in float32, whose sum divides nothing; and a step
    size may be too large for any number. Neither may be NaN in every later step."""
    labels, domains = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    sure = 200 * torch.nn.functional.one_hot(labels, 2).float() if eta < 1 else 30.0 * torch.arange(8).view(4, 2)
    q = torch.tensor([0.25, 0.75], dtype=torch.float64)
    loss, found = group_dro_sagawa(sure, labels, domains, q, eta=eta, normalize_loss=eta < 1)
    assert found.tolist() == pytest.approx(q.tolist())
    assert bool(torch.isfinite(loss))


def test_the_function_keeps_absent_domains_too():
    logits, labels = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    loss, q = group_dro(logits, labels, torch.tensor([4, 9]), torch.tensor([2.0, 1.0, 1.0]), ids=[4, 6, 9])
    assert q.tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert loss.item() == pytest.approx(math.log(3))


def test_settings_of_the_other_variant_are_refused():
    with pytest.raises(ValueError, match=r"belong to the variant 'sagawa', and this is 'domainbed'"):
        GroupDROConfig(adjustment=1.0)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        GroupDROConfig(weight=1.5)


# -- Fishr, and both ---------------------------------------------------------------------------------------------


def test_fishr_moves_once_a_step_by_pass_one_and_both_passes_see_the_past():
    """The gradient of SAM in step 2, from the definition at w and at w + e with the average of step 1."""
    objective, problem = OBJECTIVES["fishr"](), Problem()
    problem.step(objective, "sam", EVERYTHING)

    def variances():
        features = problem.body(problem.x)
        logits = problem.head(features)
        residual = logits.softmax(1) - torch.nn.functional.one_hot(problem.y, 4)
        gradients = residual[:, :, None] * features[:, None, :]
        of_domains = [gradients[d == DOMAINS].var(dim=0, correction=0) for d in range(3)]
        return torch.stack(of_domains), torch.nn.functional.cross_entropy(logits, problem.y)

    def objective_value(past):
        found, loss = variances()
        u = past + found  # ema 0.5: e / (1 - ema) of the past
        return loss + 40.0 * (u - u.mean(0)).square().mean()

    with torch.no_grad():
        past = 0.5 * variances()[0]
    assert (objective.penalties[0].average_DCF - past).abs().max() <= 1e-14
    value = objective_value(past)
    ascent = torch.autograd.grad(value, problem.params)
    norm = torch.cat([g.reshape(-1) for g in ascent]).norm()
    start = [p.detach().clone() for p in problem.params]
    with torch.no_grad():
        for p, g in zip(problem.params, ascent, strict=True):
            p.add_(0.3 * g / norm)
    wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective_value(past), problem.params)])
    with torch.no_grad():
        for p, w in zip(problem.params, start, strict=True):
            p.copy_(w)
    found, report = problem.step(objective, "sam", EVERYTHING)
    assert (found - wanted).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(value.item(), abs=1e-12)
    assert (objective.penalties[0].average_DCF - 1.5 * past).abs().max() <= 1e-14


def test_fishr_takes_its_averages_before_the_weight_rises():
    config = FishrConfig(weight=40.0, anneal=2, ema=0.5)
    late = Objective(ObjectiveConfig(penalties=[config]))
    at_once = Objective(ObjectiveConfig(penalties=[config.model_copy(update={"anneal": 0})]))
    problem, plain = Problem(), Problem().step(Objective(), "sam", EVERYTHING)[0]
    for step in range(4):
        found, wanted = (problem.step(objective, "sam", EVERYTHING)[0] for objective in (late, at_once))
        assert torch.equal(found, plain if step < 2 else wanted)
        if step >= 2:
            assert (found - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["fishr", "groupdro", "groupdro sagawa"])
def test_state_is_not_spoiled_and_comes_back(name):
    objective, problem = OBJECTIVES[name](), Problem()
    problem.step(objective, "disam", EVERYTHING)
    before = {key: value.clone() for key, value in objective.penalties[0].state_dict().items()}
    assert before
    kept = problem.x.clone()
    problem.x[0] = torch.nan
    _, report = problem.step(objective, "disam", EVERYTHING)
    assert not bool(report.is_finite)
    for key, value in objective.penalties[0].state_dict().items():
        assert torch.equal(value, before[key])
    problem.x = kept
    resumed = OBJECTIVES[name]()
    resumed.load_state_dict(objective.state_dict())
    for method in METHODS:
        assert torch.equal(problem.step(resumed, method, EVERYTHING)[0], problem.step(objective, method, EVERYTHING)[0])
    assert torch.equal(resumed.penalties[0].state_dict()["values"], objective.penalties[0].state_dict()["values"]), (
        "after three steps"
    )


def test_state_of_a_batch_without_a_domain_is_that_of_its_ids():
    """With the number of domains said, and with ids that come and go: the same steps."""
    some = torch.tensor([0, 3, 4, 2, 5])  # none of domain 1
    for name in ("fishr", "groupdro"):
        known, unknown = OBJECTIVES[name](), OBJECTIVES[name]()
        for of in (EVERYTHING, some, some, EVERYTHING):
            problem = Problem()
            wanted, _ = problem.step(known, "disam", of, num_domains=3)
            found, _ = problem.step(unknown, "disam", of)
            assert (found - wanted).abs().max() <= 1e-12


def test_the_state_of_another_penalty_is_refused():
    with pytest.raises(UserError, match=r"its penalties differ \(here \['Fishr'\]; saved \['GroupDRO'\]\)"):
        OBJECTIVES["fishr"]().load_state_dict(OBJECTIVES["groupdro"]().state_dict())
    assert Fishr(FishrConfig()).state_dict() == {}
