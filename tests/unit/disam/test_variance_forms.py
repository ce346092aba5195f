"""A lambda relative to the loss, and domain weights that are a softmax: values, gradients, and what they equal."""

import math

import pytest
import torch

from disam_peft import DISAM
from disam_peft.disam import ascent_weights, entropic_weights
from tests.helpers.objectives import DOMAINS, EVERYTHING, IN_MICRO_BATCHES, OBJECTIVES, Problem

MEANS = torch.tensor([0.5, 2.0, torch.nan, 1.25], dtype=torch.float64)
COUNTS = torch.tensor([3.0, 1.0, 0.0, 4.0], dtype=torch.float64)
N, K, M = 8.0, 3.0, (3 * 0.5 + 2.0 + 4 * 1.25) / 8


@pytest.mark.parametrize("over", ["domains", "samples"])
def test_a_relative_lambda_is_divided_by_the_mean_loss(over):
    relative = ascent_weights(MEANS, COUNTS, 0.3, variance_over=over, variance_scale="relative")
    assert torch.allclose(relative, ascent_weights(MEANS, COUNTS, 0.3 / M, variance_over=over), rtol=1e-14, atol=0)
    larger = ascent_weights(100 * MEANS, COUNTS, 0.3, variance_over=over, variance_scale="relative")
    assert torch.allclose(larger, relative, rtol=1e-13, atol=0), "it is the same for losses of another size"
    assert (COUNTS * relative).sum().item() == pytest.approx(1, abs=1e-15) and relative[2] == 0


def test_the_relative_weights_are_those_of_the_specification():
    mean = (0.5 + 2.0 + 1.25) / K
    expected = [
        3 / N - 0.6 / K * (0.5 - mean) / M,
        1 / N - 0.6 / K * (2 - mean) / M,
        4 / N - 0.6 / K * (1.25 - mean) / M,
    ]
    found = COUNTS * ascent_weights(MEANS, COUNTS, 0.3, variance_scale="relative")
    assert found[[0, 1, 3]].tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_without_a_positive_mean_loss_there_is_no_variance_term(loss):
    means = torch.tensor([loss, loss], dtype=torch.float64)
    counts = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert ascent_weights(means, counts, 0.5, variance_scale="relative").tolist() == [0.25, 0.25]
    assert entropic_weights(means, counts, 0.5).tolist() == [0.25, 0.25]


def test_entropic_weights_are_a_softmax_of_shares_and_losses():
    tau = 0.7
    raw = [3 / N * math.exp(-tau * 0.5 / M), 1 / N * math.exp(-tau * 2 / M), 4 / N * math.exp(-tau * 1.25 / M)]
    found = COUNTS * entropic_weights(MEANS, COUNTS, tau)
    assert found[[0, 1, 3]].tolist() == pytest.approx([value / sum(raw) for value in raw], rel=1e-14)
    assert found[2] == 0
    assert entropic_weights(MEANS, COUNTS, 0.0).tolist() == [1 / N, 1 / N, 0, 1 / N], "exactly"


@pytest.mark.parametrize("tau", [1.0, 50.0, 1e4])
def test_no_entropic_weight_is_negative_where_those_of_the_variance_are(tau):
    assert (ascent_weights(MEANS, COUNTS, tau / (2 * M)) < 0).any()
    found = COUNTS * entropic_weights(MEANS, COUNTS, tau)
    assert (found >= 0).all() and found.sum().item() == pytest.approx(1, abs=1e-15)


def test_to_second_order_the_entropic_form_is_disam_over_samples():
    """The difference of the weights is of second order in the differences of the losses: halved twice, each time."""
    differences = []
    for size in (0.02, 0.01):
        means = 1.0 + size * torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)
        counts = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)
        mean_loss = float((means * counts).sum() / 8)
        disam = ascent_weights(means, counts, 0.7 / (2 * mean_loss), variance_over="samples")
        differences.append(float((entropic_weights(means, counts, 0.7) - disam).abs().max()))
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.05) and differences[0] < 1e-4


def test_several_models_at_once():
    means = torch.stack([MEANS, MEANS.flip(0)[[3, 1, 2, 0]]])
    tau = torch.tensor([[0.4], [0.0]], dtype=torch.float64)
    for weights in (
        lambda m, t: entropic_weights(m, COUNTS, t),
        lambda m, t: ascent_weights(m, COUNTS, t, variance_scale="relative"),
    ):
        both = weights(means, tau)
        assert torch.equal(both[0], weights(means[0], 0.4)) and torch.equal(both[1], weights(means[1], 0.0))


def by_autograd(name, form, lam):
    """The gradient of the ascent objective, with the batch mean and the softmax taken as numbers."""
    problem = Problem()
    losses, counts = problem.losses(), torch.bincount(DOMAINS).double()
    means = torch.stack([losses[d == DOMAINS].mean() for d in range(3)])
    base = counts / 11 if name == "mean over samples" else torch.full_like(counts, 1 / 3)
    penalty = 3.0 * means.var(correction=0) if "vrex" in name else 0.0
    if form == "relative":
        ascent = (base * means).sum() + penalty - lam / losses.mean().detach() * means.var(correction=0)
    else:
        share = torch.softmax(base.log() - lam * means.detach() / losses.mean().detach(), dim=0)
        ascent = (share * means).sum() + penalty
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(ascent, problem.params)])


@pytest.mark.parametrize("form", ["relative", "entropic"])
@pytest.mark.parametrize("name", ["mean over samples", "mean over domains", "vrex"])
@pytest.mark.parametrize(
    "micro_batches", [EVERYTHING, [*IN_MICRO_BATCHES[0], *IN_MICRO_BATCHES[1]]], ids=["one", "some"]
)
def test_a_step_climbs_the_objective_with_the_term(form, name, micro_batches):
    """Penalties' coefficients are added to weights that are made of the mean alone."""
    wanted = by_autograd(name, form, 0.8)
    problem, seen = Problem(), []
    before = torch.cat([p.detach().reshape(-1) for p in problem.params])
    options = {"variance_scale": "relative"} if form == "relative" else {"variance_form": "entropic"}
    objective = OBJECTIVES[name]()

    def watched(rows):
        call = problem.call(objective, rows)

        def loss():
            seen.append(torch.cat([p.detach().reshape(-1) for p in problem.params]))
            return call()

        return loss

    disam = DISAM(problem.params, 0.3, 0.8, **options)
    if isinstance(micro_batches, torch.Tensor):
        report = disam.backward(watched(micro_batches), DOMAINS, objective=objective)
    else:
        report = disam.backward_accumulated(
            [watched(rows) for rows in micro_batches], [DOMAINS[rows] for rows in micro_batches], objective=objective
        )
    assert (seen[-1] - before - 0.3 * wanted / wanted.norm()).abs().max() <= 1e-14
    assert report.domain_weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_a_loss_that_is_not_finite_is_seen():
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    report = DISAM([w], 0.1, 0.5, variance_form="entropic").backward(
        lambda: w * torch.tensor([1.0, math.inf]), torch.tensor([0, 1])
    )
    assert not bool(report.is_finite) and w.grad.isnan().all() and w.tolist() == [1, 1]
