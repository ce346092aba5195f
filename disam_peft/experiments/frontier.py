"""WiSE-FT of finished runs: their numbers along the line from zero-shot to trained weights, and the best alpha by
source validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import groupby
from pathlib import Path

from disam_peft.adapters.interpolation import require_alpha
from disam_peft.common.files import output_folder
from disam_peft.common.frontier_records import FRONTIER, Frontier, FrontierRow, write_frontier
from disam_peft.common.processes import is_main, on_main
from disam_peft.common.records import ResultRow
from disam_peft.config.evaluation_overrides import recipe_for_evaluation
from disam_peft.config.selection import SelectionConfig
from disam_peft.errors import UserError
from disam_peft.evaluation.metrics import METRIC_NAMES, metrics_of_domains
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.results import Identity, result_rows
from disam_peft.experiments.evaluate import Reloaded, recorded_rows, reload, require_zero_shot_weights
from disam_peft.experiments.run_folder import RECIPE, find_runs
from disam_peft.report.drawing import draw
from disam_peft.report.frontier_figure import frontier_curves
from disam_peft.training.selection import comparable, validation

_ROUNDING, _HALF_ROUNDING = 1e-3, 3e-2
"""How far the likelihood of the same weights may differ from the recorded one, with weights in 32 and in 16 bits; as a
share of it where it is above 1."""


@dataclass(frozen=True)
class RunFrontier:
    """The frontier of one run, and the folder that its files were written to."""

    run: Path
    folder: Path
    frontier: Frontier


def frontier(
    folder: Path, alphas: Sequence[float], overrides: Sequence[str] = (), *, output: Path | None = None
) -> list[RunFrontier]:
    """Evaluate finished runs with the weights ``w0 + alpha (w1 - w0)`` for every alpha; w0 are the zero-shot and w1 the
    trained weights that selection chose (Wortsman et al. 2022, arXiv 2109.01903).

    Every image is decoded, and runs through the frozen part of the model, once for all alphas. Writes
    ``frontier.json``, ``frontier.svg`` and ``frontier.png`` for each run. Of several runs that stand in one folder, as
    those of a recipe for each held-out domain do, that folder gets a figure of their mean.

    The recommended alpha is the best one by source validation, judged as the run judged its states; of equals the one
    nearest to 1, and then the smaller one. No other data are asked for that.

    Args:
        folder: a run, or a folder with runs at any depth; of these, runs that have no frontier are left out with a
            warning that names each and says why.
        alphas: numbers from 0 to ``MOST_ALPHA``; 0 is zero-shot, 1 the trained adapter, more goes beyond it.
        overrides: settings that ``recipe_for_evaluation`` accepts.
        output: where files go, in the places that the runs have in ``folder``; unset: into the runs' folders.

    Raises:
        UserError: no run in ``folder``; an alpha that is none; a setting that may not change; and of a single run, or
            of all runs: an adapter without zero-shot weights, such as a prompt, or data that are no longer those of the
            run.
    """
    places = sorted(set(map(float, alphas)))
    if not places:
        raise UserError("no alpha to evaluate at; give some, for example 0:1.2:0.1")
    for alpha in places:
        require_alpha(alpha)
    runs = find_runs(folder)
    left_out = _LeftOut(folder)
    for run in runs:  # all of them before any model or image is loaded
        recipe_for_evaluation(run / RECIPE, overrides)
        with left_out.unless_possible(run):
            require_zero_shot_weights(run)
    found = []
    for run in runs:
        if run in left_out.why:
            continue
        at = run if output is None else output / run.relative_to(folder)
        with left_out.unless_possible(run):
            found.append(RunFrontier(run, at, _along_the_line(_on_its_own_data(run, overrides), run, places)))
            on_main(partial(_write, found[-1].frontier, at))
    if not found:
        raise UserError(f"no run in {folder} has a frontier:\n  " + "\n  ".join(left_out.why.values()))
    if is_main():
        for _, group in groupby(found, key=lambda of: of.folder.parent):
            together = list(group)
            if len(together) > 1:
                _draw([of.frontier for of in together], together[0].folder.parent)
    return found


class _LeftOut:
    """The runs below a folder that have no frontier, and why."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.why: dict[Path, str] = {}

    @contextmanager
    def unless_possible(self, run: Path) -> Iterator[None]:
        """Inside, an error about the run leaves it out, with a warning. It stays an error where the run itself was
        named."""
        try:
            yield
        except UserError as error:
            about = str(error) if str(error).startswith(str(run)) else f"{run}: {error}"
            if run == self._folder:
                raise UserError(about) from error
            self.why[run] = about
            warnings.warn(f"left out: {about}", stacklevel=4)


def _on_its_own_data(run: Path, overrides: Sequence[str]) -> Reloaded:
    one = reload(run, overrides)
    if not one.is_own:
        raise UserError(
            f"{run} is evaluated along the line from zero-shot to trained weights on the data that it was trained "
            "on, as its source validation recommends an alpha: these are others. Where the same images have "
            "moved, say where they are with data.root=..."
        )
    return one


def _along_the_line(one: Reloaded, run: Path, alphas: Sequence[float]) -> Frontier:
    if "source_validation" not in one.splits:
        raise UserError(
            f"{run} has no source validation, by which alone an alpha is recommended: its runs have seen each other's "
            "held-back images; average runs of one seed, or look at single alphas with disam-peft evaluate --alpha"
        )
    predictions: dict[str, list[Predictions]] = {}
    with one.classifier.interpolation() as move_to:
        for split, dataset in one.splits.items():
            states = [partial(move_to, alpha) for alpha in alphas]
            label = f"{len(alphas)} alphas: {split.replace('_', ' ')}"
            predictions[split] = one.evaluator.predict_states(one.classifier, dataset, states, label)
    identity = Identity.of_trained(one.recipe, one.weights, chosen=True)
    rows, scores = dict[float, list[ResultRow]](), dict[float, tuple[float, ...]]()
    for number, alpha in enumerate(alphas):
        at_alpha = {split: of_split[number] for split, of_split in predictions.items()}
        rows[alpha] = result_rows(identity, at_alpha)
        scores[alpha] = _score(one.recipe.selection, at_alpha)
    half = one.recipe.train.mixed_precision != "no" or one.classifier.backbone.dtype.itemsize < 4
    _compare_with_recorded(run, rows, _HALF_ROUNDING if half else _ROUNDING)
    common = {name: value for name, value in asdict(identity).items() if name != "chosen"}
    return Frontier(
        **common,
        rule=one.recipe.selection.rule,
        metric=one.recipe.selection.metric,
        recommended=recommended(scores),
        rows=[_row(alpha, row) for alpha, of_alpha in rows.items() for row in of_alpha if row.metric in METRIC_NAMES],
    )


def _score(selection: SelectionConfig, predictions: Mapping[str, Predictions]) -> tuple[float, ...]:
    """How the run's rule judges one alpha. It is given source validation alone."""
    return validation(selection, metrics_of_domains(predictions["source_validation"])).score


def recommended(scores: Mapping[float, tuple[float, ...]]) -> float:
    """The alpha with the best score. Of equals it is the one nearest to 1, whose weights are those that the run's other
    numbers are of, and of two as near the smaller one."""
    return max(scores, key=lambda alpha: (comparable(scores[alpha]), -abs(alpha - 1), -alpha))


_FIELDS = [field.name for field in fields(FrontierRow) if field.name != "alpha"]


def _row(alpha: float, row: ResultRow) -> FrontierRow:
    values = {name: getattr(row, name) for name in _FIELDS}
    if row.value is not None and math.isnan(row.value):
        values["value"] = None
    return FrontierRow(alpha, **values)


def _compare_with_recorded(run: Path, rows: Mapping[float, Sequence[ResultRow]], tolerance: float) -> None:
    """Warn where alpha = 0 is not the zero-shot classification, or alpha = 1 not the adapter, that the run recorded."""
    recorded = recorded_rows(run)
    trained = [row for row in recorded if row.method != "zero_shot" and row.chosen is not False]
    for alpha, before in ((0.0, [row for row in recorded if row.method == "zero_shot"]), (1.0, trained)):
        known = {(row.split, row.domain, row.pooled): row.value for row in before if row.metric == "nll"}
        for row in rows.get(alpha, ()):
            value = known.get((row.split, row.domain, row.pooled))
            if row.metric != "nll" or row.value is None or value is None:
                continue
            if not abs(row.value - value) <= tolerance * max(1.0, abs(value)):
                what = "zero-shot classification" if alpha == 0 else "the trained adapter"
                warnings.warn(
                    f"{run}: at alpha={alpha:g}, which is {what}, the NLL on {row.domain} ({row.split}) is "
                    f"{row.value:.4f}, but the run recorded {value:.4f}: the adapter, the model or the precision is "
                    "not what it was then; disam-peft evaluate compares all numbers",
                    stacklevel=4,
                )
                break


def _write(frontier: Frontier, folder: Path) -> None:
    output_folder(folder)
    write_frontier(folder / FRONTIER, frontier)
    _draw([frontier], folder)


def _draw(frontiers: Sequence[Frontier], folder: Path) -> None:
    of = "the mean over runs" if len(frontiers) > 1 else f"{frontiers[0].adapter}, {frontiers[0].method}"
    alt = (
        "Accuracy against accuracy on source validation, and accuracy, likelihood and calibration over alpha, from "
        f"zero-shot to trained weights: {of}"
    )
    draw(Path(FRONTIER).stem, alt, partial(frontier_curves, [("", frontiers)])).save(folder)
