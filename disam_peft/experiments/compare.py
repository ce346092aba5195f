"""A comparison: every run of a study is done once, and their records become tables, verdicts and a page."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from disam_peft.common.files import output_folder
from disam_peft.common.locks import InUse, one_at_a_time
from disam_peft.common.progress import track
from disam_peft.common.records import write_json
from disam_peft.common.slurm import leave_the_step
from disam_peft.common.worker_pool import Finished, spread
from disam_peft.config.recipe import Recipe
from disam_peft.errors import Notice, UserError
from disam_peft.experiments import run, run_folder
from disam_peft.experiments.collect import Key, Recorded, collected, key_of, recorded
from disam_peft.experiments.frontier import frontier
from disam_peft.experiments.run_cache import RunCache
from disam_peft.experiments.study import Cell, StudyPlan, load_plan
from disam_peft.experiments.study_readings import has_frontier
from disam_peft.experiments.taking_turns import finished_since, until_one_is_free
from disam_peft.report.cell_records import RECORDS, write_records
from disam_peft.report.comparison import COMPARISON, Comparison
from disam_peft.report.comparison_page import write_comparison


@dataclass(frozen=True)
class Done:
    """How a cell ended. ``error`` is empty where it has its results; ``busy`` says who works on it now."""

    error: str = ""
    warnings: tuple[str, ...] = ()
    busy: str = ""


def compare(
    path: Path | Sequence[Path],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int | None = None,
    seeds: int | None = None,
    held_out: Sequence[str] = (),
    adapters: Sequence[str] = (),
    overwrite: bool = False,
    wait: bool = True,
) -> Comparison:
    """Read a study, a recipe or several with ``load_plan``, then run what has not been run yet with ``run_plan``.

    Raises:
        UserError: a study that cannot be (all mistakes at once); ``jobs`` below 1.
    """
    plan = load_plan(path, overrides, output=output, seeds=seeds, held_out=held_out, adapters=adapters)
    return run_plan(plan, output, jobs=jobs, overwrite=overwrite, wait=wait)


def run_plan(
    plan: StudyPlan,
    output: Path,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    wait: bool = True,
    say: Callable[[str], object] | None = None,
) -> Comparison:
    """Run the cells of a plan that have not been run yet, and write ``comparison.json``, ``.md``, ``.tex`` and
    ``.html`` to ``output``, and ``records.csv``, with which the study need not be run again. A cell that fails is
    recorded, and the others go on.

    Several processes may work on one ``output`` at once, also the tasks of a SLURM step. Each takes the cells that
    nobody else works on, waits for the others at the end, and writes the same page of them all.

    Args:
        jobs: processes, each with its share of the cores. Unset: one per core, or one where there is a GPU.
        overwrite: run every cell again, and replace runs of other recipes that are in the way.
        wait: False: a cell that another process works on is recorded as failed.
        say: takes the line that says at the start what is going to be run; None: nothing is said.

    Raises:
        UserError: ``jobs`` below 1.
    """
    jobs = default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least one process has to do the work")
    leave_the_step()
    began = time.time()
    before = Recorded() if overwrite else recorded(plan)
    todo = _unfinished([cell for cell in plan.cells if key_of(cell) not in before.cells], overwrite)
    if say is not None:
        say(what_is_run(plan, todo, jobs, len(before.cells)))
    ended: dict[Key, Done] = {}
    work = _shared(todo, overwrite, jobs, began, wait=wait)
    for cell, done in track(work, "runs", total=len(todo), also_between_items=True):
        ended[key_of(cell)] = done
    for text in dict.fromkeys(text for done in ended.values() for text in done.warnings):
        warnings.warn(text, stacklevel=2)
    errors = {key: done.error for key, done in ended.items() if done.error}
    comparison, lines = collected(plan, output, errors, before)
    output_folder(output)
    with one_at_a_time(output / ".page.lock"):  # the files of one page belong together
        write_records(output / RECORDS, lines)
        write_json(output / COMPARISON, asdict(comparison))
        write_comparison(comparison, output)
    return comparison


def what_is_run(plan: StudyPlan, todo: Sequence[Cell], jobs: int, taken: int = 0) -> str:
    """The arms, how many runs there are, how many of them are kept, and how many run at once. Cells that share data and
    zero-shot numbers are run by one process in turn.

    Args:
        taken: how many are taken from the study's records.
    """
    kept, at_once = len(plan.cells) - len(todo) - taken, min(jobs, len(_groups(todo)))
    words = f"compare: {len(plan.cells)} runs of {', '.join(plan.arms)}"
    if taken:
        words += f"; {taken} are taken from {plan.records}"
    if kept:
        words += f"; {kept} are finished and kept"
    if todo:
        words += (
            f"; {len(todo)} to do, {at_once} at once" if at_once > 1 else f"; {len(todo)} to do, one after the other"
        )
    return words


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.shared, []).append(cell)
    return list(groups.values())


def _shared(cells: list[Cell], overwrite: bool, jobs: int, began: float, *, wait: bool) -> Iterator[tuple[Cell, Done]]:
    """Every cell once, when it has ended. Those that other processes work on come last."""
    told = False
    while cells:
        busy: list[Cell] = []
        for cell, done in _here(cells, overwrite, began) if jobs == 1 else _elsewhere(cells, overwrite, jobs, began):
            if done.busy and wait:
                busy.append(cell)
            elif done.busy:
                yield cell, replace(done, error=str(InUse(done.busy)))
            else:
                yield cell, done
        cells = busy
        if busy:
            if not told:
                text = f"{len(busy)} runs are worked on by other processes and are waited for (--no-wait does not)"
                warnings.warn(text, Notice, stacklevel=2)
                told = True
            until_one_is_free([cell.folder for cell in busy])


def default_jobs() -> int:
    """One process per core that may be used; one where they would share a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else cores


def is_finished(recipe: Recipe, cache: RunCache) -> bool:
    """Whether the run's folder holds this very run, complete and of the data that are there now."""
    folder = recipe.folder(recipe.protocol.domain)
    if not run_folder.is_finished(folder) or not _is_ours(recipe):
        return False
    try:
        if run_folder.lost(folder):
            return False
        return not run_folder.compared_data(recipe, lambda: cache.dataset(recipe.data)).differences
    except UserError:  # of data that are not there any more, for example: told when it is this cell's turn
        return False


def _unfinished(cells: Sequence[Cell], overwrite: bool) -> list[Cell]:
    cache = RunCache()  # of its own: the images that it holds are let go before processes are started
    return [
        cell
        for cell in cells
        if overwrite or not is_finished(cell.recipe, cache) or not has_frontier(cell.folder, cell.alphas)
    ]


def run_cell(cell: Cell, cache: RunCache, overwrite: bool, began: float) -> Done:
    """Train and judge one cell; what goes wrong is returned, not raised.

    Args:
        began: when the comparison began: a cell that was finished since then was so by another process, and is kept.
    """
    overwrite = overwrite and not finished_since(cell.folder, began)
    # a run of this very recipe that was cut short goes on: nobody has to say so for each of a hundred
    begun = _is_ours(cell.recipe) and not overwrite
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            run.train(cell.recipe, overwrite=overwrite, resume=begun, cache=cache)
            if not has_frontier(cell.folder, cell.alphas):
                frontier(cell.folder, cell.alphas)
        except InUse as error:
            return Done(busy=error.who)
        except Exception as error:
            about = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if isinstance(error, UserError) and not begun and not overwrite and _is_ours(cell.recipe):
                # another process began the cell, and left it, since this one looked
                return run_cell(cell, cache, overwrite, began)
            if "--overwrite" in about:
                about += f". Here --overwrite runs every cell again: to run this one alone again, remove {cell.folder}"
            return Done(about, _texts(caught))
    return Done("", _texts(caught))


def _texts(caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(w.message) for w in caught if _matters(w.category)))


def _matters(category: type[Warning]) -> bool:
    return issubclass(category, UserWarning) and not issubclass(category, Notice)


def _is_ours(recipe: Recipe) -> bool:
    path = recipe.folder(recipe.protocol.domain) / run_folder.RECIPE
    return path.is_file() and not run_folder.changed(recipe)


def _here(cells: Sequence[Cell], overwrite: bool, began: float) -> Iterator[tuple[Cell, Done]]:
    cache = RunCache()
    for cell in cells:
        yield cell, run_cell(cell, cache, overwrite, began)


def _elsewhere(cells: Sequence[Cell], overwrite: bool, jobs: int, began: float) -> Iterator[tuple[Cell, Done]]:
    groups = _groups(cells)
    for cell, result in spread(groups, CellRunner(overwrite, jobs, began), min(jobs, len(groups))):
        if isinstance(result, Finished):
            yield cell, result.value
        else:
            yield cell, Done(f"the process that ran it ended with exit code {result.exit_code}")


class CellRunner:
    """``run_cell`` for a process that lives for many cells."""

    def __init__(self, overwrite: bool, jobs: int, began: float) -> None:
        self._overwrite, self._jobs, self._began = overwrite, jobs, began
        self._cache: RunCache | None = None

    def __call__(self, cell: Cell) -> Done:
        if self._cache is None:  # made in the process itself: images are not sent
            self._cache = RunCache()
            torch.set_num_threads(max(1, torch.get_num_threads() // self._jobs))
        return run_cell(cell, self._cache, self._overwrite, self._began)
