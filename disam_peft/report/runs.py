"""Finding and reading the records of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from disam_peft.common.finished import read_finished
from disam_peft.common.frontier_records import FRONTIER, Frontier, read_frontier
from disam_peft.common.prediction_table import PREDICTIONS, PredictionTable, read_predictions
from disam_peft.common.records import (
    CONFUSION,
    ERRORS,
    LOSS_SLICE,
    METRICS,
    RESULTS,
    SHARPNESS,
    Confusion,
    ExampleError,
    LossSlice,
    ResultRow,
    read_events,
    read_list,
    read_results,
)
from disam_peft.common.run_images import IMAGES, read_images
from disam_peft.common.soup_record import soup_settings
from disam_peft.config.data import SOURCE_SETTINGS
from disam_peft.config.evaluation import SharpnessConfig
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.config.wording import settings_that_tell
from disam_peft.errors import UserError
from disam_peft.report.result_tables import METHOD_TITLES, training_domains

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RunData:
    """What the data of a run are.

    Attributes:
        identity: equal where two runs have the same images, classes and domains.
        source: what the recipe calls the data; empty where there is no recipe.
        images: how many; None where a run of 0.1 did not record them.
    """

    identity: str
    source: str = ""
    images: int | None = None


_NOT_IN_TABLES = ("samples", "rhos", "slice_points", "slice_radius", "slice_directions")


@dataclass(frozen=True)
class RunRecord:
    """The records of one run. Results and events must exist; other records are empty where the run wrote none."""

    folder: Path

    @cached_property
    def rows(self) -> list[ResultRow]:
        path = self.folder / RESULTS
        rows = read_results(path)
        if unknown := sorted({row.method for row in rows} - METHOD_TITLES.keys()):
            raise UserError(f"{path}: method {unknown[0]!r} is none of {', '.join(METHOD_TITLES)}")
        if all(row.method == "zero_shot" for row in rows):
            raise UserError(f"{path} has no row of a trained adapter, so the run has no result; --resume completes it")
        return rows

    @cached_property
    def recipe(self) -> Recipe | None:
        """As the run recorded it; None where there is none."""
        path = self.folder / RECIPE
        return load_recipe(path) if path.is_file() else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of what tells the run from others but for seed, data and held-out domain, see
        ``settings_that_tell``. Without a recipe, what its rows say."""
        if self.recipe is None:
            row = self.trained
            return {"backbone.name": row.backbone, "adapter.kind": row.adapter, "method.name": row.method}
        return settings_that_tell(self.recipe) | soup_settings(self.folder)

    @cached_property
    def data(self) -> RunData:
        """By the content of the images; of a run of 0.1, which did not record it, by what its recipe says."""
        source = "" if self.recipe is None else data_source(self.recipe)
        if (self.folder / IMAGES).is_file():
            images = read_images(self.folder / IMAGES)
            return RunData(images.identity, source, len(images))
        told = (
            {} if self.recipe is None else self.recipe.data.model_dump(mode="json", exclude={"pixel_store", "verify"})
        )
        return RunData(f"as the recipe says: {json.dumps(told, sort_keys=True)}", source)

    @cached_property
    def backbone(self) -> str:
        """The identity of its weights and of all else that its output depends on; empty where a run of an older version
        did not record it."""
        return read_finished(self.folder).backbone

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        recorded = read_events(self.folder / METRICS, "step")
        return [{"loss": None, "domain_loss": {}, "domain_weight": {}, **step} for step in recorded]

    @cached_property
    def inferred(self) -> list[dict[str, Any]]:
        """How domains were inferred, where they were."""
        return read_events(self.folder / METRICS, "inferred_domains")

    @cached_property
    def sharpness(self) -> list[ResultRow]:
        path = self.folder / SHARPNESS
        return read_results(path) if path.is_file() else []

    @property
    def sharpness_settings(self) -> dict[str, Any]:
        """How its sharpness was measured, as far as the numbers of a table depend on it: by the recipe, or by default
        where the recipe does not say it. The number of images stands in the rows."""
        told = None if self.recipe is None else self.recipe.evaluation.sharpness
        values = (SharpnessConfig() if told is None else told).model_dump()
        return {key: value for key, value in values.items() if key not in _NOT_IN_TABLES}

    @cached_property
    def loss_slices(self) -> list[LossSlice]:
        path = self.folder / LOSS_SLICE
        found = read_list(path, LossSlice) if path.is_file() else []
        for plane in found:
            points = len(plane.coordinates)
            if points == 0 or {len(plane.losses), *map(len, plane.losses)} != {points} or len(plane.directions) != 2:
                raise UserError(f"{path}: the losses are no {points} times {points} points in two directions")
        return found

    @cached_property
    def confusions(self) -> list[Confusion]:
        path = self.folder / CONFUSION
        found = read_list(path, Confusion) if path.is_file() else []
        for matrix in found:
            classes = range(len(matrix.classes))
            for entry in matrix.counts:
                if len(entry) != 3 or entry[0] not in classes or entry[1] not in classes or entry[2] < 0:
                    raise UserError(f"{path}: {entry} is not [true, predicted, count] of {len(classes)} classes")
        return found

    @cached_property
    def errors(self) -> list[ExampleError]:
        path = self.folder / ERRORS
        return read_list(path, ExampleError) if path.is_file() else []

    @cached_property
    def predictions(self) -> PredictionTable | None:
        """For the run's own data; None where it has none."""
        path = self.folder / PREDICTIONS
        return read_predictions(path) if path.is_file() else None

    @cached_property
    def frontier(self) -> Frontier | None:
        """Its numbers between zero-shot and trained weights, where ``disam-peft frontier`` has left them."""
        path = self.folder / FRONTIER
        return read_frontier(path) if path.is_file() else None

    @property
    def trained(self) -> ResultRow:
        """A row of the trained adapter, for its backbone, adapter, method, seed and held-out domain."""
        return next(row for row in self.rows if row.method != "zero_shot")

    @property
    def chosen_rows(self) -> list[ResultRow]:
        """The rows of the trained adapter with the weights that selection chose: the weights themselves, or the average
        of them that was best on source validation. Runs of 0.1 did not mark them, and wrote them last."""
        trained = [row for row in self.rows if row.method != "zero_shot"]
        marked = [row for row in trained if row.chosen]
        return marked or [row for row in trained if row.weights == trained[-1].weights]

    @property
    def place(self) -> str:
        """The last two folders of its path: the name and the held-out domain."""
        return "/".join(self.folder.parts[-2:])

    @property
    def title(self) -> str:
        row = self.trained
        return f"{row.adapter}, {row.method}, {training_domains(row.held_out)}, seed {row.seed}"


def data_source(recipe: Recipe) -> str:
    """The last part of the path of the data, or what else names them."""
    given = {name: getattr(recipe.data, name) for name in SOURCE_SETTINGS}
    name, value = next((name, value) for name, value in given.items() if value is not None)
    return Path(value).name or str(value) if name != "shapes" else "DomainShapes"


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """The finished runs in ``folders`` and anywhere below them, by path.

    Raises:
        UserError: there is none.
    """
    given = list(folders)
    found = sorted(
        {path.parent for folder in given for path in folder.rglob(RESULTS) if (path.parent / METRICS).is_file()}
    )
    if not found:
        raise UserError(f"no finished run in {', '.join(map(str, given))}: expected {RESULTS} beside {METRICS}")
    return [RunRecord(folder) for folder in found]
