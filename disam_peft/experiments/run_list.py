"""What runs there are in a folder, how far each has come, and what tells them apart. Importing this loads no torch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from disam_peft.common.finished import read_finished
from disam_peft.common.locks import holder
from disam_peft.common.records import METRICS, RESULTS, ResultRow
from disam_peft.common.soup_record import soup_settings
from disam_peft.common.strict_json import parse_json
from disam_peft.config.adapters import adapter_label
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.identity import identifying_settings
from disam_peft.config.names import name_of_folder
from disam_peft.config.recipe import WRITTEN_BY_US, Recipe, load_recipe
from disam_peft.config.uncommon import setting_in_a_name, uncommon_settings
from disam_peft.config.wording import setting_in_words, settings_that_tell
from disam_peft.errors import UserError, did_you_mean
from disam_peft.experiments.run_folder import ADAPTER, RECIPE, is_finished
from disam_peft.report.runs import RunRecord, data_source

State = Literal["finished", "interrupted", "running", "damaged"]
_TAIL_BYTES = 1 << 16
COLUMNS = ("name", "held_out", "backbone", "adapter", "method", "data", "seed", "steps", "state", "result")


@dataclass(frozen=True)
class ListedRun:
    """One run.

    Attributes:
        folder: of the run.
        name: of the folder that the runs of one recipe share.
        held_out: the domain that training does not see; None: it sees every domain.
        data: the last part of their path, or what else names them.
        data_identity: sha256 over what the data are, hex; empty for a run that is not finished, or of version 0.1.
        settings: dotted key -> value of every setting that makes another run.
        words: dotted key -> its value in words, of the settings that have an effect; lists and groups as one value.
        steps: how many were made, as far as they were recorded.
        all_steps: how many there are to make: those that the recipe asks for, or 0 where its adapter takes none.
        problem: what is damaged; empty otherwise.
        result: top-1 on the held-out domain, 0 to 1; without one, the mean over the domains of the test part, or of
            the held-back images. None: there is none yet.
    """

    folder: str
    name: str
    held_out: str | None
    state: State
    backbone: str = ""
    adapter: str = ""
    method: str = ""
    data: str = ""
    data_identity: str = ""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    all_steps: int = 0
    problem: str = ""
    result: float | None = None


def list_runs(folder: Path) -> list[ListedRun]:
    """The runs in ``folder`` and anywhere below it, by path. Nothing is locked or changed.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the one that runs are kept in (output of their recipes)")
    places = {path.parent for name in (RECIPE, METRICS) for path in folder.rglob(name)}
    shown = [place for place in places if not any(part.startswith(".") for part in place.relative_to(folder).parts)]
    return [_listed(place) for place in sorted(shown) if _is_run(place)]


def _is_run(place: Path) -> bool:
    if (place / METRICS).is_file() or (place / RESULTS).is_file():
        return True
    if not (place / RECIPE).is_file():  # a pipe would wait for ever for somebody who writes to it
        return False
    with open(place / RECIPE, "rb") as file:  # not a recipe that somebody keeps there
        return file.read(len(WRITTEN_BY_US)) == WRITTEN_BY_US.encode()


def _listed(place: Path) -> ListedRun:
    name, held_out = place.parent.name, name_of_folder(place.name)
    try:
        if not (place / RECIPE).is_file():
            raise UserError(f"{place / RECIPE} is missing")
        recipe, soup = load_recipe(place / RECIPE), soup_settings(place)
    except UserError as error:
        return ListedRun(str(place), name, held_out, "damaged", problem=_first_line(error))
    known: dict[str, Any] = {
        "folder": str(place),
        "name": name,
        "held_out": recipe.protocol.domain,
        "backbone": _backbone(recipe),
        "adapter": adapter_label(recipe.adapter),
        "method": recipe.method.name,
        "data": data_source(recipe),
        "seed": recipe.seed,
        "settings": identifying_settings(recipe) | soup,
        "words": _words(recipe) | soup,
        "all_steps": 0 if takes_no_steps(recipe.adapter) else recipe.train.steps,
    }
    if holder(place) is not None:
        return ListedRun(**known, state="running", steps=_last_step(place / METRICS))
    if not is_finished(place):
        return ListedRun(**known, state="interrupted", steps=_last_step(place / METRICS))
    try:
        if not (place / ADAPTER).is_dir():
            raise UserError(f"{place / ADAPTER} is missing")
        result, identity = _result(RunRecord(place)), read_finished(place).data
    except (OSError, ValueError) as error:
        return ListedRun(**known, state="damaged", steps=_last_step(place / METRICS), problem=_first_line(error))
    return ListedRun(**known, state="finished", steps=known["all_steps"], result=result, data_identity=identity)


def _backbone(recipe: Recipe) -> str:
    name, tag = recipe.backbone.name, recipe.backbone.pretrained
    return name if tag is None else f"{name}:{tag}"


def _words(recipe: Recipe) -> dict[str, str]:
    follows = () if recipe.train.validate_every is not None else ("train.validate_every",)
    told = {"seed": recipe.seed, **settings_that_tell(recipe)}
    return {key: setting_in_words(key, value) for key, value in told.items() if key not in follows}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _last_step(metrics: Path) -> int:
    """The last step that was recorded, from the end of the file."""
    if not metrics.is_file():  # it may be a pipe
        return 0
    try:
        with open(metrics, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            event = parse_json(line)
        except ValueError:  # cut by a kill, or by where the tail begins
            continue
        if isinstance(event, dict) and event.get("event") == "step" and isinstance(event.get("step"), int):
            return int(event["step"])
    return 0


def _result(record: RunRecord) -> float | None:
    rows = [row for row in record.chosen_rows if row.metric == "top1"]
    held_out = [row for row in rows if row.split == "held_out" and _is_of_held_out(row)]
    means = [
        row for split in ("test", "source_validation") for row in rows if row.split == split and row.pooled == "mean"
    ]
    return next((row.value for row in [*held_out, *means]), None)


def _is_of_held_out(row: ResultRow) -> bool:
    return row.held_out is not None and row.is_of(row.held_out)


def told_apart_by(runs: Iterable[ListedRun]) -> list[str]:
    """The settings, and the seed, that differ between runs which have them; and what soups are made of, which trained
    runs do not have. How runs are evaluated is left out."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    for run in runs:
        if run.settings:
            for key, value in {**run.settings, "seed": run.seed}.items():
                values[key].add(repr(value))
    shown = {"backbone.name", "backbone.pretrained", "adapter.kind", "method.name"}  # these have places of their own
    return sorted(
        key
        for key, found in values.items()
        if (len(found) > 1 or key == "soup") and key not in shown and not key.startswith("evaluation.")
    )


def apart_from_most(runs: Sequence[ListedRun]) -> list[list[str]]:
    """Of each run what tells it from most of the others, in short: ``coral``, ``adapter.rank=16``. What a soup is made
    of is always said."""
    shown = {"backbone.name", "backbone.pretrained", "adapter.kind", "method.name"}  # these have places of their own
    telling = uncommon_settings([run.words for run in runs])
    return [
        [
            setting_in_a_name(key, text)
            for key, text in (found | {key: text for key, text in run.words.items() if key == "soup"}).items()
            if key not in shown
        ]
        for run, found in zip(runs, telling, strict=True)
    ]


def sort_runs(runs: Iterable[ListedRun], by: str) -> list[ListedRun]:
    """The runs ordered by a column or a setting; by ``result`` the best first. What a run lacks comes last.

    Raises:
        UserError: no such column or setting; names the near ones.
    """
    found = list(runs)
    known = [*COLUMNS, *sorted({key for run in found for key in run.settings})]
    if by not in known:
        raise UserError(f"--sort {by}: no column or setting of these runs{did_you_mean(by, known)}; for example result")

    def place(run: ListedRun) -> tuple[bool, float, str]:
        value = getattr(run, by) if by in COLUMNS else run.settings.get(by)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return False, -value if by == "result" else value, ""
        return value is None, 0.0, str(value)

    return sorted(found, key=place)
