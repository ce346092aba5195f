"""The two-pass gradient: numbers worked out by hand, exact restore, the same function in both passes."""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

from disam_peft import DISAM


def small_problem(dtype=torch.float32, *, dropout=0.0, seed=0):
    """A network, a batch of 12 samples in three domains, and their per-sample loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).to(dtype)
    x, y, domains = torch.randn(12, 6, dtype=dtype), torch.randint(0, 4, (12,)), torch.arange(12) % 3
    return model, lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), domains


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Losses (w-1)^2/2 and (w-3)^2/2 of two domains at w = 0: L_d = 1/2 and 9/2, Lbar = 5/2, Var = 4, and the ascent
# gradient is -2 + 4 lambda. With rho = 0.1 and a step of 0.5 the sign of e decides: lambda = 0 ends at 1.05, lambda = 1
# at 0.95. (lambda = 0.1 would also end at 1.05, and so would plain SAM: it could not tell them apart.)
@pytest.mark.parametrize(("variance_weight", "end", "weights"), [(0.0, 1.05, (0.5, 0.5)), (1.0, 0.95, (2.5, -1.5))])
def test_two_quadratics_by_hand(variance_weight, end, weights):
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    disam = DISAM([w], rho=0.1, variance_weight=variance_weight)
    report = disam.backward(lambda: torch.stack([(w - 1) ** 2 / 2, (w - 3) ** 2 / 2]), torch.tensor([0, 1]))
    torch.optim.SGD([w], lr=0.5).step()
    assert w.item() == pytest.approx(end, abs=1e-15)
    assert report.domain_weights.tolist() == pytest.approx(weights, abs=1e-15)
    assert report.domain_losses.tolist() == [0.5, 4.5]
    assert report.loss.item() == 2.5
    assert report.ascent_norm.item() == pytest.approx(abs(-2 + 4 * variance_weight), abs=1e-15)
    e = 0.1 if variance_weight else -0.1
    assert report.perturbed_loss.item() == pytest.approx(((e - 1) ** 2 + (e - 3) ** 2) / 4, abs=1e-15)


def test_adaptive_perturbation_by_hand():
    """w = (1, 2), loss w1 + 3 w2: g = (1, 3), |w|g = (1, 6), e = rho (1, 12) / sqrt(37)."""
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    seen = []

    def loss():
        seen.append(w.detach().clone())
        return (w[0] + 3 * w[1]).reshape(1)

    DISAM([w], rho=0.5, variance_weight=0.1, adaptive=True).backward(loss, torch.tensor([0]))
    expected = torch.tensor([1.0, 12.0], dtype=torch.float64) * 0.5 / 37**0.5
    assert torch.allclose(seen[1] - seen[0], expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_are_bit_identical_after_a_step(dtype, adaptive):
    model, loss, domains = small_problem(dtype)
    before = bits(model)
    disam = DISAM(model.parameters(), rho=0.3, variance_weight=0.5, adaptive=adaptive)
    for _ in range(5):
        disam.backward(loss, domains)
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_weights_are_restored_when_pass_2_raises(error):
    model, loss, domains = small_problem()
    before, calls = bits(model), []

    def failing():
        calls.append(bits(model))
        if len(calls) == 2:
            raise error
        return loss()

    with pytest.raises(type(error)):
        DISAM(model.parameters(), rho=0.3).backward(failing, domains)
    assert len(calls) == 2
    assert not same_bits(before, calls[1]), "pass 2 must have run on perturbed weights"
    assert same_bits(before, bits(model))
    assert all(p.grad is None for p in model.parameters()), "half a gradient must not reach an optimizer"


@pytest.mark.slow
def test_weights_are_restored_by_an_interrupt_at_any_line_of_pass_2():
    """Ctrl-C after the n-th line traced since the perturbation, for every n: 0 differing bits."""
    model, loss, domains = small_problem()
    before = bits(model)
    disam = DISAM(model.parameters(), rho=0.3)
    calls, interrupted, left = 0, 0, 0

    def counted():
        nonlocal calls
        calls += 1
        return loss()

    def tracer(frame, event, argument):
        nonlocal left
        if event == "line" and calls == 2 and "disam_peft" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return tracer

    for stop_at in range(1, 400):
        calls, left = 0, stop_at
        sys.settrace(tracer)
        try:
            disam.backward(counted, domains)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert same_bits(before, bits(model)), f"interrupted at line {stop_at} of pass 2"
        if left > 0:
            break  # the step ended before that many lines
    assert 20 < interrupted < 399


def test_row_24_unused_parameters_are_no_error_and_are_restored():
    model, loss, domains = small_problem()
    unused = nn.Parameter(torch.randn(3))
    sometimes, calls = nn.Parameter(torch.randn(())), []

    def loss_without_the_same_parameters():
        calls.append(1)
        return loss() + (sometimes if len(calls) % 2 else 0.0)  # without a gradient in pass 2

    params = [*model.parameters(), unused, sometimes]
    before = [p.detach().clone() for p in params]
    DISAM(params, rho=0.3).backward(loss_without_the_same_parameters, domains)
    assert same_bits(before, params)
    assert unused.grad is None
    assert sometimes.grad is None, "no gradient in pass 2 counts as zero"


def test_parameters_that_were_not_handed_over_get_no_gradient():
    model, loss, domains = small_problem()
    DISAM(model[0].parameters(), rho=0.3).backward(loss, domains)
    assert all(p.grad is not None for p in model[0].parameters())
    assert all(p.grad is None for p in model[3].parameters())


@pytest.mark.parametrize("adaptive", [False, True])
def test_row_25_rho_zero_is_the_plain_gradient_bit_for_bit_in_one_pass(adaptive):
    model, loss, domains = small_problem()
    twin = copy.deepcopy(model)
    calls = []

    def counted():
        calls.append(1)
        return loss()

    DISAM(model.parameters(), rho=0.0, variance_weight=0.7, adaptive=adaptive).backward(counted, domains)
    ours = [p.grad for p in model.parameters()]
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = None
    loss().mean().backward()
    assert len(calls) == 1
    assert same_bits(ours, [p.grad for p in model.parameters()])
    assert same_bits(bits(model), bits(twin))


def test_row_25_lambda_zero_is_sam_bit_for_bit_over_50_steps():
    model, loss, domains = small_problem()
    params = list(model.parameters())
    start = bits(model)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    disam = DISAM(params, rho=0.05, variance_weight=0.0)
    for _ in range(50):
        disam.backward(loss, domains)
        optimizer.step()
    ours = bits(model)

    with torch.no_grad():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for _ in range(50):  # SAM as its paper has it
        gradients = torch.autograd.grad(loss().mean(), params)
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in gradients]))
        saved = bits(model)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p.add_(g * (0.05 / norm))
        second = torch.autograd.grad(loss().mean(), params)
        with torch.no_grad():
            for p, value, g in zip(params, saved, second, strict=True):
                p.copy_(value)
                p.grad = g
        optimizer.step()
    assert same_bits(ours, bits(model))


def test_row_03_a_batch_of_one_domain_is_sam_bit_for_bit():
    model, loss, _ = small_problem()
    one_domain = torch.full((12,), 7)
    gradients = []
    for variance_weight in (0.0, 0.9):
        DISAM(model.parameters(), rho=0.1, variance_weight=variance_weight).backward(loss, one_domain)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert same_bits(*gradients)
    DISAM(model.parameters(), rho=0.1, variance_weight=0.9).backward(loss, torch.arange(12) % 3)
    assert not same_bits(gradients[0], [p.grad for p in model.parameters()])


def test_row_28_a_zero_ascent_gradient_gives_a_plain_step():
    w = torch.zeros(3, requires_grad=True)
    report = DISAM([w], rho=0.1).backward(lambda: (w**2).sum().reshape(1), torch.tensor([0]))
    assert w.tolist() == [0, 0, 0]
    assert w.grad.tolist() == [0, 0, 0]
    assert report.ascent_norm.item() == 0
    assert bool(report.is_finite)


def test_both_passes_draw_the_same_dropout_and_the_stream_advances_by_one_forward():
    model, loss, domains = small_problem(dropout=0.5)
    seen = []

    def recorded():
        seen.append(loss())
        return seen[-1]

    torch.manual_seed(3)
    report = DISAM(model.parameters(), rho=1e-12).backward(recorded, domains)
    after = torch.rand(1)
    assert torch.allclose(seen[0], seen[1], atol=1e-6)
    assert report.perturbed_loss.item() == pytest.approx(report.loss.item(), abs=1e-6)
    torch.manual_seed(3)
    loss()
    assert torch.equal(after, torch.rand(1))


def test_an_autocast_around_both_passes_does_not_hide_the_perturbation():
    """Autocast caches casts of the weights: without care pass 2 runs on those of w, and SAM becomes SGD."""
    model, loss, domains = small_problem()
    disam = DISAM(model.parameters(), rho=0.5)

    def inside():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    per_pass = disam.backward(inside, domains)
    expected = [p.grad.clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer = disam.backward(loss, domains)
        at_w = loss().mean()
    assert per_pass.perturbed_loss.item() > per_pass.loss.item() + 1e-2
    assert outer.perturbed_loss.item() == per_pass.perturbed_loss.item()
    assert same_bits(expected, [p.grad for p in model.parameters()])
    assert at_w.item() == pytest.approx(outer.loss.item(), abs=1e-6), "nor do the casts of w + e survive the step"


def test_row_29_an_overflow_in_pass_1_leaves_weights_alone_and_gradients_that_a_scaler_skips():
    model, loss, domains = small_problem()
    before, calls = bits(model), []

    def overflowing():
        calls.append(bits(model))
        return loss() * (torch.inf if len(calls) == 1 else 1.0)

    report = DISAM(model.parameters(), rho=0.3).backward(overflowing, domains)
    assert same_bits(before, calls[1]), "never perturb by a direction that is not finite"
    assert not bool(report.is_finite)
    assert all(p.grad.isnan().all() for p in model.parameters())
    assert same_bits(before, bits(model))


def test_loss_scale_changes_neither_the_step_nor_the_report():
    model, loss, domains = small_problem()
    plain = DISAM(model.parameters(), rho=0.1, ascent_cosine=True).backward(loss, domains)
    gradients = [p.grad.clone() for p in model.parameters()]
    scaled = DISAM(model.parameters(), rho=0.1, ascent_cosine=True, backward=lambda loss: (loss * 2.0**10).backward())
    report = scaled.backward(loss, domains)
    assert same_bits([g * 2.0**10 for g in gradients], [p.grad for p in model.parameters()])
    assert report.ascent_norm.item() == plain.ascent_norm.item()
    assert report.ascent_cosine.item() == plain.ascent_cosine.item()


def test_cosine_to_the_ascent_direction_of_sam():
    model, loss, domains = small_problem(torch.float64)
    params = list(model.parameters())
    loss_B = loss()
    mean_D = torch.stack([loss_B[domains == d].mean() for d in range(3)])
    sam, disam = (
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective, params, retain_graph=True)])
        for objective in (loss_B.mean(), loss_B.mean() - 0.8 * mean_D.var(correction=0))
    )
    report = DISAM(params, rho=0.1, variance_weight=0.8, ascent_cosine=True).backward(loss, domains)
    expected = nn.functional.cosine_similarity(sam, disam, dim=0).item()
    assert expected < 0.999
    assert report.ascent_cosine.item() == pytest.approx(expected, abs=1e-12)
    assert report.ascent_norm.item() == pytest.approx(disam.norm().item(), abs=1e-12)
    aligned = DISAM(params, rho=0.1, variance_weight=0.0, ascent_cosine=True).backward(loss, domains)
    assert aligned.ascent_cosine.item() == pytest.approx(1, abs=1e-12)


def test_domain_ids_and_num_domains_do_not_change_the_gradient():
    model, loss, domains = small_problem()
    gradients, reports = [], []
    for relabelled, num_domains in ((domains, None), (domains, 5), (domains * 1000 - 17, None), (domains.int(), 3)):
        disam = DISAM(model.parameters(), rho=0.1, variance_weight=0.8, num_domains=num_domains)
        reports.append(disam.backward(loss, relabelled))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(same_bits(gradients[0], g) for g in gradients[1:])
    assert reports[1].domain_losses.isnan().tolist() == [False, False, False, True, True]
    assert reports[2].domain_ids.tolist() == [-17, 983, 1983]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": -0.1}, "rho must be a finite number >= 0, not -0.1"),
        ({"rho": float("nan")}, "rho must be"),
        ({"variance_weight": -1.0}, "variance_weight must be"),
        ({"variance_weight": float("inf")}, "variance_weight must be"),
        ({"num_domains": 0}, "num_domains must be at least 1"),
    ],
)
def test_row_26_numbers_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DISAM([torch.zeros(1, requires_grad=True)], **arguments)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.zeros(2)], "none of the 1 parameters requires a gradient"),
        ([], "nothing to train"),
        ([torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)], "bfloat16.*keep what is trained in float32"),
        ([torch.zeros(2, requires_grad=True) * 2], "not a leaf"),
        ([("weight", torch.zeros(2, requires_grad=True))], "must be tensors, not tuple"),
    ],
)
def test_parameters_that_cannot_be_trained_are_errors(params, message):
    with pytest.raises(ValueError, match=message):
        DISAM(params)


def test_a_parameter_given_twice_is_an_error():
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="twice"):
        DISAM([p, p])


def test_two_parameters_over_the_same_memory_are_an_error():
    weight, flat = torch.zeros(4, 3), torch.zeros(6)
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(3,\), share their memory"):
        DISAM([nn.Parameter(weight), nn.Parameter(weight[0])])
    parts = [nn.Parameter(part) for part in (flat[:4], flat[4:], torch.zeros(0), torch.zeros(0))]
    assert len(DISAM(parts).params) == 4, "neighbours in one buffer share nothing"


@pytest.mark.parametrize(
    ("loss", "domains", "message"),
    [
        (lambda w: (w**2).sum(), torch.tensor([0]), r"shape \(B,\), not \(\)"),
        (lambda w: w.detach() ** 2, torch.tensor([0, 1]), "no graph"),
        (lambda w: w**2, torch.tensor([0]), r"domains has shape \(1,\)"),
        (lambda w: w**2, torch.tensor([0.0, 1.0]), "integers, not torch.float32"),
        (lambda w: w**2, torch.tensor([0, 4]), "found 0..4"),
        (lambda w: w[:0] ** 2, torch.tensor([], dtype=torch.int64), "empty"),
    ],
)
def test_losses_and_domains_of_the_wrong_form_are_errors(loss, domains, message):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        DISAM([w], num_domains=2).backward(lambda: loss(w), domains)
    assert w.tolist() == [1, 1]


def test_half_precision_losses_are_summed_in_float32():
    w = torch.ones(1, requires_grad=True)
    domains = torch.arange(4000) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = DISAM([w]).backward(lambda: (w.expand(4000) * 1.0).bfloat16(), domains)
    assert report.loss.item() == 1, "a sum in bfloat16 stops at 256"
    assert report.domain_losses.tolist() == [1, 1]
