"""Sharpness measures against closed forms, and on a tiny CLIP against the full Hessian by autograd."""

import pytest
import torch
from scipy.optimize import brentq
from torch.nn.attention import SDPBackend, sdpa_kernel

from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.evaluation.sharpness.measures import (
    extreme_eigenvalue,
    fixed_direction,
    gradient_variance,
    orthonormal,
    plane_losses,
    worst_loss,
)
from disam_peft.evaluation.sharpness.surface import LossSurface
from disam_peft.objectives.cross_entropy import cross_entropy
from tests.helpers.adapter_cells import LABELS, pixels, tiny_backbone, tiny_classifier


def quadratic(hessian, slope, start, samples=5, chunk=2):
    """l_i(w) = (w - a)'H(w - a) / 2 + slope'(w - a) + noise_i'(w - a), noise summing to zero; w in two tensors."""
    dim = len(start)
    params = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (start[:1], start[1:])]
    noise = torch.randn(samples, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise -= noise.mean(dim=0)
    origin = torch.tensor(start, dtype=torch.float64)

    def per_sample_loss(part):
        away = torch.cat(params) - origin
        mean = away @ hessian @ away / 2 + slope @ away
        return mean + noise[part] @ away

    return LossSurface(params, per_sample_loss, samples, chunk), noise


def rotated(eigenvalues):
    """A symmetric matrix with these eigenvalues and no zero entry."""
    drawn = torch.randn((len(eigenvalues),) * 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T, basis


ZERO = torch.zeros(4, dtype=torch.float64)
START = [0.1, -0.2, 0.3, 0.7]


@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize(
    "eigenvalues", [[3.0, 1.0, -2.0, 0.5], [1.0, 0.4, 0.0, -5.0], [2.0, 0.1, 0.0, -2.0], [-1.0, -2.0, -3.0, -4.0]]
)
def test_either_end_of_a_known_spectrum(eigenvalues, end):
    """Also where the largest magnitude is negative, or there twice with both signs: power iteration would give -5,
    or never settle."""
    hessian, basis = rotated(eigenvalues)
    surface, _ = quadratic(hessian, ZERO + 1.0, START)
    before = surface.point()
    found = extreme_eigenvalue(surface, end, iterations=60, tolerance=1e-10)
    place = (max if end == "largest" else min)(range(4), key=eigenvalues.__getitem__)
    assert found.converged
    assert found.iterations < 60
    assert abs(found.value - eigenvalues[place]) < 1e-8
    assert found.residual < 1e-8
    assert abs(abs(found.vector_P @ basis[:, place]) - 1) < 1e-8
    assert torch.equal(surface.point(), before)


def test_a_large_spectrum_needs_few_products():
    """Plain power iteration would shrink the error by a factor of 0.98 each time: 900 products for this tolerance."""
    eigenvalues = [1.0 - 0.02 * i for i in range(60)]
    hessian, _ = rotated(eigenvalues)
    surface, _ = quadratic(hessian, torch.zeros(60).double(), [0.0] * 60)
    found = extreme_eigenvalue(surface, iterations=200, tolerance=1e-8)
    assert found.converged
    assert found.iterations < 100
    assert abs(found.value - 1.0) < 1e-8


@pytest.mark.parametrize("iterations", [3, 4])
def test_too_few_iterations_are_owned_up_to(iterations):
    eigenvalues = [1.0 - 0.02 * i for i in range(60)]
    hessian, _ = rotated(eigenvalues)
    surface, _ = quadratic(hessian, torch.zeros(60).double(), [0.0] * 60)
    calls, of = [], surface.hessian_product
    surface.hessian_product = lambda vector: calls.append(1) or of(vector)
    found = extreme_eigenvalue(surface, iterations=iterations, tolerance=1e-10)
    assert (found.converged, found.iterations, len(calls)) == (False, iterations, iterations)
    assert min(abs(found.value - e) for e in eigenvalues) <= found.residual
    assert found.residual > 1e-2
    assert found.value < 1.0


def test_a_linear_loss_has_no_curvature_and_its_worst_is_rho_times_the_slope():
    surface, _ = quadratic(torch.zeros(4, 4, dtype=torch.float64), torch.tensor([3.0, 0.0, 4.0, 0.0]).double(), START)
    ball = worst_loss(surface, 0.2, steps=1)
    assert ball.loss == 0.0
    assert abs(ball.difference - 0.2 * 5.0) < 1e-12
    assert abs(worst_loss(surface, 0.2, steps=20).worst - 1.0) < 1e-12
    flat = extreme_eigenvalue(surface, iterations=5, tolerance=1e-6)
    assert (flat.value, flat.residual, flat.iterations) == (0.0, 0.0, 2)


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, 0.2, 0.5], [3.0, -1.0, -4.0, 0.5]])
def test_the_worst_loss_of_a_quadratic_in_the_ball(eigenvalues):
    """The maximum solves (m I - H) e = g with ||e|| = rho and m above every eigenvalue (trust region)."""
    hessian, _ = rotated(eigenvalues)
    slope, rho = torch.tensor([0.3, -0.1, 0.2, 0.4]).double(), 0.5
    surface, _ = quadratic(hessian, slope, START)

    def solution(m):
        return torch.linalg.solve(m * torch.eye(4).double() - hessian, slope)

    m = brentq(lambda m: float(solution(m).norm()) - rho, max(eigenvalues) + 1e-9, 1e3, xtol=1e-14)
    e = solution(m)
    exact = float(e @ hessian @ e / 2 + slope @ e)
    before = surface.point()
    found = [worst_loss(surface, rho, steps).difference for steps in (1, 5, 60)]
    assert abs(found[2] - exact) < 1e-8 * exact
    assert found[0] < found[1] - 1e-6
    assert found[1] <= found[2] <= exact + 1e-12
    g = slope / slope.norm()
    assert abs(found[0] - float(rho**2 * g @ hessian @ g / 2 + rho * slope @ g)) < 1e-12, "one step is SAM's"
    assert torch.equal(surface.point(), before)


def test_the_worst_loss_inside_the_ball_and_at_a_stationary_point():
    hill, _ = quadratic(-2 * torch.eye(4).double(), torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), START)
    assert abs(worst_loss(hill, 10.0, steps=60).worst - 0.25) < 1e-8, "the top of -|w|^2 + w_1 lies at w_1 = 1/2"
    hessian, _ = rotated([3.0, 1.0, 0.2, 0.5])
    bowl = LossSurface([ZERO.clone().requires_grad_()], lambda part: _bowl(bowl.params[0], hessian), 1)
    assert not bowl.loss_and_gradient()[1].any()
    assert abs(worst_loss(bowl, 0.5, steps=80).difference - 0.5**2 * 3.0 / 2) < 1e-8


def flatten(tensors):
    return torch.cat([t.flatten() for t in tensors])


def _bowl(w, hessian):
    return (w @ hessian @ w / 2)[None]


def test_an_error_on_the_way_leaves_the_weights_as_they_were():
    surface, _ = quadratic(torch.eye(4).double(), ZERO + 1.0, START)
    before, of, calls = surface.point(), surface.per_sample_loss, []

    def failing(part):
        calls.append(part)
        if len(calls) > 7:
            raise RuntimeError("out of memory")
        return of(part)

    surface.per_sample_loss = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        worst_loss(surface, 0.3, steps=9)
    assert torch.equal(surface.point(), before)


def test_gradient_variance_of_a_known_set():
    surface, noise = quadratic(torch.eye(4).double(), ZERO + 2.0, START, samples=6, chunk=4)
    exact = float(noise.var(dim=0, unbiased=True).sum())
    assert abs(gradient_variance(surface) - exact) < 1e-12
    pairs = noise.view(3, 2, 4).mean(dim=1)
    assert abs(gradient_variance(surface, group=2) - 2 * float(pairs.var(dim=0).sum())) < 1e-12
    fours = gradient_variance(surface, group=4)
    assert fours is None, "one full group and a rest: no variance"


@pytest.mark.slow
def test_groups_estimate_the_variance_of_single_samples():
    surface, _ = quadratic(torch.eye(4).double(), ZERO, START, samples=3000)
    single, grouped = gradient_variance(surface), gradient_variance(surface, group=10)
    assert abs(single - 4.0) < 0.2, "four independent standard normals"
    assert abs(grouped / single - 1) < 0.15


def test_losses_in_a_plane():
    hessian, basis = rotated([3.0, 1.0, 0.2, 0.5])
    surface, _ = quadratic(hessian, ZERO, START)
    first, second = orthonormal(7 * basis[:, 0], basis[:, 1] + basis[:, 0])
    before = surface.point()
    plane = plane_losses(surface, first, second, radius=0.4, points=3)
    assert plane.coordinates == [-0.4, 0.0, 0.4]
    expected = [[(3 * x * x + y * y) / 2 for x in (-0.4, 0, 0.4)] for y in (-0.4, 0, 0.4)]
    assert torch.allclose(torch.tensor(plane.losses), torch.tensor(expected), atol=1e-12, rtol=0)
    assert torch.equal(surface.point(), before)


def test_a_plane_needs_two_directions():
    one = torch.tensor([1.0, 2.0, 2.0]).double()
    for first, second in ((one, one), (one, 0 * one), (0 * one, one), (one, one + 1e-6)):
        pair = torch.stack(orthonormal(first, second))
        assert torch.allclose(pair @ pair.T, torch.eye(2).double(), atol=1e-12)
    assert torch.allclose(orthonormal(one, -one)[0], one / 3)
    assert not torch.equal(fixed_direction(one), fixed_direction(one, seed=1))


SMALL = {
    "lora": LoraAdapterConfig(towers=["image", "text"], projections=["q"], blocks=LastBlocks(last=1), rank=1, seed=1),
    "coop": CoOpConfig(context_tokens=2, seed=1),
    "coop-recomputed": CoOpConfig(context_tokens=1, seed=1, memory_budget_gb=1e-9),  # checkpoints, twice derived
    "probe": LinearProbeConfig(init="random", seed=1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("open_clip", "lora"),
        ("transformers", "lora"),
        ("transformers", "coop"),
        ("open_clip", "coop-recomputed"),
        ("open_clip", "probe"),
    ],
)
def test_on_a_tiny_clip_as_the_full_hessian_says(twins, family, kind):
    classifier = tiny_classifier(tiny_backbone(twins, family), SMALL[kind])
    params, frozen = list(classifier.trainable().values()), classifier.encode_frozen(pixels())

    def per_sample_loss(part):
        return cross_entropy(classifier.logits(frozen[part]), LABELS[part])

    surface = LossSurface(params, per_sample_loss, len(LABELS), chunk=4)
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.autograd.grad(per_sample_loss(slice(None)).mean(), params, create_graph=True)
        whole = flatten(whole)
        full = torch.stack([flatten(torch.autograd.grad(g, params, retain_graph=True)) for g in whole])
        loss, gradient = surface.loss_and_gradient()
        products = torch.stack([surface.hessian_product(row) for row in torch.eye(len(full)).double()[:8]])
        found = extreme_eigenvalue(surface, iterations=1000, tolerance=1e-3)
        singles = torch.stack([surface.gradient_of(slice(i, i + 1)) for i in range(len(LABELS))])
        variance = gradient_variance(surface)
    assert len(full) >= 32
    assert abs(loss - float(per_sample_loss(slice(None)).mean().detach())) < 1e-12
    assert (gradient - whole).abs().max() < 1e-12
    assert (products - full[:8]).abs().max() < 1e-10 * full.abs().max()
    exact = torch.linalg.eigvalsh((full + full.T) / 2)
    assert abs(found.value - exact[-1]) < 1e-5 * exact[-1]
    assert abs(variance - float(singles.var(dim=0).sum())) < 1e-10 * variance
