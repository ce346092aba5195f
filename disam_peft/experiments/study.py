"""A study varies one recipe: every condition, arm, held-out domain and seed together give a cell, which is one run."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disam_peft.config.adapters import ADAPTER_KINDS
from disam_peft.config.data import DataConfig
from disam_peft.config.mistakes import all_mistakes
from disam_peft.config.names import folder_name
from disam_peft.config.overrides import set_key
from disam_peft.config.protocol import ALL, as_held_out, named_domain
from disam_peft.config.recipe import Recipe, checked
from disam_peft.config.shapes import DOMAINS, FAULTS
from disam_peft.config.study import PRESETS, Overrides, Reading
from disam_peft.errors import UserError, did_you_mean
from disam_peft.experiments import study_readings
from disam_peft.experiments.study_files import StudySources, read_sources
from disam_peft.experiments.study_presets import preset
from disam_peft.report.run_measures import MEASURES, ON_HELD_OUT


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    condition: str
    arm: str
    held_out: str | None
    """None where nothing is held out."""
    seed: int
    recipe: Recipe
    alphas: tuple[float, ...] = ()
    """Where between zero-shot and trained weights it is evaluated, too."""

    @property
    def folder(self) -> Path:
        return self.recipe.folder(self.held_out)

    @property
    def shared(self) -> str:
        """Cells with the same value have data and zero-shot numbers in common, so one process runs them in turn."""
        return json.dumps([self.recipe.data.model_dump(mode="json"), self.held_out, self.seed])

    def __str__(self) -> str:
        parts = [*([self.condition] if self.condition else []), self.arm, self.held_out or "all domains"]
        return f"{', '.join(parts)}, seed {self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """A study whose cells are all worked out."""

    title: str
    question: str
    arms: dict[str, Overrides]
    """The presets spelled out for the first condition."""
    conditions: dict[str, Overrides]
    pairs: list[tuple[str, str]]
    metrics: list[str]
    fresh_data: bool
    """Whether every seed has images of its own."""
    cells: list[Cell]
    readings: dict[str, Reading] = field(default_factory=dict)
    records: Path | None = None
    """The file with numbers of runs that need not be run again; it may be missing."""
    baseline: str = ""
    """The arm that others are compared with where nobody names pairs."""


def load_plan(
    path: Path | Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path,
    seeds: int | None = None,
    held_out: Sequence[str] = (),
    adapters: Sequence[str] = (),
) -> StudyPlan:
    """Read a study; a plain recipe, which is compared over the default arms; or several recipes, which are the arms.

    Args:
        overrides: of the recipe, or of all of them, e.g. ``train.steps=200``.
        output: folder of the cells' runs.
        seeds, held_out: in place of the study's.
        adapters: kinds; each is a condition of its own.

    Raises:
        UserError: unknown keys, arms or domains, recipes that cannot be: all mistakes at once.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    changes: dict[str, Any] = {} if seeds is None else {"seeds": seeds}
    if held_out:
        changes["held_out"] = list(held_out)
    mistakes: list[str] = []
    sources = read_sources(paths, overrides, changes, mistakes)
    plan = _Planner(sources, output, adapters, mistakes).plan()
    if mistakes:
        raise UserError(all_mistakes(list(dict.fromkeys(mistakes)), f"study {' '.join(map(str, paths))}"))
    return plan


class _Planner:
    """Works out the cells of a study. What is wrong with it is appended to ``mistakes``."""

    def __init__(self, sources: StudySources, output: Path, adapters: Sequence[str], mistakes: list[str]) -> None:
        self.sources, self.study, self.arms, self.mistakes = sources, sources.study, sources.arms, mistakes
        self.runs = output / "runs"
        self.conditions = self._with_adapters(adapters)
        self._domains: dict[str, tuple[str, ...]] = {}

    def plan(self) -> StudyPlan:
        study = self.study
        pairs = self._pairs()
        for kind, names in (("arms", self.arms), ("conditions", self.conditions)):
            self.mistakes += _folder_mistakes(kind, names)
        seeds = list(range(study.seeds)) if isinstance(study.seeds, int) else study.seeds
        cells = [
            cell
            for condition in self.conditions
            for seed in seeds
            for domain in self._held_out(condition)
            for arm in self.arms
            if (cell := self._cell(condition, arm, domain, seed)) is not None
        ]
        self.mistakes += study_readings.mistakes(study.readings, self.arms, [(c.arm, c.recipe) for c in cells])
        metrics = self._metrics(cells)
        self.mistakes += [
            f"metric: no measure {m!r}{did_you_mean(m, MEASURES)} (known: {', '.join(MEASURES)})"
            for m in metrics
            if m not in MEASURES
        ]
        first = next(iter(self.conditions))
        arms = {
            arm: {**self.sources.shown.get(arm, {}), **self._arm(arm, self._varied(first, arm))} for arm in self.arms
        }
        grouped = {cell.shared: [c for c in cells if c.shared == cell.shared] for cell in cells}
        cells = [cell for group in grouped.values() for cell in group]
        fresh = study.data_seed == "seed" and all(cell.recipe.data.shapes is not None for cell in cells)
        title, question, records = self.sources.title, study.question, self.sources.records
        baseline = study.baseline if study.baseline is not None else next(iter(self.arms))
        return StudyPlan(
            title, question, arms, self.conditions, pairs, metrics, fresh, cells, study.readings, records, baseline
        )

    def _metrics(self, cells: Sequence[Cell]) -> list[str]:
        """The measures of the study. Where no run holds a domain out, what is measured there is no measure."""
        metrics = [self.study.metric] if isinstance(self.study.metric, str) else self.study.metric
        if not cells or any(cell.held_out is not None for cell in cells):
            return metrics
        if "metric" not in self.study.model_fields_set:
            return ["source_top1"]
        self.mistakes += [
            f"metric: {name} is measured on the held-out domain, and with protocol=all nothing is held out; use "
            "source_top1"
            for name in metrics
            if name in ON_HELD_OUT
        ]
        return metrics

    def _cell(self, condition: str, arm: str, held_out: str | None, seed: int) -> Cell | None:
        values = self._varied(condition, arm)
        for key, value in self._arm(arm, values).items():
            set_key(values, key, copy.deepcopy(value), self.mistakes)
        values["seed"], values["name"] = seed, f"seed{seed}"
        try:
            values["output"] = str(self.runs / _slug(condition) / _slug(arm))
        except UserError:
            return None  # told once for each name, not for each cell
        if held_out is not None:
            set_key(values, "protocol.held_out", as_held_out(held_out), self.mistakes)
        shapes = _shapes(values)
        if shapes is not None:
            if self.study.data_seed == "seed":
                shapes["seed"] = seed
            if held_out is not None and any(shapes.get(fault) for fault in FAULTS):
                shapes.setdefault("target", held_out)
        found: list[str] = []
        recipe = checked(values, found)
        where = ", ".join(part for part in (condition and f"condition {condition!r}", f"arm {arm!r}") if part)
        self.mistakes += [f"{where}: {mistake}" for mistake in found]
        alphas = study_readings.alphas(self.study.readings, arm)
        return None if recipe is None else Cell(condition, arm, held_out, seed, recipe, alphas)

    def _varied(self, condition: str, arm: str | None = None) -> dict[str, Any]:
        """The values of the recipe that an arm varies, under a condition."""
        values = copy.deepcopy(self.sources.of(arm))
        for key, value in self.conditions[condition].items():
            set_key(values, key, copy.deepcopy(value), self.mistakes)
        return values

    def _arm(self, name: str, values: Mapping[str, Any]) -> Overrides:
        overrides = self.arms[name]
        if overrides is not None:
            return overrides
        if name not in PRESETS:
            self.mistakes.append(
                f"arms.{name}: has no overrides and is none of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}"
            )
            return {}
        return preset(name, values)

    def _held_out(self, condition: str) -> list[str] | list[None]:
        values = self._varied(condition)
        protocol = values.get("protocol")
        wanted = self.study.held_out
        if protocol == ALL or (isinstance(protocol, dict) and protocol.get("kind") == ALL):
            if wanted is not None:
                self.mistakes.append("held_out: has no meaning with protocol=all, which holds nothing out; remove it")
            return [None]
        if wanted is None:
            wanted = protocol.get("held_out") if isinstance(protocol, dict) else None
        if wanted is None:
            self.mistakes.append("held_out: name the domains to hold out, or all")
            return []
        known = self._known_domains(values)
        names = [wanted] if isinstance(wanted, str) else wanted
        if names == [ALL]:
            return list(known)
        names = [named_domain(name, known) for name in names]
        self.mistakes += [
            f"held_out: no domain {name!r}{did_you_mean(name, known)} (found: {', '.join(known)})"
            for name in names
            if known and name not in known
        ]
        return [name for name in names if not known or name in known]

    def _known_domains(self, values: dict[str, Any]) -> tuple[str, ...]:
        data = values.get("data")
        if _shapes(values) is not None and isinstance(data, dict):
            return tuple(data.get("domains") or DOMAINS)
        key = json.dumps(data, default=str)
        if key not in self._domains:
            probe = {**values, "name": "probe", "protocol": {"held_out": ALL}}
            recipe = checked(probe, self.mistakes)
            self._domains[key] = () if recipe is None else _present_domains(recipe.data)
        return self._domains[key]

    def _with_adapters(self, adapters: Sequence[str]) -> dict[str, Overrides]:
        """Every condition with every adapter; the recipe's own settings are kept for its own kind."""
        conditions = self.study.conditions
        if not adapters:
            return conditions
        self.mistakes += [
            f"adapters: {kind!r} is none of {', '.join(ADAPTER_KINDS)}{did_you_mean(kind, ADAPTER_KINDS)}"
            for kind in adapters
            if kind not in ADAPTER_KINDS
        ]
        if self.sources.own:
            self.mistakes.append("adapters: arms have recipes of their own, with their adapters; leave --adapters out")
        own = self.sources.base.get("adapter")
        own_kind = own.get("kind") if isinstance(own, dict) else None
        return {
            f"{name}, {kind}" if name else kind: {**({} if kind == own_kind else {"adapter": {"kind": kind}}), **given}
            for name, given in conditions.items()
            for kind in adapters
        }

    def _pairs(self) -> list[tuple[str, str]]:
        study, arms = self.study, [*self.arms, *self.study.readings]
        named = [*([study.baseline] if study.baseline is not None else []), *_flat(study.comparisons or [])]
        self.mistakes += [
            f"no arm {name!r} to compare with{did_you_mean(name, arms)} (arms: {', '.join(arms)})"
            for name in named
            if name not in arms
        ]
        if study.comparisons is not None:
            return study.comparisons
        baseline = study.baseline if study.baseline is not None else arms[0]
        known = [("disam", "sam"), ("disam", "erm_2x"), ("disam_gsam", "gsam"), ("disam_sagm", "sagm")]
        usual = [pair for pair in known if set(pair) <= set(arms)]
        pairs = [(arm, baseline) for arm in arms if arm != baseline] + usual
        return [pair for i, pair in enumerate(pairs) if not {pair, pair[::-1]} & set(pairs[:i])]


def _present_domains(config: DataConfig) -> tuple[str, ...]:
    from disam_peft.data.load import load  # here, so that mistakes in a study are found before torch is imported

    return load(config).present_domains


def _shapes(values: Mapping[str, Any]) -> dict[str, Any] | None:
    data = values.get("data")
    shapes = data.get("shapes") if isinstance(data, dict) else None
    return shapes if isinstance(shapes, dict) else None


def _slug(name: str) -> str:
    """The folder name of a condition or an arm. The unnamed condition has none: its runs lie one level higher.

    Raises:
        UserError: the name is too long for a folder.
    """
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return folder_name(plain or name) if name else ""


def _folder_mistakes(kind: str, names: Iterable[str]) -> list[str]:
    """What is wrong with the names of arms or of conditions: each needs a folder, which no other one has."""
    owners: dict[str, str] = {}
    mistakes = []
    for name in names:
        try:
            slug = _slug(name).casefold()  # some file systems do not tell Photo and photo apart
        except UserError as error:
            mistakes.append(f"{kind}: {error}")
            continue
        if slug in owners:
            mistakes.append(f"{kind}: two of the names {owners[slug]}, {name} give the same folder; rename one")
        owners.setdefault(slug, name)
    return mistakes


def _flat(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [name for pair in pairs for name in pair]
