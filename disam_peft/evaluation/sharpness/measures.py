"""How sharp a loss surface is at w. P trained numbers in one flat vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from disam_peft.evaluation.sharpness.surface import LossSurface

_SMALL = 1e-3  # a second direction whose new part is shorter than this is none


@dataclass(frozen=True)
class BallLoss:
    """``loss`` at w and the highest loss found within rho of it."""

    loss: float
    worst: float

    @property
    def difference(self) -> float:
        return self.worst - self.loss


@dataclass(frozen=True)
class Eigenvalue:
    """A Rayleigh quotient v'Hv of a unit vector v and how far it is from an eigenvalue.

    Attributes:
        residual: ||Hv - value v||; some eigenvalue lies within it of ``value``.
        iterations: Hessian products that were spent.
        converged: the residual is at most the tolerance times |value|.
    """

    value: float
    residual: float
    iterations: int
    converged: bool
    vector_P: Tensor


@dataclass(frozen=True)
class PlaneLosses:
    """``losses[i][j]`` at w + coordinates[j] * first + coordinates[i] * second."""

    coordinates: list[float]
    losses: list[list[float]]


def worst_loss(surface: LossSurface, rho: float, steps: int) -> BallLoss:
    """max of L(w + e) over ||e||_2 <= rho, as found by normalised gradient ascent with projection onto the ball.

    A lower bound of the maximum. The first step has length rho and is SAM's perturbation; a step that does not raise
    the loss is taken back and the next one is half as long, so more steps never give less. Where the gradient is
    exactly zero the first step goes along a fixed random direction. Costs ``steps + 1`` gradients; w is restored bit
    for bit.
    """
    start_P = surface.point()
    loss, gradient_P = surface.loss_and_gradient()
    worst, best_P, length = loss, torch.zeros_like(start_P), rho
    if not gradient_P.any():
        gradient_P = fixed_direction(start_P)
    with surface.restored():
        for _ in range(steps):
            norm = gradient_P.norm()
            if not (torch.isfinite(norm) and norm > 0):
                break
            e_P = best_P + gradient_P * (length / norm)
            e_P = e_P * (rho / e_P.norm()).clamp(max=1)
            surface.go(start_P + e_P)
            value, slope_P = surface.loss_and_gradient()
            if value > worst:
                worst, best_P, gradient_P = value, e_P, slope_P
            else:
                length /= 2
    return BallLoss(loss, worst)


def extreme_eigenvalue(
    surface: LossSurface, end: Literal["largest", "smallest"] = "largest", *, iterations: int, tolerance: float
) -> Eigenvalue:
    """The Hessian's largest or smallest *algebraic* eigenvalue, by power iteration with a memory of one step.

    Sharpness is the largest: the steepest upward curvature. Plain power iteration finds the largest *magnitude*, which
    near a low-rank adapter's zero is often negative, and hardly settles where two eigenvalues differ by their sign
    alone. So each step takes the best vector in the span of v, Hv and the last change of v (the locally optimal
    conjugate gradient method of Knyazev 2001, without preconditioner). The magnitude is the larger of both ends.

    Deterministic: starts from a fixed random vector. Stops when the residual is at most ``tolerance * |value|``, at
    the latest after ``iterations`` Hessian products; value and residual are of a product with the final vector.
    """
    sign = 1.0 if end == "largest" else -1.0

    def product(vector_P: Tensor) -> Tensor:
        return sign * surface.hessian_product(vector_P)

    vector_P = fixed_direction(surface.point())
    along_P = product(vector_P)  # H v, carried along as a sum of products
    change: tuple[Tensor, Tensor] | None = None
    done = 1
    while done < iterations - 1:
        rest_P = along_P - (vector_P @ along_P) * vector_P
        if rest_P.norm() <= tolerance * abs(float(vector_P @ along_P)) or not rest_P.any():
            break
        new_P = rest_P / rest_P.norm()
        new_P = new_P - (vector_P @ new_P) * vector_P  # once more: what rounding left over
        new_P = new_P / new_P.norm()
        basis, products = [vector_P, new_P], [along_P, product(new_P)]
        done += 1
        _extend(basis, products, change)
        basis_KP, products_KP = torch.stack(basis), torch.stack(products)
        small_KK = (basis_KP @ products_KP.T).double()
        mix_K = torch.linalg.eigh((small_KK + small_KK.T) / 2).eigenvectors[:, -1].to(vector_P)
        change = mix_K[1:] @ basis_KP[1:], mix_K[1:] @ products_KP[1:]
        vector_P, along_P = mix_K @ basis_KP, mix_K @ products_KP
        length = vector_P.norm()
        vector_P, along_P = vector_P / length, along_P / length
    product_P = surface.hessian_product(vector_P)
    value = float(vector_P @ product_P)
    residual = float((product_P - value * vector_P).norm())
    return Eigenvalue(value, residual, done + 1, residual <= tolerance * abs(value), vector_P)


def _extend(basis: list[Tensor], products: list[Tensor], change: tuple[Tensor, Tensor] | None) -> None:
    """Append the part of ``change`` that the orthonormal ``basis`` lacks, and its product, if there is one."""
    if change is None:
        return
    vector_P, product_P = change
    length = vector_P.norm()
    for known_P, known_product_P in zip(basis, products, strict=True):
        part = vector_P @ known_P
        vector_P, product_P = vector_P - part * known_P, product_P - part * known_product_P
    if vector_P.norm() > _SMALL * length:
        basis.append(vector_P / vector_P.norm())
        products.append(product_P / vector_P.norm())


def gradient_variance(surface: LossSurface, group: int = 1) -> float | None:
    """Trace of the covariance of per-sample gradients, tr Cov(grad l_i), over the samples of the surface.

    The DISAM paper judges sharpness on the unseen domain by the variance of gradients there, without a formula for the
    estimate; this is ours. With G disjoint groups of ``group`` consecutive samples, b = group, and g_k the gradient of
    the mean loss of group k:

        b / (G - 1) * sum_k ||g_k - mean(g)||^2

    b = 1 is the usual unbiased variance, summed over the trained numbers. The factor b makes larger groups estimate
    the same quantity, at 1 / b of the backward passes, where samples come in random order. A last group that is not
    full is left out. None with fewer than two groups.
    """
    groups = [part for part in surface.parts(group) if part.stop - part.start == group]
    if len(groups) < 2:
        return None
    # float64: the difference of two sums below must not drown in their rounding
    total_P = torch.zeros_like(surface.point(), dtype=torch.float64)
    squares = 0.0
    for part in groups:
        gradient_P = surface.gradient_of(part).double()
        total_P += gradient_P
        squares += float(gradient_P @ gradient_P)
    about_mean = squares - float(total_P @ total_P) / len(groups)
    return group * max(0.0, about_mean) / (len(groups) - 1)


def plane_losses(surface: LossSurface, first_P: Tensor, second_P: Tensor, radius: float, points: int) -> PlaneLosses:
    """L on a square grid in the plane through w that two unit vectors at right angles span (``orthonormal``).

    ``points`` of each coordinate, from -radius to radius; w is restored bit for bit.
    """
    start_P = surface.point()
    coordinates = torch.linspace(-radius, radius, points, dtype=torch.float64).tolist()
    losses = []
    with surface.restored():
        for up in coordinates:
            row = []
            for right in coordinates:
                surface.go(start_P + right * first_P + up * second_P)
                row.append(surface.loss())
            losses.append(row)
    return PlaneLosses(coordinates, losses)


def orthonormal(first_P: Tensor, second_P: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors that span the plane of the two; where there is none, a fixed random direction stands in."""
    if not first_P.any():
        first_P = fixed_direction(second_P, seed=1)
    first_P = first_P / first_P.norm()
    for candidate_P in (second_P, fixed_direction(first_P, seed=2)):
        rest_P = candidate_P - (candidate_P @ first_P) * first_P
        if rest_P.norm() > _SMALL * candidate_P.norm():
            rest_P = rest_P - (rest_P @ first_P) * first_P  # once more: what rounding left over
            return first_P, rest_P / rest_P.norm()
    return first_P, torch.zeros_like(first_P)  # a single trained number: there is no plane


def fixed_direction(like_P: Tensor, seed: int = 0) -> Tensor:
    """A unit vector (P,), the same in every process and on every device, spread over all directions."""
    drawn_P = torch.randn(like_P.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn_P / drawn_P.norm()).to(like_P)
