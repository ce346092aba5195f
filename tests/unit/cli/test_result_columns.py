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


def test_each_held_out_domain_shows_the_weights_that_were_chosen_there():
    """Rows of the chosen weights come last: the average in one domain, the weights themselves in the other."""
    zero_shot = rows("zero_shot", "art", 0, 0.25) + rows("zero_shot", "photo", 0, 0.25)
    art = rows("disam", "art", 0, 0.5) + rows("disam", "art", 0, 0.75, weights="ema")
    photo = rows("disam", "photo", 0, 0.625, weights="ema") + rows("disam", "photo", 0, 0.5)
    lines = {line[0]: line for line in printed(zero_shot + art + photo) if line}
    assert lines["art"][5] == "0.250" and lines["photo"][5] == "0.500"
    assert lines["mean"][5] == "0.375", "over the chosen ones"
