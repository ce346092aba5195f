"""The typed recipe: a YAML file and ``a.b=c`` overrides become frozen configs, or one error with all mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.average import Averages, NoAverageConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.base import Config
from disam_peft.config.data import AugmentConfig, DataConfig, DomainsConfig, FeatureConfig
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.overrides import apply_override
from disam_peft.config.prompts import PromptConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.selection import SelectionConfig
from disam_peft.config.training import TrainConfig
from disam_peft.config.yaml import read_yaml
from disam_peft.errors import UserError, did_you_mean


class Recipe(Config):
    """One experiment: everything that its numbers depend on."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Of the run's folder under ``output``."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the split, the batches, the augmentation, dropout and the adapter's initial weights."""
    output: Path = Path("runs")
    """Folder of all runs."""
    backbone: BackboneConfig
    adapter: AdapterConfig
    method: MethodConfig = MethodConfig()
    average: Averages = NoAverageConfig()
    """Averages of the weights over the steps, judged beside the weights themselves. A list is allowed."""
    selection: SelectionConfig = SelectionConfig()
    data: DataConfig
    domains: DomainsConfig = DomainsConfig()
    augment: AugmentConfig = AugmentConfig()
    features: FeatureConfig = FeatureConfig()
    prompts: PromptConfig = PromptConfig()
    protocol: ProtocolConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def folder(self, held_out: str) -> Path:
        """Where the run that leaves ``held_out`` out keeps its files."""
        return self.output / self.name / held_out


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read ``path`` and apply overrides such as ``train.steps=200`` (the value is YAML).

    Raises:
        UserError: no such file, not YAML, an override that is not ``key=value``; unknown keys (with the nearest one)
            and values out of range, all of them at once.
    """
    values = read_yaml(path, "recipe")
    mistakes: list[str] = []
    for override in overrides:
        apply_override(values, override, mistakes)
    recipe = checked(values, mistakes)
    if recipe is None or mistakes:
        raise UserError(all_mistakes(mistakes, f"recipe {path}"))
    return recipe


def checked(values: Mapping[str, Any], mistakes: list[str]) -> Recipe | None:
    """The recipe of these values; or None, and what is wrong with them is appended to ``mistakes``."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += [_explain(details) for details in error.errors()]
        return None


def all_mistakes(mistakes: Sequence[str], where: str) -> str:
    """One message for all mistakes of a file."""
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return "\n  ".join([f"{count} in {where}:", *mistakes])


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every field included, as YAML that ``load_recipe`` reads back."""
    header = "# The resolved recipe: every setting of this run, defaults included.\n"
    path.write_text(header + yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values. Unset fields are left out: some configs refuse fields without a meaning for them."""
    return {key: _as_plain(value) for key, value in recipe}


def _as_plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        refuses_unused = isinstance(value, (DataConfig, AugmentConfig))
        return value.model_dump(mode="json", exclude_none=True, exclude_unset=refuses_unused)
    if isinstance(value, list):
        return [_as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for every setting in which two resolved recipes differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _explain(details: Any) -> str:
    """One of pydantic's errors, in a line: where, what, and the nearest key for an unknown one."""
    location = [str(part) for part in details["loc"]]
    names = _known_keys(location[:-1])
    if details["type"] == "extra_forbidden":
        where = ".".join(part for part in location if part not in _tags())
        return f"{where}: unknown key{did_you_mean(location[-1], names)} (known: {', '.join(sorted(names))})"
    where = ".".join(part for part in location if part not in _tags()) or "recipe"
    message = details["msg"].removeprefix("Value error, ")
    given = details.get("input")
    shown = "" if isinstance(given, (dict, BaseModel)) or details["type"] == "missing" else f" (given: {_short(given)})"
    return f"{where}: {message}{shown}"


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _tags() -> set[str]:
    """pydantic puts the chosen kind of adapter into the location; it is no key of the file."""
    return {_kind(model) for model in _adapter_models()}


def _adapter_models() -> tuple[type[Config], ...]:
    union = get_args(AdapterConfig)[0]
    return get_args(union)


def _kind(model: type[Config]) -> str:
    return get_args(model.model_fields["kind"].annotation)[0]


def _known_keys(location: Sequence[str]) -> list[str]:
    """The keys that may stand at this place of a recipe; none where it is no place for keys."""
    model: Any = Recipe
    for part in location:
        if part in _tags():
            continue  # of the adapter, resolved with the step before
        field = model.model_fields.get(part)
        model = None if field is None else field.annotation
        given = [inner for inner in get_args(model) if inner is not type(None)]
        model = given[0] if len(given) == 1 else model  # "X | None": an optional group of settings
        if part == "adapter":
            model = next((m for m in _adapter_models() if _kind(m) in location), None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return sorted(model.model_fields)
