"""Which recipes and values a sweep of linear probes takes; checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from disam_peft.config.recipe import Recipe
from disam_peft.errors import UserError


def check_sweep(
    recipe: Recipe, learning_rates: Sequence[float], rhos: Sequence[float], variance_weights: Sequence[float]
) -> None:
    """Pass if the recipe's adapter can be trained with all of these values side by side.

    Raises:
        UserError: another adapter than a linear probe, or one that trains on texts; another objective than the mean;
            mixup; another method than erm, sam and disam in every step; a rho or lambda that changes over the steps;
            values out of range.
    """
    if recipe.adapter.kind != "linear_probe":
        raise UserError(
            f"a sweep trains linear probes side by side, and adapter.kind is {recipe.adapter.kind!r}; use "
            "adapter.kind=linear_probe, or disam-peft compare for other adapters"
        )
    if not recipe.objective.is_plain_mean:
        raise UserError(
            "a sweep trains with the mean cross entropy over samples, and this recipe has another objective; remove "
            "objective, or use disam-peft compare"
        )
    if recipe.adapter.text_weight > 0:
        raise UserError(
            f"a sweep trains on images alone, and adapter.text_weight is {recipe.adapter.text_weight:g}; remove it, or "
            "use disam-peft compare"
        )
    if recipe.augment.mixup is not None:
        raise UserError(
            "a sweep trains on single images, and this recipe has augment.mixup; remove it, or use disam-peft compare"
        )
    if recipe.method.descent != "sam":
        raise UserError(
            f"a sweep trains with erm, sam and disam, and method.name is {recipe.method.name!r}; use method.name=disam "
            "here, or disam-peft compare for other methods"
        )
    if recipe.method.skips_steps or recipe.method.rho_factors:
        raise UserError(
            "a sweep perturbs all weights in every step, and this recipe does not; remove from, every and rho_factors "
            "from method, or use disam-peft compare"
        )
    key: Literal["rho", "variance_weight"]
    for key, option, given in (("rho", "--rho", rhos), ("variance_weight", "--variance-weight", variance_weights)):
        if not given and recipe.method.changes_in(key):
            raise UserError(
                f"a sweep trains each probe with one rho and one lambda, and method.{key} changes over the steps; give "
                f"{option}, or a number in method.{key}"
            )
    for name, values, least in (
        ("learning rates", learning_rates, "above 0"),
        ("rhos", rhos, "0 or more"),
        ("variance weights", variance_weights, "0 or more"),
    ):
        for value in values:
            # not `value < 0`: a NaN is no number to train with either
            if not (0 <= value < float("inf")) or (value == 0 and least == "above 0"):
                raise UserError(f"{name}: {value:g} is not {least}")
