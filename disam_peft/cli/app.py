"""Thin verbs. Heavy imports stay inside them, so that ``disam-peft --help`` answers at once."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from disam_peft.errors import Notice, Stopped, UserError

if TYPE_CHECKING:
    from disam_peft.common.records import ResultRow
    from disam_peft.experiments.run import Outcome

app = typer.Typer(
    name="disam-peft",
    help="Fine-tune CLIP on new domains with DISAM, and judge it on the domain it has not seen.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe settings, e.g. train.steps=200.")
]


@app.command("check-data")
def check_data(
    root: Annotated[Path, typer.Argument(help="A folder or archive of <domain>/<class>/*.jpg, a CSV or Parquet file.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Also look for leaks into this domain.")] = None,
) -> None:
    """Census of domains and classes, bad files, duplicates. Exits with 1 if a file cannot be used."""
    from disam_peft.cli.output import print_data_report
    from disam_peft.common.records import write_json
    from disam_peft.config.data import DataConfig
    from disam_peft.data.check import inspect
    from disam_peft.data.load import load
    from disam_peft.data.splits import check_no_leak, leave_out

    is_table = root.suffix.lower() in (".csv", ".tsv", ".parquet")
    # as the data are: what training would refuse is shown here, not raised
    look = DataConfig(root=None if is_table else root, table=root if is_table else None, verify=False, classes="union")
    dataset = load(look)
    report = inspect(dataset)
    print_data_report(report)
    if json_file is not None:
        write_json(json_file, report.to_dict())
    if held_out is not None:
        check_no_leak(*leave_out(dataset, held_out))
        typer.echo(f"no file of '{held_out}' is in another domain")
    if report.bad:
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace runs that are in the way.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with runs that did not finish, from their last checkpoints.")
    ] = False,
) -> None:
    """Train an adapter without the held-out domain, and judge it there beside zero-shot CLIP."""
    from disam_peft.config.recipe import load_recipe
    from disam_peft.experiments import run

    outcomes = run.train(load_recipe(recipe, overrides or []), overwrite=overwrite, resume=resume)
    _print_outcomes(outcomes)


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with a linear probe.")],
    overrides: Overrides = None,
    rho: Annotated[str, typer.Option(help="Radii, e.g. 0.02,0.05,0.1. Unset: the recipe's.")] = "",
    variance_weight: Annotated[str, typer.Option(help="Values of lambda, e.g. 0,0.1,0.5.")] = "",
    learning_rate: Annotated[str, typer.Option(help="Learning rates, e.g. 1e-3,1e-2.")] = "",
) -> None:
    """Try every combination for a linear probe in one run, judged on the source domains alone."""
    from disam_peft.cli.output import print_sweep
    from disam_peft.config.recipe import load_recipe
    from disam_peft.experiments import sweep as sweeps

    rows = sweeps.sweep(
        load_recipe(recipe, overrides or []),
        learning_rates=_numbers("--learning-rate", learning_rate),
        rhos=_numbers("--rho", rho),
        variance_weights=_numbers("--variance-weight", variance_weight),
    )
    for held_out in dict.fromkeys(row.held_out for row in rows):
        found = [row for row in rows if row.held_out == held_out]
        print_sweep([vars(row) for row in found], f"without {held_out}: accuracy on held-back source data")
        typer.echo(f"next: {sweeps.best_command(recipe, overrides or [], found[0])}")


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(help="A study (recipes/studies/*.yaml), or a recipe.")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="A folder; by default comparisons/NAME.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. By default one per core; one with a GPU.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, in place of the study's.", min=1)] = None,
    held_out: Annotated[str | None, typer.Option(help="Domains (a,b) or all, in place of the study's.")] = None,
    adapters: Annotated[str | None, typer.Option(help="Adapters (lora,coop,linear_probe) to go through.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run everything again.")] = False,
) -> None:
    """Compare methods over domains and seeds, with intervals and verdicts. Runs that are finished are kept."""
    from disam_peft.cli.output import print_comparison
    from disam_peft.experiments.compare import compare as run_comparison

    output = output if output is not None else Path("comparisons") / study.stem
    comparison = run_comparison(
        study,
        output,
        overrides or [],
        jobs=jobs,
        seeds=seeds,
        held_out=_names(held_out),
        adapters=_names(adapters),
        overwrite=overwrite,
    )
    print_comparison(comparison)
    typer.echo(f"open {output / 'comparison.html'}")
    if comparison.failed:
        raise typer.Exit(1)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text is not None else []


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs.")],
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Another folder of domains; short for data.root=FOLDER.")] = None,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Also measure how sharp the loss is.")] = False,
) -> None:
    """Reload the adapter of a run and evaluate it again."""
    from disam_peft.experiments import run

    given = [*(overrides or []), *([f"data.root={data}"] if data is not None else [])]
    for outcome in run.evaluate(folder, given, sharpness=sharpness):
        if _is_main():
            _print_evaluation(outcome, run.recorded(outcome.folder))
            if sharpness:
                _print_sharpness(outcome.folder)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run.")],
    to: Annotated[str, typer.Option(help="'peft': the adapter alone; 'merged': a complete checkpoint.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    held_out: Annotated[str | None, typer.Option(help="Which run, if the folder holds several.")] = None,
) -> None:
    """Write the adapter, or the whole model with the adapter merged in, for use elsewhere."""
    from disam_peft.experiments import run

    typer.echo(f"wrote {run.export(folder, to, output, held_out=held_out)}")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Runs, or folders of runs.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "Results",
    figures: Annotated[Path | None, typer.Option(help="Folder for figures and tables [default: beside it].")] = None,
) -> None:
    """Tables and figures of finished runs as one HTML page, rebuilt from their records."""
    from disam_peft.report.page import build_report
    from disam_peft.report.runs import read_runs

    build_report(read_runs(folders), output, title=title, figures=figures)
    typer.echo(f"wrote {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A folder for the report and the runs.")] = Path("disam-peft-demo"),
    held_out: Annotated[str, typer.Option(help="The domain that training does not see.")] = "painting",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.", min=1)] = 150,
) -> None:
    """See it work: a small CLIP, six drawing styles, ERM against SAM against DISAM; no download, no GPU."""
    from disam_peft.cli.output import print_held_out
    from disam_peft.experiments.demo import demo as run_demo

    rows = run_demo(output, held_out, steps=steps, say=typer.echo)
    print_held_out(rows)
    typer.echo(f"open {output / 'report.html'}")
    typer.echo("next, on your own data: disam-peft check-data FOLDER   |   disam-peft train RECIPE data.root=FOLDER")


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; without one, LoRA on the demo's CLIP.")] = None,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    seconds: Annotated[float, typer.Option(help="Checks that would take longer are left out.", min=1)] = 40,
) -> None:
    """Examine this machine, backbone and adapter: is the step exact here? No data needed. Exits with 1 on a failure."""
    from disam_peft.cli.examination import print_examination
    from disam_peft.common.records import write_json
    from disam_peft.config.recipe import load_recipe
    from disam_peft.doctor.examine import demo_recipe, examine

    examination = examine(demo_recipe() if recipe is None else load_recipe(recipe, overrides or []), seconds=seconds)
    print_examination(examination)
    if json_file is not None:
        write_json(json_file, examination.as_dict())
    if examination.failed:
        raise typer.Exit(1)


def _print_outcomes(outcomes: list[Outcome]) -> None:
    from disam_peft.cli.output import print_held_out

    if not _is_main():
        return
    for outcome in outcomes:
        if outcome.fit is None:
            typer.echo(f"{outcome.folder}: this very run is finished already; kept (--overwrite runs it again)")
    print_held_out([row for outcome in outcomes for row in outcome.rows])
    for outcome in outcomes:
        if outcome.fit is not None:
            fit = outcome.fit
            typer.echo(
                f"{outcome.folder}: loss {fit.first_loss:.4f} -> {fit.last_loss:.4f}, best step {fit.best_step}"
                + (f", {fit.skipped_steps} steps skipped" if fit.skipped_steps else "")
            )
    first = outcomes[0].folder
    typer.echo(f"next: disam-peft evaluate {first}   |   disam-peft export {first} --to peft --output DIR")


def _print_evaluation(outcome: Outcome, recorded: list[ResultRow]) -> None:
    from disam_peft.cli.output import print_evaluation

    print_evaluation(outcome.rows, recorded, str(outcome.folder))


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of numbers such as 0.02,0.05,0.1") from error


def _print_sharpness(folder: Path) -> None:
    from disam_peft.cli.output import print_sharpness
    from disam_peft.common.records import SHARPNESS, read_results

    print_sharpness(read_results(folder / SHARPNESS))
    typer.echo(f"wrote {folder / SHARPNESS}; disam-peft report {folder} shows it")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line; where the code stands that warned is of no use to who typed a command."""
    if _is_main():
        kind, colour = ("note", "cyan") if issubclass(category, Notice) else ("warning", "yellow")
        typer.secho(f"{kind}: {message}", err=True, fg=colour)


def main() -> None:
    """Entry point: a user's mistake is a message and exit code 2, not a traceback; a signal's is 143 or 130."""
    warnings.showwarning = _show_warning
    try:
        app()
    except UserError as error:
        if _is_main():
            typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except Stopped as stopped:
        if _is_main():
            typer.secho(str(stopped), err=True, fg="yellow")
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
