"""The verb ``frontier``: a run between its zero-shot and its trained weights (WiSE-FT)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disam_peft.cli.options import EvaluationOverrides, alpha_range
from disam_peft.cli.terminal import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from disam_peft.common.frontier_records import Frontier


def frontier(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder with runs at any depth.")],
    overrides: EvaluationOverrides = None,
    alphas: Annotated[
        str, typer.Option(help="START:STOP:STEP with both ends, or a list. 0 is zero-shot, 1 the trained adapter.")
    ] = "0:1.2:0.1",
    output: Annotated[Path | None, typer.Option(help="Where files go; unset: into the folder of each run.")] = None,
) -> None:
    """Accuracy, NLL and ECE along the line from zero-shot to trained weights (WiSE-FT), and the best alpha by source
    validation. Every image is decoded and encoded once for all alphas."""
    places = alpha_range("--alphas", alphas)
    from disam_peft.config.evaluation_overrides import recipe_for_evaluation
    from disam_peft.experiments.run_folder import RECIPE, find_runs

    cells = find_runs(folder)
    for cell in cells:  # before the imports below, which take seconds
        recipe_for_evaluation(cell / RECIPE, list(overrides or []))
    from disam_peft.common.processes import is_main
    from disam_peft.experiments.frontier import frontier as along_the_line

    found = along_the_line(folder, places, list(overrides or []), output=output)
    if not is_main():
        return
    for one in found:
        print_frontier([one.frontier], str(one.run))
        say(f"wrote {one.folder / 'frontier.json'}, frontier.svg and frontier.png")
    if len(found) > 1 and len({one.run.parent for one in found}) == 1:
        print_frontier([one.frontier for one in found], f"mean over {len(found)} runs")
    if len(found) < len(cells):
        say(f"{len(cells) - len(found)} of {len(cells)} runs were left out; the warnings say why")
        raise typer.Exit(1)


def print_frontier(frontiers: Sequence[Frontier], title: str, console: Console | None = None) -> None:
    """One line per alpha: accuracies, NLL and ECE, each the mean over the domains; below it the top-1 of every source
    domain where there are several. Of several runs it has the means."""
    from rich.markup import escape

    from disam_peft.cli.output import Terminal
    from disam_peft.common.frontier_records import mean_curve

    console = console or Terminal()
    first, alone = frontiers[0], len(frontiers) == 1
    names = {"source_validation": "source", "held_out": "held out", "test": "test"}
    columns = []
    for split in ("source_validation", *([first.judged] if first.judged else [])):
        for metric, short in (("top1", "top-1"), ("nll", "NLL"), ("ece", "ECE")):
            cells = [_cell(value, metric) for value in mean_curve(frontiers, split, metric)]
            columns.append((f"{names[split]}\n{short}", cells))
    chosen = first.recommended if alone else None
    _print_over_alpha(console, f"{escape(title)} (accuracies in %)", first.alphas, columns, chosen)
    sources = first.domains("source_validation") if alone else []
    if len(sources) > 1:
        of_each = [(domain, first.curve("source_validation", "top1", domain)) for domain in sources]
        cells_of = [(escape(domain), [_cell(value, "top1") for value in curve]) for domain, curve in of_each]
        _print_over_alpha(console, "source validation of each domain (top-1, %)", first.alphas, cells_of, chosen)
    for one in frontiers:
        where = "" if alone else f" without {one.held_out}" if one.held_out is not None else ""
        console.print(f"recommended{where}: alpha={one.recommended:g}, {_why(one)}", markup=False, soft_wrap=True)


def _why(one: Frontier) -> str:
    """By what this alpha is recommended, and where the advice says little."""
    alphas, metric = sorted(one.alphas), "accuracy" if one.metric == "accuracy" else "NLL"
    curves = {name: one.curve("source_validation", name) for name in ("top1", "nll")}
    each = [one.curve("source_validation", name, of) for name in curves for of in one.domains("source_validation")]
    if len(alphas) == 1:
        return "the only one that was tried"
    if all(len(set(curve)) == 1 for curve in [*curves.values(), *each]):
        return "the nearest to 1: all alphas are equally good by source validation, in accuracy and NLL"
    over = "worst" if one.rule == "worst_source" else "mean"
    words = f"the best by source validation ({metric}, {over} over the source domains)"
    curve = curves["top1" if metric == "accuracy" else "nll"]
    equal = curve.count(curve[one.alphas.index(one.recommended)])
    if over == "mean" and equal > 1:
        share = "all alphas share" if equal == len(curve) else f"{equal} alphas share"
        words += f"; {share} this {metric}, and its {'NLL' if metric == 'accuracy' else 'accuracy'} decides"
    if one.recommended == alphas[-1] and one.recommended < 2:
        words += "; it is the largest that was tried: a larger one may be better"
    elif one.recommended == alphas[0]:
        words += "; it is zero-shot" if one.recommended == 0 else "; it is the smallest that was tried"
    return words


def _print_over_alpha(
    console: Console,
    title: str,
    alphas: Sequence[float],
    columns: Sequence[tuple[str, Sequence[str]]],
    chosen: float | None,
) -> None:
    """A line for each alpha, that of ``chosen`` in bold."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("alpha", justify="right", no_wrap=True, min_width=max(5, *(len(f"{alpha:g}") for alpha in alphas)))
    for header, _ in columns:
        table.add_column(header, justify="right", overflow="fold")
    for number, alpha in enumerate(alphas):
        cells = [of_column[number] for _, of_column in columns]
        table.add_row(f"{alpha:g}", *cells, style="bold" if alpha == chosen else None)
    console.print(table)


def _cell(value: float | None, metric: str) -> str:
    if value is None:
        return "n/a"
    return f"{100 * value:.1f}" if metric == "top1" else f"{value:.3f}"
