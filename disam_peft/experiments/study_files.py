"""Reads a study and the recipes that it varies, with the settings of the command line in all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from disam_peft.config.mistakes import all_mistakes, explain
from disam_peft.config.name_texts import with_names
from disam_peft.config.overrides import apply_overrides
from disam_peft.config.recipe import Recipe
from disam_peft.config.study import RECIPE, Overrides, Study
from disam_peft.config.yaml import read_yaml
from disam_peft.errors import UserError


@dataclass(frozen=True)
class StudySources:
    """What a study is made of.

    Attributes:
        arms: name -> overrides, without ``recipe``; None: the arm is a preset.
        base: the values of the recipe that the arms vary, overrides applied. Where every arm has a recipe of its own,
            that of the first.
        own: arm -> the values of its own recipe, overrides applied.
        shown: name -> what a page says of the arm, the file of its recipe included.
        records: the file with numbers of runs that were done before.
    """

    title: str
    study: Study
    arms: dict[str, Overrides | None]
    base: dict[str, Any]
    own: dict[str, dict[str, Any]]
    shown: dict[str, Overrides]
    records: Path | None = None

    def of(self, arm: str | None) -> dict[str, Any]:
        """The values that an arm varies."""
        return self.base if arm is None else self.own.get(arm, self.base)


def read_sources(
    paths: Sequence[Path], overrides: Sequence[str], changes: Mapping[str, Any], mistakes: list[str]
) -> StudySources:
    """Read a study file, a recipe, or several recipes, each of which becomes an arm with the name of its file.

    Args:
        overrides: of every recipe, e.g. ``train.steps=200``.
        changes: keys of the study and what they are in place of what the file says.

    Raises:
        UserError: files that cannot be read, unknown keys of the study, two recipes whose files have one name.
    """
    path = paths[0]
    where = path if len(paths) == 1 else path.parent / f"of {len(paths)} recipes"
    values = _study_values(paths) | dict(changes)
    try:
        study = Study.model_validate(with_names(values, Study, lambda: _study_values(paths, as_text=True)))
    except ValidationError as error:
        raise UserError(all_mistakes(explain(error, Study), f"study {where}")) from error

    def values_of(recipe: Path | dict[str, Any], texts: Callable[[], Path | dict[str, Any]]) -> dict[str, Any]:
        found = _recipe_values(path, recipe)
        apply_overrides(found, overrides, mistakes)

        def as_texts() -> dict[str, Any]:
            written = _recipe_values(path, texts(), as_text=True)
            apply_overrides(written, overrides, [], as_text=True)
            return written

        return with_names(found, Recipe, as_texts)

    given: dict[str, Overrides | None] = dict.fromkeys(study.arms) if isinstance(study.arms, list) else dict(study.arms)
    arms = {
        arm: None if keys is None else {k: v for k, v in keys.items() if k != RECIPE} for arm, keys in given.items()
    }
    of_arms = {arm: _path_or_values(keys[RECIPE]) for arm, keys in given.items() if keys and RECIPE in keys}
    own = {
        arm: values_of(
            recipe,
            lambda arm=arm: _path_or_values(_study_values(paths, as_text=True)["arms"][arm][RECIPE]),  # type: ignore[misc]
        )
        for arm, recipe in of_arms.items()
    }
    if study.recipe is not None:
        base = values_of(study.recipe, lambda: _path_or_values(_study_values(paths, as_text=True)[RECIPE]))
    else:
        base = next(iter(own.values()))
    mistakes += _other_data(base, own)
    shown = {arm: {RECIPE: str(of) if isinstance(of, Path) else "its own"} for arm, of in of_arms.items()}
    title = path.stem if len(paths) == 1 else " and ".join(arms)
    records = None if study.records is None else path.parent / study.records
    return StudySources(title, study, arms, base, own, shown, records)


def _study_values(paths: Sequence[Path], *, as_text: bool = False) -> dict[str, Any]:
    """The values of a study file. A plain recipe becomes the study of it, and several recipes that of them as arms.

    Raises:
        UserError: a file that is no recipe among several; two of one name.
    """
    if len(paths) == 1:
        values = read_yaml(paths[0], "study", as_text=as_text)
        return {RECIPE: values} if RECIPE not in values and "backbone" in values else values
    arms: dict[str, Any] = {}
    for path in paths:
        values = read_yaml(path, "recipe", as_text=as_text)
        if "backbone" not in values:
            raise UserError(
                f"{path} is no recipe: it has no backbone; of several files each must be one, or give one study"
            )
        if path.stem in arms:
            raise UserError(
                f"two recipes are called {path.stem}.yaml, and the name of a file is that of its arm; rename one"
            )
        arms[path.stem] = {RECIPE: values}
    return {"arms": arms}


def _path_or_values(recipe: Any) -> Path | dict[str, Any]:
    return recipe if isinstance(recipe, dict) else Path(recipe)


def _recipe_values(path: Path, recipe: Path | dict[str, Any], *, as_text: bool = False) -> dict[str, Any]:
    """The values of a recipe of the study at ``path``."""
    if isinstance(recipe, dict):
        return copy.deepcopy(recipe)
    return read_yaml(path.parent / recipe, "recipe", as_text=as_text)


def _other_data(base: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Arms are compared on the same images: which of them have others."""

    def images(values: Mapping[str, Any]) -> dict[str, Any]:
        protocol = values.get("protocol")
        if isinstance(protocol, Mapping):
            protocol = {key: value for key, value in protocol.items() if key != "held_out"}
        return {"data": values.get("data"), "protocol": protocol}

    return [
        f"arms.{arm}: its recipe has another {section} than the others ({found!r}, and not {images(base)[section]!r}); "
        f"arms are compared on the same images: set {section} for all on the command line"
        for arm, values in own.items()
        for section, found in images(values).items()
        if found != images(base)[section]
    ]
