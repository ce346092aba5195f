"""Which runs differ in nothing but their seed and held-out domain, and which settings tell the others apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disam_peft.common.records import ResultRow
from disam_peft.config.uncommon import setting_in_a_name, uncommon_settings
from disam_peft.config.wording import setting_in_words
from disam_peft.report.result_tables import METHOD_TITLES
from disam_peft.report.runs import RunData, RunRecord

ZERO_SHOT_SETTINGS = ("backbone", "prompts", "train.mixed_precision")
"""What zero-shot numbers depend on beside the data: settings, or groups of them."""
BACKBONE_IDENTITY = "backbone.identity"
"""Stands among the settings where backbones of equal settings are other ones, because their files changed."""
FOLDER = "folder"
"""Stands in place of a setting where runs of equal settings, seed and data have other numbers nevertheless."""


@dataclass(frozen=True)
class Configuration:
    """Runs that are equal but for seed and held-out domain.

    Attributes:
        data: the images of all of them.
        settings: dotted key -> value of everything that tells runs apart.
        runs: one for each seed and held-out domain.
    """

    data: RunData
    settings: Mapping[str, Any]
    runs: tuple[RunRecord, ...]

    @property
    def backbone(self) -> str:
        return self.runs[0].trained.backbone

    @property
    def adapter(self) -> str:
        return self.runs[0].trained.adapter

    @property
    def method(self) -> str:
        return self.runs[0].trained.method

    @property
    def tells_when_to_validate(self) -> bool:
        """Whether its recipes say so, and do not leave it to the number of steps."""
        recipe = self.runs[0].recipe
        return recipe is not None and recipe.train.validate_every is not None

    @property
    def zero_shot_key(self) -> str:
        """Equal for configurations that start from the same zero-shot model on the same data."""
        return zero_shot_key(self.data, self.settings)

    def without(self, held_out: str | None) -> Configuration | None:
        """The runs that hold this domain out; None if there is none."""
        runs = tuple(run for run in self.runs if run.trained.held_out == held_out)
        return Configuration(self.data, self.settings, runs) if runs else None


def zero_shot_key(data: RunData, settings: Mapping[str, Any]) -> str:
    """Everything that the zero-shot numbers of a run depend on, as text."""
    parts = {key: value for key, value in settings.items() if is_of_zero_shot(key)}
    return json.dumps([data.identity, parts], sort_keys=True, default=str)


def is_of_zero_shot(key: str) -> bool:
    """Whether zero-shot numbers depend on this setting."""
    return any(key == name or key.startswith(f"{name}.") for name in ZERO_SHOT_SETTINGS)


def configurations(runs: Iterable[RunRecord]) -> list[Configuration]:
    """The runs by settings and data, in the order in which they are found.

    A run that is there twice, in a copy of its folder, counts once. Where two runs of equal settings, data, seed and
    held-out domain have other numbers (other machines, other versions), each gets a configuration of its own, told
    apart by its folder.
    """
    given = list(runs)
    by_key: dict[str, list[RunRecord]] = {}
    settings_of = dict(zip(map(id, given), settings_with_backbones(given), strict=True))
    for run in given:
        key = json.dumps([run.data.identity, settings_of[id(run)]], sort_keys=True, default=str)
        by_key.setdefault(key, []).append(run)
    found = []
    for members in by_key.values():
        settings = settings_of[id(members[0])]
        distinct: dict[tuple[str | None, int, str], RunRecord] = {}
        for run in members:
            distinct.setdefault((run.trained.held_out, run.trained.seed, str(_numbers(run.rows))), run)
        kept = list(distinct.values())
        if len({_trained(run) for run in kept}) == len(kept):
            found.append(Configuration(members[0].data, settings, tuple(kept)))
            continue
        by_place: dict[str, list[RunRecord]] = {}
        for run, place in zip(kept, _places(kept), strict=True):
            by_place.setdefault(place, []).append(run)
        for place, there in by_place.items():
            found.append(Configuration(there[0].data, {**settings, FOLDER: place}, tuple(there)))
    return found


def settings_with_backbones(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The settings of each run, with the identity of its backbone where runs of equal settings of it have several."""
    named = [
        _as_text({key: value for key, value in run.settings.items() if key.startswith("backbone")}) for run in runs
    ]
    identities: dict[str, set[str]] = {}
    for name, run in zip(named, runs, strict=True):
        if run.backbone:
            identities.setdefault(name, set()).add(run.backbone)
    return [
        {**run.settings, BACKBONE_IDENTITY: run.backbone[:12] or "not recorded"}
        if len(identities.get(name, ())) > 1
        else run.settings
        for name, run in zip(named, runs, strict=True)
    ]


def _trained(run: RunRecord) -> tuple[str | None, int]:
    return run.trained.held_out, run.trained.seed


def _places(runs: Sequence[RunRecord]) -> list[str]:
    """The folder of each run, which has the runs of all held-out domains: as much of the end of its path as is needed
    to tell runs of the same held-out domain and seed apart."""
    parents = [run.folder.parent.parts for run in runs]
    for depth in range(1, max(map(len, parents)) + 1):
        places = ["/".join(parts[-depth:]) for parts in parents]
        if len({(place, *_trained(run)) for place, run in zip(places, runs, strict=True)}) == len(runs):
            return [place or run.folder.as_posix() for place, run in zip(places, runs, strict=True)]
    return [run.folder.as_posix() for run in runs]


def _numbers(rows: Sequence[ResultRow]) -> list[tuple[Any, ...]]:
    found = [(row.method, row.split, row.domain, row.pooled or "", row.metric, row.weights, row.value) for row in rows]
    return sorted(found, key=str)


def telling_apart(found: Sequence[Configuration]) -> list[str]:
    """The settings in which configurations differ, in the order of a recipe. Settings of the method that follow from
    its name are left out."""
    keys = list(dict.fromkeys(key for one in found for key in one.settings))
    differing = [key for key in keys if len(_texts(found, key)) > 1]

    def follows(key: str) -> bool:
        """Whether it has one value for each method, or (what losses are averaged over) for each choice of penalties."""
        if not key.startswith("method.") and key != "objective.mean_over":
            return False
        by_cause: dict[str, list[Configuration]] = {}
        for one in found:
            cause = one.method if key.startswith("method.") else _as_text(one.settings.get("objective.penalties"))
            by_cause.setdefault(cause, []).append(one)
        return all(len(_texts(members, key)) <= 1 for members in by_cause.values())

    if not any(one.tells_when_to_validate for one in found):
        differing = [key for key in differing if key != "train.validate_every"]  # it follows from train.steps
    return [key for key in differing if not follows(key)]


def _texts(found: Iterable[Configuration], key: str) -> set[str]:
    """The values of a setting; one of the method has none where the method does not use it."""
    return {_as_text(one.settings.get(key)) for one in found if key in one.settings or not key.startswith("method.")}


def configuration_titles(found: Sequence[Configuration]) -> list[str]:
    """The method of each, with the settings that tell it apart where several share one: those that most of them do not
    have."""
    titles = [METHOD_TITLES[one.method] for one in found]
    for method in dict.fromkeys(titles):
        places = [place for place, title in enumerate(titles) if title == method]
        same = [found[place] for place in places]
        rows = [
            {
                key: setting_in_words(key, one.settings.get(key))
                for key in telling_apart(same)
                if key in one.settings or not key.startswith("method.")
            }
            for one in same
        ]
        for place, telling in zip(places, uncommon_settings(rows), strict=True):
            told = [setting_in_a_name(key.split(".")[-1], text) for key, text in telling.items()]
            titles[place] = f"{method} ({', '.join(told)})" if told else method
    return titles


def data_titles(found: Sequence[Configuration]) -> dict[str, str]:
    """identity -> how the data are called in titles; empty where all configurations have the same."""
    data = {one.data.identity: one.data for one in found}
    if len(data) < 2:
        return dict.fromkeys(data, "")
    sources = [one.source for one in data.values()]
    titles = {}
    for number, (identity, one) in enumerate(data.items(), start=1):
        name = one.source or f"data {number}"
        told = f"{one.images} images, sha256 {identity[:8]}" if one.images is not None else "content not recorded"
        titles[identity] = f"{name} ({told})" if sources.count(one.source) > 1 or not one.source else name
    if len(set(titles.values())) < len(titles):
        titles = {identity: f"{title}, data {n}" for n, (identity, title) in enumerate(titles.items(), start=1)}
    return titles


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
