"""Runs that are finished already are found and shown without loading torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

from disam_peft.common.records import read_results
from disam_peft.common.slurm import slurm_task
from disam_peft.config.recipe import Recipe
from disam_peft.config.shapes import DOMAINS
from disam_peft.data.splits import held_out_domains
from disam_peft.errors import Notice
from disam_peft.experiments import run_folder
from disam_peft.experiments.outcome import Outcome, write_joint_results
from disam_peft.experiments.run_cache import RunCache
from disam_peft.experiments.split_data import holding_out


def kept_runs(recipe: Recipe, cache: RunCache) -> list[Outcome] | None:
    """The runs that the recipe asks for, if all of them are finished and of these settings and data.

    Nothing is locked or changed, as nobody writes into a finished run. Where processes share the work, all of them
    look for themselves in ``run.train``.

    Returns:
        None where something is left to do, or where ``run.train`` has to say why it cannot be done.

    Raises:
        UserError: a folder holds another run, or a run of other data; data that cannot be loaded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or slurm_task() is not None:
        return None
    named = recipe.output / recipe.name
    if not any(map(run_folder.is_finished, named.glob("*/"))):  # before data are loaded in vain
        return None
    domains = held_out_domains(recipe.protocol.held_out, _domains(recipe, cache))
    runs = [holding_out(recipe, domain) for domain in domains]
    folders = [run.folder(run.protocol.domain) for run in runs]
    if not all(run_folder.is_finished(folder) and not run_folder.lost(folder) for folder in folders):
        return None
    planned = [run_folder.plan(run, lambda: cache.dataset(recipe.data)) for run in runs]
    say_what_it_rests_on(planned)
    outcomes = [
        Outcome(folder, run.protocol.domain, read_results(folder / run_folder.RESULTS), None)
        for run, folder in zip(runs, folders, strict=True)
    ]
    write_joint_results(outcomes)
    return outcomes


def _domains(recipe: Recipe, cache: RunCache) -> tuple[str, ...]:
    if recipe.data.shapes is not None:  # known without painting anything
        return tuple(sorted(recipe.data.domains or DOMAINS))
    return cache.dataset(recipe.data).present_domains


def say_what_it_rests_on(planned: Iterable[run_folder.Planned]) -> None:
    """Say what the comparison of data rests on where finished runs are kept, each thing once."""
    for basis in dict.fromkeys(basis for plan, basis in planned if plan == "keep" and basis):
        warnings.warn(f"finished runs are kept: {basis}", Notice, stacklevel=3)
