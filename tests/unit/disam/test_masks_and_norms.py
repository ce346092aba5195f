"""Row 74: a masked sample is not there, a batch of none changes nothing, and norms are right at every size."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from disam_peft import DISAM
from disam_peft.disam.perturbation import AscentDirection
from tests.helpers.ranks import fork_ranks, gloo_group

DOMAINS = torch.arange(8) % 3
MASK = torch.tensor([True, True, False, True, True, True, False, True])


def network(seed=0):
    """Its first layer sees tokens: (B, T, F) is folded to (B * T, F) before a sample's tokens are averaged."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x_BTF):
            B, T, F = x_BTF.shape
            folded = torch.tanh(self.norm(self.first(x_BTF.reshape(B * T, F))))
            return self.last(folded.view(B, T, -1).mean(1))

    return Net().double()


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 5, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


def gradient(model, x, y, domains, mask=None, mode=None, objective=None, **options):
    disam = DISAM(model.parameters(), rho=0.2, variance_weight=0.5, **options)

    def loss(part=slice(None)):
        return cross_entropy(model(x[part]), y[part], reduction="none")

    if mode is None:
        report = disam.backward(loss, domains, mask)
    else:
        parts = [slice(0, 3), slice(3, 8)]
        masks = [None if mask is None else mask[part] for part in parts]
        closures = [lambda part=part: loss(part) for part in parts]
        report = disam.backward_accumulated(closures, [domains[part] for part in parts], masks, mode=mode)
    return [p.grad for p in model.parameters()], report


# -- masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "two_phase", "auto"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, 1e200], ids=str)
def test_row_74_a_masked_sample_that_is_not_finite_is_as_if_absent(fault, mode):
    x, y = data()
    expected, without = gradient(network(), x[MASK], y[MASK], DOMAINS[MASK])
    x[2], x[6, 3, 1] = fault, fault
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    found, report = gradient(model, x, y, DOMAINS, MASK, mode)
    assert bool(report.is_finite)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0) and ours.abs().max() > 1e-4
    assert report.loss.item() == pytest.approx(without.loss.item(), abs=1e-14)
    assert report.domain_counts.tolist() == without.domain_counts.tolist()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_row_74_a_masked_sample_whose_derivative_alone_is_infinite():
    """log 0 with a finite input: what the backward pass keeps is finite, and what it computes is not."""
    w = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.5, 3.0]], dtype=torch.float64)
    disam = DISAM([w], rho=0.1, variance_weight=0.0)
    disam.backward(lambda: -torch.log(shares @ w), torch.zeros(3).long(), torch.tensor([True, False, True]))
    found = w.grad.clone()
    disam.backward(lambda: -torch.log(shares[[0, 2]] @ w), torch.zeros(2).long())
    assert torch.allclose(found, w.grad, atol=1e-15, rtol=0) and found.isfinite().all()


@pytest.mark.parametrize("mode", [None, "two_phase", "auto"])
@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, torch.relu], ids=lambda f: f.__name__)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", [slice(None), 1], ids=["whole", "one value"])
def test_row_74_a_masked_sample_whose_loss_is_finite_and_its_input_is_not(where, fault, activation, mode):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (8,), generator=generator)

    class Net(nn.Sequential):
        def forward(self, x_BF):
            return self[1](activation(self[0](x_BF)))

    def model():
        torch.manual_seed(0)
        return Net(nn.Linear(8, 6), nn.Linear(6, 3)).double()

    expected, _ = gradient(model(), x[MASK], y[MASK], DOMAINS[MASK])
    x[2, where], x[6, where] = fault, fault
    found, report = gradient(model(), x, y, DOMAINS, MASK, mode)
    assert bool(report.is_finite)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0) and ours.abs().max() > 1e-4


def test_row_74_a_masked_micro_batch_of_minus_infinity_alone():
    x, y = data()
    expected, _ = gradient(network(), x[3:], y[3:], DOMAINS[3:])
    x[:3] = -math.inf
    found, report = gradient(network(), x, y, DOMAINS, torch.arange(8) > 2, "two_phase")
    assert bool(report.is_finite)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_row_74_a_masked_sample_whose_values_are_finite_and_its_derivative_is_not():
    """The deviation within an empty picture: the square root of 0."""
    x, _ = data()
    model = network()

    def losses(part):
        return model(x[part] - 1)[:, 0] ** 2 + torch.sqrt(model.first(x[part]).var((1, 2)))

    with torch.no_grad():
        model.first.bias.fill_(0.5)
    disam = DISAM(model.parameters(), rho=0.2)
    disam.backward(lambda: losses(MASK), DOMAINS[MASK])
    expected = [p.grad for p in (model.first.weight, model.first.bias)]
    x[2], x[6] = 0, 0
    report = disam.backward(lambda: losses(slice(None)), DOMAINS, MASK)
    assert bool(report.is_finite)
    for ours, theirs in zip((model.first.weight.grad, model.first.bias.grad), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fault", [None, math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("counts", [MASK, torch.arange(8) == 7, torch.arange(8) != 0], ids=["six", "last", "others"])
def test_row_74_attention_masks_of_minus_infinity_stay_what_they_are(counts, fault):
    """As many tokens as samples: the causal mask has the shape of a batch, and is kept for the backward pass."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 8, 4, dtype=torch.float64, generator=generator)
    causal = torch.full((8, 8), -math.inf, dtype=torch.float64).triu(1)
    weight = torch.randn(4, 4, dtype=torch.float64, generator=generator).requires_grad_()
    disam = DISAM([weight], rho=0.2)

    class Added(torch.autograd.Function):
        """Scores plus a mask that the backward pass needs, as fused attention does."""

        @staticmethod
        def forward(ctx, scores, mask):
            ctx.save_for_backward(scores, mask)
            return (scores + mask).softmax(-1)

        @staticmethod
        def backward(ctx, gradient):
            scores, mask = ctx.saved_tensors
            shares = (scores + mask).softmax(-1)
            return shares * (gradient - (gradient * shares).sum(-1, keepdim=True)), None

    def losses(part):
        return (Added.apply(x[part] @ weight @ x[part].mT, causal) @ x[part]).tanh().pow(2).sum((1, 2))

    disam.backward(lambda: losses(counts), DOMAINS[counts])
    expected = weight.grad.clone()
    if fault is not None:
        x[~counts] = fault
    report = disam.backward(lambda: losses(slice(None)), DOMAINS, counts)
    assert bool(report.is_finite)
    assert torch.allclose(weight.grad, expected, atol=1e-12, rtol=0) and expected.abs().max() > 1e-3


def test_row_74_a_counted_gradient_that_is_not_finite_is_not_hidden_by_the_shape_of_the_weights():
    """As many outputs as samples: the gradient of a weight is not taken for one of the batch."""
    w = torch.zeros(8, 1, requires_grad=True)
    x = torch.ones(8, 1)

    def losses():
        scores = x @ w.t()
        return scores.sum(1) + scores[:, 2].sqrt()

    DISAM([w], rho=0.0).backward(losses, DOMAINS, MASK)
    assert w.grad.isfinite().flatten().tolist() == [number != 2 for number in range(8)]


def test_row_74_a_masked_batch_may_use_transforms_of_functions():
    w = torch.ones(3, requires_grad=True)
    x = torch.arange(24.0).view(8, 3)

    def losses(part=slice(None)):
        return (torch.func.grad(lambda v: v.pow(2).sum())(x[part]) @ w) ** 2

    DISAM([w]).backward(losses, DOMAINS, MASK)
    found = w.grad.clone()
    DISAM([w]).backward(lambda: losses(MASK), DOMAINS[MASK])
    assert torch.allclose(found, w.grad, rtol=1e-6)


def test_row_74_a_masked_batch_sees_what_was_modified_in_place():
    w = torch.ones(3, requires_grad=True)

    def losses():
        squares = w.exp()
        value = squares.expand(8, 3).sum(1)
        squares.mul_(2)
        return value

    with pytest.raises(RuntimeError, match="modified in place"):
        DISAM([w]).backward(losses, DOMAINS, MASK)


def test_row_74_a_counted_sample_that_is_not_finite_is_not_hidden():
    x, y = data()
    x[2], x[3] = math.nan, math.inf
    found, report = gradient(network(), x, y, DOMAINS, MASK)
    assert not bool(report.is_finite)
    assert all(g.isnan().all() for g in found), "a loss scaler sees it"


@pytest.mark.parametrize("mode", [None, "two_phase", "auto"])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_row_74_a_batch_of_masked_samples_changes_nothing(mode, rho):
    x, y = data()
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    gradient(model, x, y, DOMAINS)
    optimizer.step()  # so that there is momentum
    moved = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(p, b) for p, b in zip(moved, before, strict=True))
    disam = DISAM(model.parameters(), rho=rho)
    none = torch.zeros(8, dtype=torch.bool)

    def loss():
        return cross_entropy(model(x), y, reduction="none")

    if mode is None:
        report = disam.backward(loss, DOMAINS, none)
    else:
        report = disam.backward_accumulated([loss, loss], [DOMAINS, DOMAINS], [none, none], mode=mode)
    assert not bool(report.is_finite) and report.domain_counts.tolist() == [0, 0, 0]
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), moved, strict=True))


def test_row_74_no_sample_on_any_rank_and_one_on_a_single_rank(tmp_path):
    x, y = data()
    expected, _ = gradient(network(), x, y, DOMAINS)

    def work(rank: int) -> None:
        with gloo_group(tmp_path, rank, 2):
            model = network()
            none = torch.zeros(8, dtype=torch.bool)
            found, report = gradient(model, x, y, DOMAINS, none, reduce_gradients=True)
            assert found == [None] * len(found) and not bool(report.is_finite)
            found, _ = gradient(model, x, y, DOMAINS, none if rank else None, reduce_gradients=True)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-14, rtol=0)

    fork_ranks(2, work)


def test_without_masks_nothing_is_asked_of_the_device(monkeypatch):
    for name in ("Watch", "guard_gradients", "finite_where_masked"):
        monkeypatch.setattr(f"disam_peft.disam.micro_batches.{name}", lambda *_: pytest.fail("asked"))
    x, y = data()
    gradient(network(), x, y, DOMAINS)


# -- norms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("size", [1e-40, 2.6e-23, 1e-19, 1e-12, 1.0, 1e18, 1e25, 3e37])
def test_row_74_the_perturbation_has_its_norm_whatever_the_size_of_the_gradient(size, adaptive):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator).requires_grad_() for n in (30, 7)]
    shape = [torch.randn(n, generator=generator).clamp(-3, 3) for n in (30, 7)]
    gradients = [(g * size).float() for g in shape]
    flat = torch.cat([g.double() for g in gradients])
    w = torch.cat([p.detach().double() for p in weights])
    direction = AscentDirection(weights, gradients, adaptive=adaptive)
    expected = 0.05 * (w**2 * flat / (w * flat).norm() if adaptive else flat / flat.norm())
    with torch.no_grad():
        direction.add_(0.05)
    moved = torch.cat([p.detach().double() for p in weights]) - w
    assert torch.allclose(moved, expected, atol=1e-6, rtol=1e-5), "to the rounding of w + e"
    assert bool(direction.is_finite)
    norm = (w * flat).norm() if adaptive else flat.norm()
    if 1e-37 < norm < 3e38:
        assert direction.norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_row_74_a_norm_within_range_keeps_its_bits():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1000, generator=generator).requires_grad_()
    g = torch.randn(1000, generator=generator) * 1e-9
    direction = AscentDirection([w], [g], adaptive=False)
    assert torch.equal(direction.norm, torch.linalg.vector_norm(g))
    before = w.detach().clone()
    direction.add_(0.05)
    assert torch.equal(w.detach(), before + g * (0.05 / torch.linalg.vector_norm(g)))


@pytest.mark.parametrize(("fault", "finite"), [(0.0, True), (math.inf, False), (math.nan, False)])
def test_row_74_zero_and_infinite_gradients_still_perturb_nothing(fault, finite):
    w = torch.ones(5, requires_grad=True)
    g = torch.zeros(5)
    g[1] = fault
    direction = AscentDirection([w], [g], adaptive=False)
    direction.add_(0.05)
    assert bool(direction.is_finite) is finite and torch.equal(w.detach(), torch.ones(5))


def test_row_74_a_small_gradient_in_two_precisions():
    """The groups of two dtypes have one norm together."""
    a = torch.zeros(2, requires_grad=True)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    direction = AscentDirection([a, b], [torch.full((2,), 3e-25), torch.full((2,), 4e-25).double()], adaptive=False)
    direction.add_(1.0)
    assert torch.cat([a.detach().double(), b.detach()]).tolist() == pytest.approx(
        [0.6 / 2**0.5] * 2 + [0.8 / 2**0.5] * 2, rel=1e-6
    )


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rho", "variance_weight"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "x", None])
def test_row_26_settings_are_checked_whenever_they_are_set(name, value):
    disam = DISAM([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0, not"):
        setattr(disam, name, value)
    with pytest.raises(ValueError, match=name):
        DISAM([torch.zeros(2, requires_grad=True)], **{name: value})
    setattr(disam, name, 1)
    assert getattr(disam, name) == 1.0


def test_two_parameters_over_one_memory_are_refused_wherever_they_meet():
    memory = torch.zeros(10)
    first, second = memory[:6].requires_grad_(), memory[4:].requires_grad_()
    with pytest.raises(ValueError, match="share their memory"):
        DISAM([first, second])
    DISAM([memory[:4].requires_grad_(), memory[4:].requires_grad_()])
    DISAM([memory[::2].requires_grad_(), memory[1::2].requires_grad_()])
    square = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="share their memory"):
        DISAM([square.requires_grad_(), square.detach().t().requires_grad_()])
