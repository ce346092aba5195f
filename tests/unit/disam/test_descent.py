"""GSAM and SAGM: the authors' values, and what a step meets: scales, sizes of numbers, missing gradients, groups."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.disam import gsam_gradient, perturbations, sagm_gradient
from tests.helpers import paths

REFERENCE = np.load(paths.REFERENCE / "gsam_sagm.npz")
CASES = json.loads(str(REFERENCE["meta"]))["cases"]
THROUGH_THE_STEP = sorted(name for name, about in CASES.items() if about["variant"] in ("plain", "pass1"))
TOLERANCE = 1e-10


def values_of(case):
    keys = ("init", "X", "Y", "D", "rho", "g1", "g2", "final_grad", "params")
    return {key: torch.from_numpy(REFERENCE[f"{case}/{key}"]) for key in keys}


def network(about, vector):
    inside, hidden, outside = about["layers"]
    model = nn.Sequential(nn.Linear(inside, hidden), nn.Tanh(), nn.Linear(hidden, outside)).double()
    nn.utils.vector_to_parameters(vector, model.parameters())
    return model


def optimizer_of(about, params):
    if about["base"] == "sgd":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.01)


def flat_gradient(params):
    return torch.cat([p.grad.reshape(-1) for p in params])


@pytest.mark.parametrize("case", THROUGH_THE_STEP)
def test_a_step_is_the_authors(case):
    """Through DISAM itself: gradients and weights of six steps."""
    about, values = CASES[case], values_of(case)
    model = network(about, values["init"])
    params = list(model.parameters())
    optimizer = optimizer_of(about, params)
    follows = about["rho_schedule"] == "proportional_to_cosine_lr"
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6) if follows else None
    variance_weight = 0.0 if about["variant"] == "plain" else about["lam"]
    disam = DISAM(
        params, 0.0, variance_weight, about["adaptive"], descent=about["family"], alpha=about["alpha"], num_domains=3
    )
    for step in range(len(values["rho"])):
        x, y, d = (values[key][step] for key in "XYD")
        disam.rho = float(values["rho"][step])
        disam.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y, reduction="none"), d)
        assert (flat_gradient(params) - values["final_grad"][step]).abs().max() <= TOLERANCE
        optimizer.step()
        if schedule is not None:
            schedule.step()
        found = nn.utils.parameters_to_vector(params).detach()
        assert (found - values["params"][step]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_functions_give_the_authors_gradients(case):
    """Also in the variants that a step does not offer, since g1 and g2 are given."""
    about, values = CASES[case], values_of(case)
    for first, second, expected in zip(values["g1"], values["g2"], values["final_grad"], strict=True):
        if about["family"] == "gsam":
            [found] = gsam_gradient([first], [second], about["alpha"])
            parts = gsam_gradient(first.split([20, 39]), second.split([20, 39]), about["alpha"])
            assert (torch.cat(parts) - expected).abs().max() <= TOLERANCE, "one norm over all"
        else:
            [found] = sagm_gradient([first], [second])
        assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", THROUGH_THE_STEP)
def test_the_perturbation_leads_where_the_authors_took_the_second_gradient(case):
    about, values = CASES[case], values_of(case)
    alpha = about["alpha"] if about["family"] == "sagm" else 0.0
    before = [values["init"], *values["params"][:-1]]
    for number, (w, first, second) in enumerate(zip(before, values["g1"], values["g2"], strict=True)):
        rho = float(values["rho"][number])
        [e] = perturbations([w], [first], rho, alpha, adaptive=about["adaptive"])
        model = network(about, w + e)
        x, y = values["X"][number], values["Y"][number]
        found = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        assert (torch.cat([g.reshape(-1) for g in found]) - second).abs().max() <= TOLERANCE


def test_every_case_is_driven():
    assert len(CASES) == 24 and len(THROUGH_THE_STEP) == 20


# -- what a step meets ---------------------------------------------------------------------------------------

DESCENTS = {"gsam": 0.4, "sagm": 0.3}
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 2, 0, 2])
RHO, LAMBDA = 0.2, 0.9


def small():
    """(network, inputs, labels)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(8, 4).double() * (1 + DOMAINS[:, None]), torch.randint(3, (8,))


def step(descent, *, rows=None, mode="auto", masks=None, lam=LAMBDA, domains=DOMAINS, **options):
    """(final gradient, report) of one step; ``rows``: the micro-batches."""
    model, x, y = small()
    disam = DISAM(model.parameters(), RHO, lam, descent=descent, alpha=DESCENTS.get(descent, 0.0), **options)

    def loss(of):
        return lambda: nn.functional.cross_entropy(model(x[of]), y[of], reduction="none")

    if rows is None:
        report = disam.backward(loss(slice(None)), domains, masks)
    else:
        report = disam.backward_accumulated([loss(of) for of in rows], [domains[of] for of in rows], masks, mode=mode)
    return flat_gradient(list(model.parameters())), report


def by_hand(descent, *, lam=LAMBDA, adaptive=False):
    """The same from the formulas, by autograd through the variance."""
    model, x, y = small()
    params, alpha = list(model.parameters()), DESCENTS[descent]

    def gradient(lam):
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        means = torch.stack([losses[d == DOMAINS].mean() for d in range(3)])
        found = torch.autograd.grad(losses.mean() - lam * means.var(correction=0), params)
        return torch.cat([g.reshape(-1) for g in found])

    w, g1 = nn.utils.parameters_to_vector(params).detach(), gradient(lam)
    back = alpha if descent == "sagm" else 0.0
    there = w + ((RHO / (w * g1).norm() - back) * w**2 * g1 if adaptive else (RHO / g1.norm() - back) * g1)
    nn.utils.vector_to_parameters(there, params)
    g2 = gradient(0.0)
    return (g1 + g2) / 2 if descent == "sagm" else g2 - alpha * (g1 - (g1 @ g2) / (g2 @ g2) * g2)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("descent", DESCENTS)
def test_a_step_is_its_formula(descent, adaptive):
    found, report = step(descent, adaptive=adaptive)
    assert (found - by_hand(descent, adaptive=adaptive)).abs().max() <= 1e-14
    assert bool(report.is_finite) and report.mode == "two_phase"
    sam, of_sam = step("sam", adaptive=adaptive)
    assert (found - sam).abs().max() > 1e-3
    assert torch.equal(report.ascent_norm, of_sam.ascent_norm) and torch.equal(report.loss, of_sam.loss)


IN_TWO_PHASES = [torch.tensor([0, 3, 5]), torch.tensor([1]), torch.tensor([2, 4, 6, 7])]
PER_DOMAIN = [torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([2, 6]), torch.tensor([5, 7])]


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize(("mode", "rows"), [("two_phase", IN_TWO_PHASES), ("per_domain", PER_DOMAIN)])
def test_micro_batches_and_masks_equal_the_whole(descent, mode, rows):
    whole, _ = step(descent)
    divided, report = step(descent, rows=rows, mode=mode)
    assert report.mode == mode and (divided - whole).abs().max() <= 1e-14
    masks = [torch.ones(len(of), dtype=torch.bool) for of in rows]
    masks[0][0] = False
    left_out, _ = step(descent, rows=[rows[0][1:], *rows[1:]], mode=mode)
    masked, _ = step(descent, rows=rows, mode=mode, masks=masks)
    assert (masked - left_out).abs().max() <= 1e-14 and (masked - whole).abs().max() > 1e-3


@pytest.mark.parametrize("descent", DESCENTS)
def test_a_loss_scale_changes_nothing_but_the_scale(descent):
    """SAGM goes back along the gradient itself, which is not the scaled one."""
    plain, report = step(descent)
    scaled, of_scaled = step(descent, backward=lambda loss: (4096.0 * loss).backward())
    assert torch.equal(scaled / 4096, plain)
    assert torch.equal(of_scaled.ascent_norm, report.ascent_norm)
    assert torch.equal(of_scaled.perturbed_loss, report.perturbed_loss)


@pytest.mark.parametrize("descent", DESCENTS)
def test_what_equals_other_methods_does_so_bit_for_bit(descent):
    one_domain = torch.zeros_like(DOMAINS)
    assert torch.equal(step(descent, domains=one_domain)[0], step(descent, domains=one_domain, lam=0.0)[0])
    model, x, y = small()
    params = list(model.parameters())
    disam = DISAM(params, 0.0, LAMBDA, descent=descent, alpha=0.3)
    disam.backward(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), DOMAINS)
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="none").mean(), params)
    assert all(torch.allclose(p.grad, g, rtol=0, atol=1e-16) for p, g in zip(params, plain, strict=True)), (
        "rho 0 is ERM"
    )
    disam.rho, disam.alpha = RHO, 0.0
    disam.backward(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), DOMAINS)
    if descent == "gsam":
        assert torch.equal(flat_gradient(params), step("sam")[0]), "alpha 0 is SAM"


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e-19, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("other", [1.0, 1e-30])
def test_products_neither_vanish_nor_overflow_in_float32(size, other):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(40, generator=generator).clamp(-2, 2) * factor for factor in (other, size))
    [found] = gsam_gradient([first], [second], 0.4)
    [exact] = gsam_gradient([first.double()], [second.double()], 0.4)
    largest = float(max(first.abs().max(), second.abs().max()))
    assert ((found.double() - exact) / largest).abs().max() <= 1e-6
    a, b = first.double(), second.double()
    assert torch.allclose(exact, b - 0.4 * (a - (a @ b) / (b @ b) * b), rtol=1e-12, atol=0)


def test_a_second_gradient_of_zero_and_one_that_is_not_finite():
    first = torch.tensor([1.0, -2.0])
    [found] = gsam_gradient([first], [torch.zeros(2)], 0.5)
    assert found.tolist() == [-0.5, 1.0], "all of g1 is orthogonal to it"
    for fault in (math.inf, math.nan):
        [found] = gsam_gradient([first], [torch.tensor([fault, 1.0])], 0.5)
        assert not found.isfinite().any()
        [found] = gsam_gradient([torch.tensor([fault, 1.0])], [first], 0.5)
        assert not found.isfinite().any()


@pytest.mark.parametrize("descent", DESCENTS)
def test_a_parameter_may_have_a_gradient_in_one_pass_or_in_none(descent):
    """The first is in the loss of pass 1 alone, the second in that of pass 2 alone, the third in neither."""
    params = [torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    calls = []

    def loss():
        calls.append(None)
        return (3.0 * params[len(calls) - 1]).sum().square().reshape(1)

    DISAM(params, 0.1, 0.0, descent=descent, alpha=0.4).backward(loss, torch.tensor([0]))
    assert params[2].grad is None
    wanted = {"gsam": (-0.4 * 18.0, 18.0), "sagm": (9.0, 9.0)}[descent]
    assert [p.grad.tolist() for p in params[:2]] == [pytest.approx([value] * 2, rel=1e-12) for value in wanted]


@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_pass_that_overflows_leaves_a_gradient_that_says_so(descent, faulty):
    model, x, y = small()
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    calls = []

    def loss():
        calls.append(None)
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        return losses * math.inf if len(calls) == faulty + 1 else losses

    report = DISAM(params, RHO, LAMBDA, descent=descent, alpha=0.4).backward(loss, DOMAINS)
    assert not bool(report.is_finite) and all(p.grad.isnan().all() for p in params)
    assert all(torch.equal(p, kept) for p, kept in zip(params, before, strict=True))


@pytest.mark.parametrize("descent", DESCENTS)
def test_the_first_gradient_is_not_lost_where_a_wrapper_uses_its_memory_again(descent):
    """As DistributedDataParallel does with gradient_as_bucket_view."""
    model, x, y = small()
    params = list(model.parameters())
    bucket = [torch.zeros_like(p) for p in params]

    def backward(loss):
        for place, gradient in zip(bucket, torch.autograd.grad(loss, params), strict=True):
            place.copy_(gradient)
        for p, place in zip(params, bucket, strict=True):
            p.grad = place

    disam = DISAM(params, RHO, LAMBDA, descent=descent, alpha=DESCENTS[descent], backward=backward)
    disam.backward(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), DOMAINS)
    assert torch.equal(flat_gradient(params), step(descent)[0])


def test_the_perturbation_is_a_function_of_its_own():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = ([torch.randn(n, generator=generator).double() for n in (3, 5)] for _ in range(2))
    w, g = torch.cat(weights), torch.cat(gradients)
    for adaptive, expected in (
        (False, (0.1 / g.norm() - 0.02) * g),
        (True, (0.1 / (w * g).norm() - 0.02) * w**2 * g),
    ):
        found = perturbations(weights, gradients, 0.1, 0.02, adaptive=adaptive)
        assert [len(e) for e in found] == [3, 5]
        assert torch.allclose(torch.cat(found), expected, rtol=1e-13, atol=0)
    assert torch.cat(perturbations(weights, gradients, 0.1)).norm().item() == pytest.approx(0.1)


# -- groups with a rho of their own --------------------------------------------------------------------------


@pytest.mark.parametrize("descent", ["sam", "sagm"])
def test_groups_have_a_rho_of_their_own_and_one_norm(descent):
    model, x, y = small()
    params, seen = list(model.parameters()), []
    before = [p.detach().clone() for p in params]

    def loss():
        seen.append([p.detach().clone() for p in params])
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    groups = [{"params": params[:2], "rho": 0.05}, {"params": params[2]}, {"params": params[3:], "rho": 0.0}]
    disam = DISAM(groups, RHO, 0.0, descent=descent, alpha=DESCENTS.get(descent, 0.0))
    gradient = torch.autograd.grad(loss().mean(), params)
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()
    back = DESCENTS.get(descent, 0.0)
    for factor in (1.0, 0.5):  # a schedule changes all of them alike
        disam.rho = factor * RHO
        disam.backward(loss, DOMAINS)
        for w, moved, g, rho in zip(before, seen[-1], gradient, (0.05, 0.05, RHO, 0.0), strict=True):
            assert torch.allclose(moved - w, (factor * rho / norm - back) * g, rtol=0, atol=1e-15)


def test_groups_with_the_same_rho_are_no_groups_bit_for_bit():
    model, x, y = small()
    params = list(model.parameters())
    disam = DISAM([{"params": params[:1], "rho": RHO}, {"params": iter(params[1:])}], RHO, LAMBDA)
    disam.backward(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), DOMAINS)
    assert torch.equal(flat_gradient(params), step("sam")[0]) and disam.rho_factors == {}


@pytest.mark.parametrize(
    ("groups", "rho", "message"),
    [
        ([{"params": 0, "roh": 0.1}], 0.1, r"params\[0\] must be a group with the keys .*'params', 'roh'"),
        ([{"params": 0}, 1], 0.1, r"params\[1\] must be a group .*not a Tensor"),
        ([{"params": 0, "rho": -1.0}], 0.1, r"params\[0\]: rho must be a finite number >= 0, not -1"),
        ([{"params": 0, "rho": "much"}], 0.1, r"params\[0\]: rho must be a finite number >= 0, not 'much'"),
        ([{"params": 0, "rho": 0.1}], 0.0, r"params\[0\] has a rho of 0.1, and rho is 0"),
        ([{"params": 0}, {"params": 0}], 0.1, "appears twice"),
    ],
)
def test_mistakes_in_groups_are_told(groups, rho, message):
    tensors = [torch.ones(2, requires_grad=True) for _ in range(2)]
    given = [{**g, "params": [tensors[g["params"]]]} if isinstance(g, dict) else tensors[g] for g in groups]
    with pytest.raises(ValueError, match=message):
        DISAM(given, rho)


def test_settings_are_checked_at_any_time():
    w = torch.ones(2, requires_grad=True)
    for options, message in (
        ({"descent": "asam"}, "descent must be one of sam, gsam, sagm, not 'asam'"),
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, not -1"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"variance_scale": "log"}, "variance_scale must be one of absolute, relative"),
        ({"variance_form": "softmax"}, "variance_form must be one of variance, entropic"),
    ):
        with pytest.raises(ValueError, match=message):
            DISAM([w], **options)
        disam = DISAM([w])
        with pytest.raises(ValueError, match=message):
            setattr(disam, *next(iter(options.items())))
