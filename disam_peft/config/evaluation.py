"""How trained weights are evaluated, and how their sharpness is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from disam_peft.config.base import Config


class SharpnessConfig(Config):
    """What is measured around the trained weights, and at what cost."""

    samples: int = Field(default=240, ge=2)
    """At most this many images of each split are used, equally many of every domain. The cost is proportional to it.
    Compare only runs with the same number: with fewer images the largest eigenvalue and the worst loss come out larger.
    """
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of images and of the random directions."""
    rhos: tuple[float, ...] = (0.05,)
    """Radii of the balls in which the worst loss is sought."""
    ascent_steps: int = Field(default=10, ge=1)
    """Number of gradient steps with which the worst loss in a ball is sought."""
    hessian_iterations: int = Field(default=30, ge=3)
    """Largest number of products with the Hessian for its largest eigenvalue."""
    hessian_tolerance: float = Field(default=0.01, gt=0)
    """The search for the eigenvalue stops at this residual, as a share of the eigenvalue."""
    gradient_group: int = Field(default=1, ge=1)
    """Number of samples of each gradient whose variance is measured. A larger number is cheaper and estimates the same
    variance with more noise."""
    slice_points: int = Field(default=11, ge=0)
    """Number of points on each axis of the plane of losses around the trained weights w, on the held-out domain. 0: the
    plane is not computed."""
    slice_radius: float = Field(default=0.5, gt=0)
    """How far the plane reaches from w, measured as ``rho`` is."""
    slice_directions: Literal["curvature", "random"] = "curvature"
    """Axes of the plane. ``curvature``: the gradient and the eigenvector of the largest eigenvalue. ``random``: two
    directions that are drawn with the seed."""

    @field_validator("rhos")
    @classmethod
    def _radii(cls, rhos: tuple[float, ...]) -> tuple[float, ...]:
        if not all(rho > 0 for rho in rhos):
            raise ValueError(f"rhos={list(rhos)} must all be above 0, for example [0.05]")
        return rhos

    @field_validator("slice_points")
    @classmethod
    def _middle(cls, points: int) -> int:
        if points == 1 or (points > 0 and points % 2 == 0):
            raise ValueError(f"slice_points={points} must be odd and at least 3, so that w is in the middle, or 0")
        return points


class EvaluationConfig(Config):
    """How predictions are computed (their numbers depend on it by rounding alone), and what else is recorded."""

    batch_size: int = Field(default=64, ge=1)
    """Number of images that each process evaluates at a time."""
    workers: int | Literal["auto"] = "auto"
    """Number of processes that decode images. ``auto``: chosen from the number of cores."""
    example_errors: int = Field(default=12, ge=0)
    """How many of the most confident errors on the held-out domain are kept with a thumbnail, for the report."""
    sharpness: SharpnessConfig | None = None
    """How the sharpness of the trained weights is measured after training. Unset: it is not measured."""
