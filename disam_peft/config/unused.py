"""What a recipe's method is in words, and which of its settings have no effect.

Such a setting may stand in a recipe, so that ``method.name=...`` alone swaps the method, but whoever set it should hear
that it does nothing."""

from __future__ import annotations

from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.method import MethodConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.schedules import ScheduleConfig, in_words

_OF_VARIANCE = tuple(f"method.variance_{name}" for name in ("weight", "over", "scale", "form"))

_OF_STEPS = (
    *("steps", "batch_size", "sampling", "class_sampling", "optimizer", "learning_rate", "weight_decay", "schedule"),
    *("warmup_steps", "clip_norm", "compile", "gradient_checkpointing"),
    *("gradient_accumulation_steps", "validate_every", "save_every"),
)
"""Settings of ``train`` that only steps have."""


def method_in_words(method: MethodConfig) -> str:
    """``disam (rho 0.05, lambda 0.1)``, with what it equals where its settings make it another method."""
    if method.name == "erm":
        return "erm"
    rho = f"rho {in_words(method.rho)}"
    if method.effective_rho == 0:
        return f"{method.name} ({rho}), which without a perturbation is erm"
    parts = [rho]
    if method.has_variance:
        relative = "relative " if method.variance_scale == "relative" else ""
        tau = method.variance_form == "entropic"
        parts.append(f"{'tau' if tau else f'{relative}lambda'} {in_words(method.variance_weight)}")
    if method.descent != "sam":
        parts.append(f"alpha {method.effective_alpha:g}")
    if method.start > 0:
        parts.append(f"from {method.start:.0%} of the steps on")
    if method.every > 1:
        parts.append(f"in every {_ordinal(method.every)} step")
    parts += [f"{factor:g} rho for {pattern}" for pattern, factor in method.rho_factors.items()]
    same = ""
    if method.has_variance and method.effective_variance_weight == 0:
        same = f", which with lambda 0 is {method.descent}"
    return f"{method.name} ({', '.join(parts)}){same}"


def unused_settings(recipe: Recipe) -> list[str]:
    """``key=value (why)`` for every setting that was set, differs from its default, and has no effect here."""
    train = recipe.train
    reasons = _unused_by_method(recipe.method, train.steps)
    if takes_no_steps(recipe.adapter):
        of_steps = [f"method.{key}" for key in ("name", "rho", "adaptive", "alpha", "from", "every", "rho_factors")]
        of_steps += [*_OF_VARIANCE, *(f"objective.{key}" for key in type(recipe.objective).model_fields)]
        of_steps += [f"train.{key}" for key in _OF_STEPS]
        reasons |= dict.fromkeys(of_steps, f"{recipe.adapter.kind} takes no step")
    if train.optimizer == "adamw":
        reasons["train.momentum"] = "adamw has its own"
    if not recipe.features.store:
        reasons |= dict.fromkeys(("features.views", "features.folder"), "features.store is off")
    return [f"{key}={_value(recipe, key)} ({why})" for key, why in reasons.items() if _is_set(recipe, key)]


def method_settings_without_effect(recipe: Recipe) -> set[str]:
    """The dotted keys of the settings of the method that change nothing in this recipe, whatever they are."""
    return {key for key in _unused_by_method(recipe.method, recipe.train.steps) if key.startswith("method.")}


def _unused_by_method(method: MethodConfig, steps: int) -> dict[str, str]:
    rest = (*_OF_VARIANCE, "method.adaptive", "method.alpha", "method.from", "method.every", "method.rho_factors")
    if method.name == "erm":
        reasons = dict.fromkeys(("method.rho", *rest), "erm perturbs no weights")
        return reasons | {"train.log_ascent_cosine": "erm has no ascent"}
    if method.effective_rho == 0:
        return dict.fromkeys(rest, "rho 0 perturbs no weights")
    if method.first_perturbed_step(steps) >= steps:
        why = f"method.from={method.start:g} of train.steps={steps} leaves no step that perturbs: the run is erm"
        return dict.fromkeys(("method.rho", *rest), why)
    reasons = {}
    if not method.has_variance:
        reasons |= dict.fromkeys(_OF_VARIANCE, f"{method.name} has no variance term")
        reasons["train.log_ascent_cosine"] = f"of {method.name} it is 1"
    elif method.variance_form == "entropic":
        reasons["method.variance_over"] = "the entropic form counts domains by their images"
        reasons["method.variance_scale"] = "the entropic form is relative to the mean loss"
    if method.descent == "sam":
        reasons["method.alpha"] = f"{method.name} has no alpha, only gsam and sagm have one"
    return reasons


def _is_set(recipe: Recipe, key: str) -> bool:
    config, name = _place(recipe, key)
    return name in config.model_fields_set and getattr(config, name) != type(config).model_fields[name].get_default(
        call_default_factory=True
    )


def _value(recipe: Recipe, key: str) -> str:
    config, name = _place(recipe, key)
    value = getattr(config, name)
    if isinstance(value, bool):
        return str(value).lower()
    return in_words(value) if isinstance(value, (int, float, ScheduleConfig)) else str(value)


def _place(recipe: Recipe, key: str) -> tuple[Config, str]:
    """The config that has a setting, and what the setting is called there."""
    section, written = key.split(".")
    config: Config = getattr(recipe, section)
    names = {field.alias or name: name for name, field in type(config).model_fields.items()}
    return config, names[written]


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
