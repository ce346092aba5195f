"""What a recipe's method is in words, and which of its settings have no effect.

Such a setting may stand in a recipe, so that ``method.name=...`` alone swaps the method, but whoever set it should hear
that it does nothing."""

from __future__ import annotations

from disam_peft.config.method import LinearConfig, MethodConfig
from disam_peft.config.recipe import Recipe


def method_in_words(method: MethodConfig) -> str:
    """``disam (rho 0.05, lambda 0.1)``, with what it equals where its settings make it another method."""
    if method.name == "erm":
        return "erm"
    rho = f"rho {_number(method.rho)}"
    if method.effective_rho == 0:
        return f"{method.name} ({rho}), which without a perturbation is erm"
    if method.name == "sam":
        return f"sam ({rho})"
    same = ", which with lambda 0 is sam" if method.effective_variance_weight == 0 else ""
    return f"disam ({rho}, lambda {_number(method.variance_weight)}){same}"


def unused_settings(recipe: Recipe) -> list[str]:
    """``key=value (why)`` for every setting that was set, differs from its default, and has no effect here."""
    method, train = recipe.method, recipe.train
    reasons: dict[str, str] = {}
    if method.name == "erm":
        reasons |= dict.fromkeys(("method.rho", "method.variance_weight", "method.adaptive"), "erm perturbs no weights")
        reasons["train.log_ascent_cosine"] = "erm has no ascent"
    elif method.effective_rho == 0:
        reasons |= dict.fromkeys(("method.variance_weight", "method.adaptive"), "rho 0 perturbs no weights")
    elif method.name == "sam":
        reasons["method.variance_weight"] = "sam has no variance term"
        reasons["train.log_ascent_cosine"] = "of sam it is 1"
    if train.optimizer == "adamw":
        reasons["train.momentum"] = "adamw has its own"
    if not recipe.features.store:
        reasons |= dict.fromkeys(("features.views", "features.folder"), "features.store is off")
    return [f"{key}={_value(recipe, key)} ({why})" for key, why in reasons.items() if _is_set(recipe, key)]


def _is_set(recipe: Recipe, key: str) -> bool:
    section, name = key.split(".")
    config = getattr(recipe, section)
    return name in config.model_fields_set and getattr(config, name) != type(config).model_fields[name].default


def _value(recipe: Recipe, key: str) -> str:
    section, name = key.split(".")
    value = getattr(getattr(recipe, section), name)
    if isinstance(value, bool):
        return str(value).lower()
    return _number(value) if isinstance(value, (int, float, LinearConfig)) else str(value)


def _number(setting: float | LinearConfig) -> str:
    if isinstance(setting, LinearConfig):
        return f"{setting.start:g} to {setting.to:g}"
    return f"{setting:g}"
