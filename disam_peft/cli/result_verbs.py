"""The verbs for what runs have left: ``evaluate``, ``soup``, ``export`` and ``report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from disam_peft.cli.options import EvaluationOverrides
from disam_peft.cli.terminal import say


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder with runs at any depth.")],
    overrides: EvaluationOverrides = None,
    data: Annotated[Path | None, typer.Option(help="Other data: a folder of domains, an archive or a table.")] = None,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Also measure how sharp the loss is.")] = False,
    alpha: Annotated[
        float | None, typer.Option(help="Weights between zero-shot (0) and trained (1), or beyond; unset: trained.")
    ] = None,
) -> None:
    """Reload the adapter of a run and evaluate it again. Only settings of data, evaluation and precision may change."""
    from disam_peft.config.data import SOURCE_OF_SUFFIX
    from disam_peft.config.evaluation_overrides import recipe_for_evaluation
    from disam_peft.experiments.run_folder import RECIPE, find_runs

    given = list(overrides or [])
    if data is not None:
        source = SOURCE_OF_SUFFIX.get(data.suffix.lower(), "root")
        given.append(f"data.{source}={json.dumps(str(data))}")
    for cell in find_runs(folder):  # before the imports below, which take seconds
        recipe_for_evaluation(cell / RECIPE, given)
    from disam_peft.cli.output import print_evaluation, print_sharpness
    from disam_peft.common.processes import is_main
    from disam_peft.common.records import SHARPNESS, read_results
    from disam_peft.experiments.evaluate import evaluate as evaluate_again
    from disam_peft.experiments.evaluate import recorded_rows

    for outcome in evaluate_again(folder, given, sharpness=sharpness, alpha=alpha):
        if is_main():
            at = "" if alpha is None else f", alpha={alpha:g}"
            # what training recorded is of other weights, unless they are the trained ones
            recorded = recorded_rows(outcome.folder) if alpha in (None, 1) else None
            print_evaluation(outcome.rows, recorded, f"{outcome.folder}{at}")
            if sharpness:
                print_sharpness(read_results(outcome.folder / SHARPNESS))
                say(f"wrote {outcome.folder / SHARPNESS}; disam-peft report {outcome.folder} shows it")


def soup(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one backbone, at least two.")],
    output: Annotated[Path, typer.Option(help="A new folder, like that of a run.")],
    method: Annotated[
        str, typer.Option(help="'uniform': the mean of all; 'greedy': of those that help source validation.")
    ] = "uniform",
    held_out: Annotated[str | None, typer.Option(help="Which run, where a folder holds several.")] = None,
) -> None:
    """Average the adapters of several runs into one, which evaluate, export and report take like a run."""
    from disam_peft.errors import UserError, did_you_mean
    from disam_peft.experiments.run_folder import RECIPE, find_run

    if method not in ("uniform", "greedy"):
        raise UserError(
            f"--method {method!r} is neither uniform nor greedy{did_you_mean(method, ['uniform', 'greedy'])}"
        )
    found = [find_run(folder, held_out) for folder in runs]  # before the imports below, which take seconds
    from disam_peft.cli.output import print_evaluation
    from disam_peft.common.processes import is_main
    from disam_peft.config.adapters import export_format
    from disam_peft.config.recipe import load_recipe
    from disam_peft.experiments.soup import make_soup

    made = make_soup(found, output, method="greedy" if method == "greedy" else "uniform")
    if is_main():
        for one in made.record.ingredients:
            alone = "" if one.score is None else f", source validation {_score(one.score, made.metric)} alone"
            mixed = "" if one.soup_score is None else f", {_score(one.soup_score, made.metric)} in the soup"
            say(f"{'kept' if one.kept else 'left out'}: {one.run}{alone}{mixed}")
        print_evaluation([row for row in made.rows if row.method != "zero_shot"], None, str(output))
        say(f"wrote {output}")
        to = export_format(load_recipe(output / RECIPE).adapter)
        say(f"next: disam-peft evaluate {output}   |   disam-peft export {output} --to {to} --output DIR")


def _score(score: float, metric: str) -> str:
    """A score of selection as tables have it: an accuracy in %, or an NLL, which selection takes as negative."""
    return f"{100 * score:.1f} %" if metric == "accuracy" else f"NLL {-score:.4f}"


def export(
    folder: Annotated[Path, typer.Argument(help="A run.")],
    to: Annotated[
        str,
        typer.Option(help="'peft': the adapter alone; 'merged': a complete checkpoint; 'lora': the nearest LoRA."),
    ],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    held_out: Annotated[str | None, typer.Option(help="Which run, if the folder holds several.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weights between zero-shot (0) and trained (1), or beyond; unset: trained.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of --to lora; unset: 16.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the frozen weights, if another than in training: 'float32', 'bfloat16'.")
    ] = None,
) -> None:
    """Write the adapter, or the whole model with the adapter merged in, for use elsewhere."""
    from disam_peft.config.export import check_form, check_precision

    check_form(to, rank)
    named = check_precision(precision)
    from disam_peft.experiments.run_folder import find_run

    find_run(folder, held_out)  # before the imports below, which take seconds
    from disam_peft.experiments.export_run import export_run

    path = export_run(folder, to, output, held_out=held_out, alpha=alpha, rank=rank, precision=named)
    say(f"wrote {path}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Runs, or folders of runs.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "Results",
    figures: Annotated[Path | None, typer.Option(help="Folder for figures and tables; unset: beside it.")] = None,
) -> None:
    """Tables and figures of finished runs as one HTML page, rebuilt from their records."""
    from disam_peft.report.page import build_report
    from disam_peft.report.runs import read_runs

    build_report(read_runs(folders), output, title=title, figures=figures)
    say(f"wrote {output}")
