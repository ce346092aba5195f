"""The verbs that train: ``train``, ``sweep`` and ``compare``.

Each reads and checks its recipe or study file before it imports what trains: a mistake in a file is found within a
second, and importing torch and the model libraries takes several.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disam_peft.cli.options import Overrides, names, numbers
from disam_peft.cli.terminal import say
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from disam_peft.experiments.outcome import Outcome


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace runs that are in the way.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with runs that did not finish, from their last checkpoints.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="A run that another process works on is an error; it is not waited for.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop before the first step; show the plan, and estimate time and memory.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and the results.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also say every recorded step, and more.")] = False,
) -> None:
    """Train an adapter without the held-out domain, and judge it there beside zero-shot CLIP; or on all domains."""
    from disam_peft.config.adapters import export_format
    from disam_peft.config.recipe import load_recipe

    if quiet and verbose:
        raise UserError("--quiet says less and --verbose says more; choose one of them")
    checked = load_recipe(recipe, overrides or [])
    from disam_peft.common import progress

    if quiet and not dry_run:
        progress.silence()
    told = None if quiet and not dry_run else say
    if dry_run:
        from disam_peft.experiments import run
        from disam_peft.experiments.narrator import Narrator

        narrator = Narrator(told, verbose=verbose)
        run.dry_run(checked, overwrite=overwrite, resume=resume, narrator=narrator)
        return
    from disam_peft.experiments.kept_runs import kept_runs
    from disam_peft.experiments.run_cache import RunCache

    cache = RunCache()
    outcomes = None if overwrite else kept_runs(checked, cache)
    if outcomes is None:
        from disam_peft.experiments import run
        from disam_peft.experiments.narrator import Narrator

        narrator = Narrator(told, verbose=verbose)
        outcomes = run.train(
            checked, overwrite=overwrite, resume=resume, wait=not no_wait, cache=cache, narrator=narrator
        )
    _print_outcomes(outcomes, quiet=quiet, export_to=export_format(checked.adapter))


def _print_outcomes(outcomes: list[Outcome], *, quiet: bool, export_to: str) -> None:
    from disam_peft.cli.output import print_held_out
    from disam_peft.common.processes import is_main
    from disam_peft.common.records import RESULTS

    if not is_main():
        return
    for outcome in outcomes:
        if outcome.fit is None:
            say(f"{outcome.folder}: this very run is finished already; kept (--overwrite runs it again)")
    print_held_out([row for outcome in outcomes for row in outcome.rows])
    for outcome in outcomes:
        if outcome.fit is not None:
            fit = outcome.fit
            say(
                f"{outcome.folder}: {f'best step {fit.best_step}' if fit.best_step else 'fitted, without a step'}"
                + (f" of {fit.weights}" if len(fit.states) > 1 else "")
                + _training_loss(outcome)
                + (f", {fit.skipped_steps} steps skipped" if fit.skipped_steps else "")
            )
    first = outcomes[0].folder
    if quiet:
        return
    say(f"results: {first / RESULTS}, the adapter in {first / 'adapter'}" + _and_more(outcomes))
    say(f"next: disam-peft evaluate {first}   |   disam-peft export {first} --to {export_to} --output DIR")


def _training_loss(outcome: Outcome) -> str:
    found = outcome.training_loss()
    if found is None:
        return ""
    first, last, count = found
    return f", training loss {first:.4f} -> {last:.4f} (means of the first and last {count} recorded steps)"


def _and_more(outcomes: list[Outcome]) -> str:
    return "" if len(outcomes) == 1 else f"; likewise in the folders of the other {len(outcomes) - 1}"


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with a linear probe.")],
    overrides: Overrides = None,
    rho: Annotated[str, typer.Option(help="Radii, e.g. 0.02,0.05,0.1. Unset: the recipe's.")] = "",
    variance_weight: Annotated[str, typer.Option(help="Values of lambda, e.g. 0,0.1,0.5.")] = "",
    learning_rate: Annotated[str, typer.Option(help="Learning rates, e.g. 1e-3,1e-2.")] = "",
) -> None:
    """Try every combination for a linear probe in one run, judged on the source domains alone."""
    from disam_peft.config.recipe import load_recipe
    from disam_peft.config.sweep import check_sweep

    checked = load_recipe(recipe, overrides or [])
    learning_rates = numbers("--learning-rate", learning_rate)
    rhos = numbers("--rho", rho)
    variance_weights = numbers("--variance-weight", variance_weight)
    check_sweep(checked, learning_rates, rhos, variance_weights)
    from disam_peft.cli.output import print_sweep
    from disam_peft.experiments import sweep as sweeps
    from disam_peft.report.result_tables import training_domains

    rows = sweeps.sweep(checked, learning_rates=learning_rates, rhos=rhos, variance_weights=variance_weights)
    for held_out in dict.fromkeys(row.held_out for row in rows):
        found = [row for row in rows if row.held_out == held_out]
        print_sweep(
            [{**vars(row), "method": row.method} for row in found],
            f"{training_domains(held_out)}: accuracy on held-back source data",
        )
        best, equal = found[0], sweeps.ties(found)
        if equal:
            say(f"{equal} other settings are exactly as good as the first, which is the simplest of them")
        if best.method != "disam":
            say(f"the best setting is {best.method}: disam with {'rho' if best.method == 'erm' else 'lambda'} 0")
        say(f"wrote {sweeps.sweep_file(checked, held_out)}")
        say(f"next: {sweeps.best_command(recipe, overrides or [], best)}")


def compare(
    study: Annotated[Path, typer.Argument(help="A study (recipes/studies/*.yaml), or a recipe.")],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE | KEY=VALUE]...",
            help="More recipes, each an arm by the name of its file; settings of all recipes, e.g. train.steps=200.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder; by default comparisons/NAME.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. By default one per core; one with a GPU.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, in place of the study's.", min=1)] = None,
    held_out: Annotated[str | None, typer.Option(help="Domains (a,b) or all, in place of the study's.")] = None,
    adapters: Annotated[str | None, typer.Option(help="Kinds of adapters to go through, e.g. lora,coop.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run everything again.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="A run that another process works on is an error; it is not waited for.")
    ] = False,
) -> None:
    """Compare methods over domains and seeds, with intervals and verdicts. Runs that are finished are kept."""
    from disam_peft.experiments.study import load_plan

    more = [other for other in others or [] if "=" not in other and Path(other).suffix in (".yaml", ".yml")]
    overrides = [other for other in others or [] if other not in more]
    recipes = [study, *map(Path, more)]
    if output is None:
        output = Path("comparisons") / (study.stem if not more else f"{study.stem}-and-{len(more)}-more")
    plan = load_plan(recipes, overrides, output=output, seeds=seeds, held_out=names(held_out), adapters=names(adapters))
    from disam_peft.cli.output import print_comparison
    from disam_peft.experiments.compare import run_plan

    comparison = run_plan(plan, output, jobs=jobs, overwrite=overwrite, wait=not no_wait, say=say)
    print_comparison(comparison)
    say(f"open {output / 'comparison.html'}")
    if comparison.failed:
        raise typer.Exit(1)
