"""The table of a training on the terminal: whose weights its columns are of."""

import io

from rich.console import Console

from disam_peft.cli.output import print_held_out
from tests.helpers.report_pages import rows


def printed(found):
    text = io.StringIO()
    print_held_out(found, Console(file=text, width=120))
    lines = [line.split("  ") for line in text.getvalue().splitlines()]
    return [[text.strip() for text in line if text.strip()] for line in lines]


def test_weights_are_named_only_where_an_average_was_kept():
    raw = rows("zero_shot", "art", 0, 0.25) + rows("disam", "art", 0, 0.5)
    assert ["held out", "zero-shot", "disam", "macro", "NLL", "ECE"] in printed(raw)
    averaged = printed(raw + rows("disam", "art", 0, 0.75, weights="ema"))
    assert ["held out", "zero-shot", "disam, raw", "disam, ema", "macro", "NLL", "ECE"] in averaged
    [line] = [line for line in averaged if line and line[0] == "art"]
    assert line[1:4] == ["25.0", "50.0", "75.0"]
    assert line[5] == "0.250", "of the weights that selection chose"
