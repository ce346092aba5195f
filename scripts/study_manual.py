"""What the README and the manual show of the main study. The lines between the marks of a page are replaced."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from disam_peft.report.comparison import Comparison, TextTable, arm_title
from disam_peft.report.drawing import draw
from disam_peft.report.gains import Gain, difference_text, gains, gains_figure

BEGIN, END = "<!-- from the records: begin -->", "<!-- from the records: end -->"
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


def write_pages(comparison: Comparison, source: Path, output: Path) -> None:
    """Write every page that shows the main study, with its present numbers.

    Args:
        source: the root of the repository, from which the pages are read.
        output: the folder that stands for it in what is written.
    """
    found = {gain.arm: gain for gain in gains(comparison, "")}
    size = f"{len(comparison.seeds)} seeds, {len(comparison.held_out[''])} held-out domains"
    blocks = {
        "README.md": [results(found, SHORT, size)],
        "docs/guide/which_method.md": [advice(found, size), single_runs(comparison, size)],
        "docs/guide/averages.md": [results(found, AVERAGES, size)],
    }
    for name, tables in blocks.items():
        before, rest = (source / name).read_text(encoding="utf-8").split(BEGIN)
        text = "\n\n".join(table.markdown() for table in tables)
        page = output / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    alt = "Accuracy against NLL on held-out domains: a point for each method, its colour by what it costs"
    figure = draw(Path(FIGURE).stem, alt, partial(gains_figure, comparison, ""))
    (output / FIGURE).write_text(figure.wide, encoding="utf-8")


def advice(found: Mapping[str, Gain], size: str) -> TextTable:
    """What to do in which situation, and what it gained over ERM of the same number of steps."""
    lines = []
    for situation, todo, arm in ADVICE:
        numbers = [difference_text(found[arm], metric, BASELINE) for metric in ("top1", "nll", "ece")]
        lines.append((situation, todo, *numbers, _cost(found[arm])))
    columns = ("situation", "what to do", "accuracy (points)", "NLL (nats)", "ECE (points)", "gradients, ERM = 1")
    title = f"Gained over ERM on domains that nobody trained on: mean (95 % interval), {size}"
    return TextTable(title, columns, tuple(lines))


def results(found: Mapping[str, Gain], arms: Sequence[str], size: str) -> TextTable:
    """Accuracy and NLL of some arms, and their differences to ERM."""
    lines = []
    for arm in arms:
        gain = found[arm]
        accuracy, nll = (difference_text(gain, metric, BASELINE) for metric in ("top1", "nll"))
        numbers = f"{100 * gain.means['top1']:.1f}", accuracy, f"{gain.means['nll']:.3f}", nll
        lines.append((arm_title(arm), *numbers, _cost(gain)))
    columns = ("", "accuracy (%)", "minus ERM", "NLL (nats)", "minus ERM", "gradients, ERM = 1")
    return TextTable(f"On held-out domains: mean (95 % interval of the difference), {size}", columns, tuple(lines))


def single_runs(comparison: Comparison, size: str) -> TextTable:
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
    return TextTable(f"What one seed and one held-out domain say, {size}", columns, tuple(lines))


def _cost(gain: Gain) -> str:
    return "none" if gain.gradients is None else f"{gain.gradients:.3g}"
