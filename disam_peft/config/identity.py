"""Which settings make another run, and which leave the weights as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, cast

from disam_peft.config.average import Averages, NoAverageConfig, kept_averages
from disam_peft.config.base import Config
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.training import TrainConfig

HARMLESS = {
    "name": "the folder may have been renamed",
    "output": "or moved",
    "data.root": "so may the data, whose content is compared",
    "data.verify": "looking closer at the images does not change them",
    "data.duplicates": "what is said about the same images changes none of them",
    "features.folder": "stores are found by content",
    "train.workers": "batches and augmentation are functions of seed, step and sample",
    "train.save_every": "saving changes nothing",
    "train.keep_checkpoints": "nor does removing",
    "train.timeout_minutes": "nor waiting",
    "train.gradient_checkpointing": "what was not kept is computed again, to the bit",
    "train.log_every": "the records become more or fewer",
    "train.tracker": "they go elsewhere besides",
    "evaluation.workers": "every sample is judged once, in whatever order",
    "evaluation.batch_size": "but for rounding in the metrics",
}
"""Settings that leave the weights as they are, bit for bit, and why."""

COMPUTED_FROM_DATA = frozenset({"data.pixel_store"})
"""The settings of ``data`` that say how images are computed with, not which images they are."""


class Settings(Protocol):
    """A recipe, as far as it is looked at here."""

    @property
    def average(self) -> Averages: ...

    @property
    def method(self) -> MethodConfig: ...

    @property
    def objective(self) -> ObjectiveConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


def effective(recipe: Settings) -> dict[str, Any]:
    """All values of the recipe in one spelling, for comparing. Recipes that ask for the same run have the same
    values, also where one of them leaves out what the other writes down."""
    values = recipe.model_dump(mode="json")
    averages = [average.model_dump(mode="json") for average in kept_averages(recipe.average)]
    none = NoAverageConfig().model_dump(mode="json")
    values["average"] = averages if len(averages) > 1 else next(iter(averages), none)
    if recipe.method.descent != "sam":
        values["method"]["alpha"] = recipe.method.effective_alpha
    values["objective"]["mean_over"] = recipe.objective.effective_mean_over
    values["train"]["validate_every"] = recipe.train.validation_interval
    return values


def is_harmless(key: str) -> bool:
    """Whether a setting, or the group of settings that it stands in, leaves the weights as they are."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in HARMLESS for count in range(1, len(parts) + 1))


def identifying_settings(recipe: Settings) -> dict[str, Any]:
    """Dotted key -> value, as it takes effect, of every setting that makes another run. Two runs with equal settings
    and equal data differ in nothing but their seed and the domain that they hold out.

    The seed, the held-out domain and what the data are stand apart: the data are known by their content, see
    ``common.run_images``.
    """
    return {key: value for key, value in flat(effective(recipe)).items() if key != "seed" and _identifies(key)}


def settings_hash(recipe: Settings) -> str:
    """Eight hex digits over the settings that make another run, the seed included. Data and held-out domain are not.

    Settings with their default values do not enter, so that a later version, which has more settings, gives the same
    digits to the same run.
    """
    told = _beyond_defaults(cast(Config, recipe))
    if averages := [_beyond_defaults(average) for average in kept_averages(recipe.average)]:
        told["average"] = averages
    else:
        told.pop("average", None)
    method, objective, train = recipe.method, recipe.objective, recipe.train
    if method.descent != "sam":
        published = method.model_copy(update={"alpha": None}).effective_alpha
        _set_or_drop(told, "method", "alpha", method.effective_alpha, published)
    unset = objective.model_copy(update={"mean_over": None}).effective_mean_over
    _set_or_drop(told, "objective", "mean_over", objective.effective_mean_over, unset)
    interval = train.model_copy(update={"validate_every": None}).validation_interval
    _set_or_drop(told, "train", "validate_every", train.validation_interval, interval)
    counted = {key: value for key, value in flat(told).items() if _identifies(key)}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:8]


def run_hash(recipe: Settings) -> str:
    """Twelve hex digits over all settings of a run: those of ``settings_hash``, what the data are, the domain that is
    held out, and how it is judged."""
    told = _beyond_defaults(cast(Config, recipe))
    data = {key: value for key, value in flat({"data": told.get("data", {})}).items() if not is_harmless(key)}
    root = told.get("data", {}).get("root")
    counted = {"settings": settings_hash(recipe), "data": data, "root": root, "protocol": told.get("protocol")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _identifies(key: str) -> bool:
    if key.split(".")[0] == "data":
        return key in COMPUTED_FROM_DATA
    return key != "protocol.held_out" and not is_harmless(key)


def _beyond_defaults(config: Config) -> dict[str, Any]:
    """The settings that differ from their defaults; the kind of what is set always stays."""
    told: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name != "kind" and not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        told[name] = _plain(value)
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return _beyond_defaults(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _set_or_drop(told: dict[str, Any], group: str, key: str, value: Any, unset: Any) -> None:
    """Write a setting as it takes effect, or leave it out where it says what holds without it."""
    within = dict(told.get(group, {}))
    within.pop(key, None)
    if value != unset:
        within[key] = value
    told.pop(group, None)
    if within:
        told[group] = within


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested settings. A group without settings in it is a value: it says that it is there."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
