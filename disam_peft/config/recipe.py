"""The typed recipe: a YAML file and ``a.b=c`` overrides become frozen configs, or one error with all mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.average import Averages, NoAverageConfig, kept_averages, require_validations
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.base import Config
from disam_peft.config.data import AugmentConfig, DataConfig, DomainsConfig, FeatureConfig, require_mixable
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.config.feature_adapters import steps_conflict
from disam_peft.config.identity import flat
from disam_peft.config.method import MethodConfig
from disam_peft.config.mistakes import all_mistakes, explain
from disam_peft.config.name_texts import with_names
from disam_peft.config.names import ALL_DOMAINS, folder_name
from disam_peft.config.objective import ObjectiveConfig, adapter_conflict
from disam_peft.config.overrides import apply_overrides
from disam_peft.config.prompts import PromptConfig
from disam_peft.config.protocol import Protocol
from disam_peft.config.run_name import DEFAULT_NAME, NAME, require_name, run_name
from disam_peft.config.selection import SelectionConfig
from disam_peft.config.training import TrainConfig
from disam_peft.config.yaml import read_yaml
from disam_peft.errors import UserError

WRITTEN_BY_US = "# The resolved recipe"
"""How the recipe in a run's folder begins, in every version."""


class Recipe(Config):
    """One experiment: everything that its numbers depend on."""

    name: Annotated[str, Field(pattern=NAME), AfterValidator(require_name)] = DEFAULT_NAME
    """Name of the run's folder under ``output``: letters, digits, ``_``, ``-`` and ``.``, and no name that a run's own
    files or the devices of Windows have. Settings may stand in it: ``"{adapter}-{method}-r{adapter.rank}"``. ``{hash}``
    are eight digits that differ where any setting does that makes another run; the data do not enter."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the split, the batches, the augmentation, dropout and the adapter's initial weights."""
    output: Path = Path("runs")
    """Folder in which all runs are kept."""
    backbone: BackboneConfig
    adapter: AdapterConfig
    method: MethodConfig = MethodConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    average: Averages = NoAverageConfig()
    """Averages of the weights over the steps, judged beside the weights themselves. A list is allowed."""
    selection: SelectionConfig = SelectionConfig()
    data: DataConfig
    domains: DomainsConfig = DomainsConfig()
    augment: AugmentConfig = AugmentConfig()
    features: FeatureConfig = FeatureConfig()
    prompts: PromptConfig = PromptConfig()
    protocol: Protocol
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _mixes_what_it_reads(self) -> Recipe:
        require_mixable(self.augment, self.features, self.objective.loss.kind)
        return self

    @model_validator(mode="after")
    def _warmups_within_run(self) -> Recipe:
        for key in ("rho", "variance_weight"):
            warmup = getattr(getattr(self.method, key), "warmup_steps", 0)
            if warmup >= self.train.steps:
                raise ValueError(
                    f"method.{key}: warmup_steps={warmup} must be less than train.steps={self.train.steps}"
                )
        return self

    @model_validator(mode="after")
    def _name_without_fields(self) -> Recipe:
        object.__setattr__(self, "name", run_name(self.name, self))  # a recipe is frozen
        return self

    @model_validator(mode="after")
    def _validations_for_averages(self) -> Recipe:
        interval = self.train.validation_interval
        require_validations(kept_averages(self.average), math.ceil(self.train.steps / interval), interval)
        return self

    @model_validator(mode="after")
    def _objective_trains_the_adapter(self) -> Recipe:
        if conflict := adapter_conflict(self.objective, self.adapter):
            raise ValueError(conflict)
        return self

    @model_validator(mode="after")
    def _wants_steps_of_what_takes_some(self) -> Recipe:
        averages, sharpness = kept_averages(self.average), self.evaluation.sharpness
        if conflict := steps_conflict(self.adapter, averages, sharpness=sharpness):
            raise ValueError(conflict)
        return self

    def folder(self, held_out: str | None) -> Path:
        """Where the run that leaves ``held_out`` out keeps its files; None: the run that holds nothing out.

        Raises:
            UserError: a domain whose name is too long for a folder.
        """
        return self.output / self.name / (ALL_DOMAINS if held_out is None else folder_name(held_out))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read ``path`` and apply overrides such as ``train.steps=200`` (the value is YAML).

    Raises:
        UserError: no such file, not YAML, a study, an override that is not ``key=value``; unknown keys (with the
            nearest one) and values out of range, all of them at once.
    """
    values = read_yaml(path, "recipe")
    if "arms" in values and "backbone" not in values:
        raise UserError(f"{path} is a study of several arms, and no recipe; run it with: disam-peft compare {path}")
    mistakes: list[str] = []
    apply_overrides(values, overrides, mistakes)

    def texts() -> dict[str, Any]:
        found = read_yaml(path, "recipe", as_text=True)
        apply_overrides(found, overrides, [], as_text=True)
        return found

    recipe = checked(with_names(values, Recipe, texts), mistakes)
    if recipe is None or mistakes:
        raise UserError(all_mistakes(mistakes, f"recipe {path}"))
    return recipe


def checked(values: Mapping[str, Any], mistakes: list[str]) -> Recipe | None:
    """The recipe of these values; or None, and what is wrong with them is appended to ``mistakes``."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += explain(error, Recipe)
        return None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML that ``load_recipe`` reads back."""
    path.write_text(as_yaml(recipe), encoding="utf-8")


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as the text of a file that ``load_recipe`` reads back. Every setting is told: those that
    cannot be written down, since they have no value or no meaning beside others, in comments at the end."""
    written = as_dict(recipe)
    header = f"{WRITTEN_BY_US} of this run. Settings that are not listed have no value, or stand at the end.\n"
    return header + yaml.safe_dump(written, sort_keys=False, allow_unicode=True) + _others(recipe, written)


def _others(recipe: Recipe, written: Mapping[str, Any]) -> str:
    told = flat(written)
    left = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if key not in told}
    unset = [key for key, value in left.items() if value is None]
    defaults = [f"{key}={value}" for key, value in left.items() if value is not None]
    lines = (("Without a value:", unset), ("With their defaults, as far as they have a meaning here:", defaults))
    return "".join(f"# {title} {', '.join(keys)}\n" for title, keys in lines if keys)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, defaults included. Settings without a value are left out, and in ``data`` and
    ``augment`` all that were not set: those refuse a field that has no meaning for them."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    for key in ("data", "augment"):
        values[key] = getattr(recipe, key).model_dump(mode="json", exclude_none=True, exclude_unset=True)
    return values


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
