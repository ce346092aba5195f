"""What the README and the manual show of the studies. The lines between the marks of a page are replaced."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from disam_peft.report.comparison import Comparison, TextTable, arm_title
from disam_peft.report.drawing import draw
from disam_peft.report.gains import Gain, difference_text, gains, gains_figure, interval_text

BEGIN, END = "<!-- from the records of {}: begin -->", "<!-- from the records: end -->"
MAIN, CONDITIONS, ADAPTERS, HARD = "c_methods", "d_conditions", "e_adapters", "f_hard_domain"
BASELINE = "erm"
FIGURE = "docs/guide/which_method.svg"
ADVICE = (
    ("You train for accuracy", "hold on to zero-shot: a KL anchor of weight 1 to its logits", "anchor"),
    ("You can train twice as long", "the same anchor, twice the steps", "anchor 2x"),
    ("Probabilities matter most", "SAM, rho 0.5", "sam, rho 0.5"),
    ("The same, for a fifth more", "SAM in every fifth step, rho 0.2", "sam every 5th"),
    ("The run is finished", "WiSE-FT at alpha 0.5", "wise 0.5"),
    ("The run is still to come, and costs must not rise", "SWAD beside the weights", "swad"),
    ("The same", "a beta moving average beside the weights", "bma"),
    ("You want to choose the checkpoint", "choose it by NLL: selection.metric=nll", "early stop"),
    ("You would train plain ERM longer", "do not", "erm_2x"),
)
"""Situation, what to do, and the arm of the main study that did it."""
SHORT = ("zero_shot", "erm", "erm_2x", "sam", "disam", "wise 0.5", "anchor", "anchor 1 + sam", "anchor 2x")
AVERAGES = ("erm", "ema", "swa", "swad", "bma")
SINGLE = (("sam", "erm"), ("disam", "sam"), ("anchor", "erm"), ("erm_2x", "erm"), ("vrex", "erm"))
"""Pairs of which single runs are told."""


def write_pages(comparisons: Mapping[str, Comparison], source: Path, output: Path) -> None:
    """Write every page that shows a study, with its present numbers.

    Args:
        comparisons: name of the study -> its comparison.
        source: the root of the repository, from which the pages are read.
        output: the folder that stands for it in what is written.
    """
    main, conditions, adapters, hard = (comparisons[name] for name in (MAIN, CONDITIONS, ADAPTERS, HARD))
    found = {gain.arm: gain for gain in gains(main, "")}
    blocks = {
        "README.md": {MAIN: [results(found, SHORT, size(main))]},
        "docs/guide/which_method.md": {
            MAIN: [advice(found, size(main)), single_runs(main, size(main))],
            CONDITIONS: [differences(conditions)],
            HARD: [differences(hard)],
            ADAPTERS: [adapter_means(adapters), differences(adapters)],
        },
        "docs/guide/averages.md": {MAIN: [results(found, AVERAGES, size(main))]},
    }
    for name, studies in blocks.items():
        text = (source / name).read_text(encoding="utf-8")
        for study, tables in studies.items():
            before, rest = text.split(BEGIN.format(study))
            shown = "\n\n".join(table.markdown() for table in tables)
            text = f"{before}{BEGIN.format(study)}\n\n{shown}\n\n{END}{rest.split(END, 1)[1]}"
        page = output / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    alt = "Accuracy against NLL on held-out domains: a point for each method, its colour by what it costs"
    figure = draw(Path(FIGURE).stem, alt, partial(gains_figure, main, ""))
    (output / FIGURE).write_text(figure.wide, encoding="utf-8")


def size(comparison: Comparison) -> str:
    held_out = {domain for of in comparison.held_out.values() for domain in of}
    return f"{len(comparison.seeds)} seeds, {len(held_out)} held-out domains"


def advice(found: Mapping[str, Gain], runs: str) -> TextTable:
    """What to do in which situation, and what it gained over ERM of the same number of steps."""
    lines = []
    for situation, todo, arm in ADVICE:
        numbers = [difference_text(found[arm], metric, BASELINE) for metric in ("top1", "nll", "ece")]
        lines.append((situation, todo, *numbers, _cost(found[arm])))
    columns = ("situation", "what to do", "accuracy (points)", "NLL (nats)", "ECE (points)", "gradients, ERM = 1")
    title = f"Gained over ERM on domains that nobody trained on: mean (95 % interval), {runs}"
    return TextTable(title, columns, tuple(lines))


def results(found: Mapping[str, Gain], arms: Sequence[str], runs: str) -> TextTable:
    """Accuracy and NLL of some arms, and their differences to ERM."""
    lines = []
    for arm in arms:
        gain = found[arm]
        accuracy, nll = (difference_text(gain, metric, BASELINE) for metric in ("top1", "nll"))
        numbers = f"{100 * gain.means['top1']:.1f}", accuracy, f"{gain.means['nll']:.3f}", nll
        lines.append((arm_title(arm), *numbers, _cost(gain)))
    columns = ("", "accuracy (%)", "minus ERM", "NLL (nats)", "minus ERM", "gradients, ERM = 1")
    return TextTable(f"On held-out domains: mean (95 % interval of the difference), {runs}", columns, tuple(lines))


def single_runs(comparison: Comparison, runs: str) -> TextTable:
    """How far a difference of two single runs, of one seed and one held-out domain, may lie from the mean of all."""
    lines = []
    values = comparison.values("", "top1")
    for first, second in SINGLE:
        both = values[first].keys() & values[second].keys()
        differences = [100 * (values[first][place] - values[second][place]) for place in sorted(both, key=str)]
        mean = statistics.fmean(differences)
        wrong = sum(difference * mean <= 0 for difference in differences)
        lines.append(
            (
                f"{arm_title(first)} - {arm_title(second)}",
                f"{mean:+.1f}",
                f"{min(differences):+.1f} to {max(differences):+.1f}",
                f"{wrong} of {len(differences)}",
            )
        )
    columns = ("accuracy (points)", "mean of all", "single runs", "single runs that say nothing or the opposite")
    return TextTable(f"What one seed and one held-out domain say, {runs}", columns, tuple(lines))


def adapter_means(comparison: Comparison) -> TextTable:
    """Accuracy and NLL of arms that are called ``adapter, method``: a line an adapter, a column a method."""
    found = {gain.arm: gain.means for gain in gains(comparison, "")}
    adapters, methods = (dict.fromkeys(arm.split(", ")[part] for arm in comparison.arms) for part in (0, 1))
    lines = []
    for adapter in adapters:
        of = [found.get(f"{adapter}, {method}") for method in methods]
        numbers = ["" if means is None else f"{100 * means['top1']:.1f}, {means['nll']:.3f}" for means in of]
        lines.append((adapter, *numbers))
    title = f"Accuracy (%) and NLL (nats) on domains that nobody trained on: mean, {size(comparison)}"
    return TextTable(title, ("adapter", *(arm_title(method) for method in methods)), tuple(lines))


def differences(comparison: Comparison) -> TextTable:
    """Every compared pair by accuracy and by NLL, and by which of them a verdict tells its two arms apart."""
    several = len(comparison.conditions) > 1
    names = {"top1": "accuracy", "nll": "NLL"}
    lines = []
    for found in zip(*(comparison.verdicts[metric] for metric in names), strict=True):
        first = found[0]
        if first.result.mean is None:  # planned, and not measured yet
            continue
        pair = f"{arm_title(first.result.first)} - {arm_title(first.result.second)}"
        numbers = [interval_text(one.result, metric) for one, metric in zip(found, names, strict=True)]
        told = [
            name for one, name in zip(found, names.values(), strict=True) if one.result.verdict in ("first", "second")
        ]
        lines.append((*((first.condition,) if several else ()), pair, *numbers, ", ".join(told) or "none"))
    columns = ("difference", "accuracy (points)", "NLL (nats)", "verdict by")
    title = f"Differences on domains that nobody trained on: mean (95 % interval), {size(comparison)}"
    return TextTable(title, (*(("condition",) if several else ()), *columns), tuple(lines))


def _cost(gain: Gain) -> str:
    return "none" if gain.gradients is None else f"{gain.gradients:.3g}"
