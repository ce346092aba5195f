"""What is measured around trained weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from disam_peft.config.base import Config


class SharpnessConfig(Config):
    """What is measured around the trained weights, and at what cost."""

    samples: int = Field(default=240, ge=2)
    """At most so many images of each split, as many of every domain; all of the cost is proportional to it. Compare at
    one number only: the fewer samples, the larger the largest eigenvalue and the worst loss of their mean come out."""
    seed: int = Field(default=0, ge=0)
    """Chooses them, and random directions."""
    rhos: tuple[float, ...] = (0.05,)
    """Radii of the balls in which the worst loss is sought."""
    ascent_steps: int = Field(default=10, ge=1)
    """Gradients per ball."""
    hessian_iterations: int = Field(default=30, ge=3)
    """Hessian products for the largest eigenvalue, at most."""
    hessian_tolerance: float = Field(default=0.01, gt=0)
    """Residual, as a share of the eigenvalue, at which it stops."""
    gradient_group: int = Field(default=1, ge=1)
    """Samples per gradient in the gradient variance; more is cheaper and estimates the same, with more noise."""
    slice_points: int = Field(default=11, ge=0)
    """Of each axis of the plane through w on the held-out domain; 0: none is computed."""
    slice_radius: float = Field(default=0.5, gt=0)
    """The plane reaches so far from w, in units of the norm of the trained weights, as rho."""
    slice_directions: Literal["curvature", "random"] = "curvature"
    """``curvature``: the gradient and the largest eigenvalue's vector; ``random``: two directions from the seed."""

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
    """How predictions are computed, whose numbers do not depend on it but for rounding; and what else is recorded."""

    batch_size: int = Field(default=64, ge=1)
    """Per process."""
    workers: int | Literal["auto"] = "auto"
    """Processes that decode images."""
    example_errors: int = Field(default=12, ge=0)
    """The most confident errors on the held-out domain that are kept with a thumbnail, for the report."""
    sharpness: SharpnessConfig | None = None
    """Whether the sharpness of the trained weights is measured after training; unset: it is not."""
