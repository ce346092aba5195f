"""The typed recipe: a YAML file and ``a.b=c`` overrides become frozen configs, or one error with all mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError

from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.average import Averages, NoAverageConfig, kept_averages
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.base import Config
from disam_peft.config.data import AugmentConfig, DataConfig, DomainsConfig, FeatureConfig
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.mistakes import all_mistakes, explain
from disam_peft.config.names import ALL_DOMAINS, folder_name, require_folder_name
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.overrides import apply_override
from disam_peft.config.prompts import PromptConfig
from disam_peft.config.protocol import Protocol
from disam_peft.config.selection import SelectionConfig
from disam_peft.config.training import TrainConfig
from disam_peft.config.yaml import read_yaml
from disam_peft.errors import UserError

WRITTEN_BY_US = "# The resolved recipe"
"""How the recipe in a run's folder begins, in every version."""


class Recipe(Config):
    """One experiment: everything that its numbers depend on."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$"), AfterValidator(partial(require_folder_name, what="name"))]
    """Name of the run's folder under ``output``: letters, digits, ``_``, ``-`` and ``.``, and no name that a run's own
    files or the devices of Windows have."""
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

    def folder(self, held_out: str | None) -> Path:
        """Where the run that leaves ``held_out`` out keeps its files; None: the run that holds nothing out.

        Raises:
            UserError: a domain whose name is too long for a folder.
        """
        return self.output / self.name / (ALL_DOMAINS if held_out is None else folder_name(held_out))


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
        mistakes += explain(error, Recipe)
        return None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML that ``load_recipe`` reads back."""
    path.write_text(as_yaml(recipe), encoding="utf-8")


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as the text of a file that ``load_recipe`` reads back."""
    header = f"{WRITTEN_BY_US} of this run. A setting that is not listed has its default, or no value.\n"
    return header + yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, defaults included. Settings without a value are left out, and in ``data`` and
    ``augment`` all that were not set: those refuse a field that has no meaning for them."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    for key in ("data", "augment"):
        values[key] = getattr(recipe, key).model_dump(mode="json", exclude_none=True, exclude_unset=True)
    return values


def effective(recipe: Recipe) -> dict[str, Any]:
    """All values of the recipe in one spelling, for ``differences``. Recipes that ask for the same run have the same
    values, also where one of them leaves out what the other writes down."""
    values = recipe.model_dump(mode="json")
    averages = [average.model_dump(mode="json") for average in kept_averages(recipe.average)]
    none = NoAverageConfig().model_dump(mode="json")
    values["average"] = averages if len(averages) > 1 else next(iter(averages), none)
    values["objective"]["mean_over"] = recipe.objective.effective_mean_over
    values["train"]["validate_every"] = recipe.train.validation_interval
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
