"""Names from strangers in the report: shown as they are, never obeyed, in HTML, SVG, Markdown and LaTeX."""

import re
from html.parser import HTMLParser

import pytest

from disam_peft.common.records import ResultRow, append_event, write_results
from disam_peft.errors import UserError
from disam_peft.report.drawing import draw, grid
from disam_peft.report.page import Picture, build_report
from disam_peft.report.result_tables import compare_held_out
from disam_peft.report.runs import read_runs

EVIL = [
    "<script>alert(1)</script>",
    "</title></pre></text></svg><script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 191 }} {% include 'x' %}",
    "$\\frac{$",
    "$x_2$",
    "]]><!-- -->&lt;b&gt;",
    "\\input{/etc/passwd} %s {0}",
    "first\nsecond | third",
    "\u202eright to left \U0001f408",
]
PLAIN = [f"plain-name-{letter}" for letter in "abcdefghij"]


def rows(name):
    """Every text of a row that a recipe or a folder's name can fill; methods are a fixed list."""
    found = []
    for method, value in (("zero_shot", 0.25), ("disam", 0.5)):
        for metric, number in (("top1", value), ("nll", 1.0)):
            found.append(ResultRow(name, name, method, name, 0, "held_out", name, metric, number, 40))
    return found


class Reader(HTMLParser):
    """The tags, the attributes and the text of a page, but for the tables that stand there as Markdown and LaTeX."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self._quoted = set(), [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self._quoted |= tag == "pre"
        self.attributes += attributes

    def handle_endtag(self, tag):
        self._quoted &= tag != "pre"

    def handle_data(self, data):
        if not self._quoted:
            self.text.append(data)


def page_of(names, folder):
    """One page of a run for every name, each with the name wherever a recipe or a folder's name can stand."""
    runs = []
    for number, name in enumerate(names):
        runs.append(folder / f"run-{number}")
        runs[-1].mkdir(parents=True)
        write_results(runs[-1] / "results.json", rows(name))
        for step in (1, 10):
            values = {name: 1.0 / step, "photo": 2.0 / step}
            events = runs[-1] / "metrics.jsonl"
            append_event(events, "step", step=step, loss=1.0, domain_loss=values, domain_weight=values)
    pictures = [Picture(name, b"x") for name in names]
    page = folder / "page.html"
    build_report(read_runs(runs), page, title=" ".join(names), introduction=names, pictures=pictures)
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of harmless names, and that of hostile ones, drawn once for all of them."""
    folder = tmp_path_factory.mktemp("pages")
    return page_of(PLAIN, folder / "plain"), page_of(EVIL, folder / "evil")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_row_21_the_page_obeys_no_name(pages):
    plain, reader = pages
    assert reader.tags == plain.tags, "a name brings no tag of its own"
    assert len(plain.tags) > 20
    assert {key for key, _ in reader.attributes} == {key for key, _ in plain.attributes}
    assert "1337" not in "".join(reader.text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", EVIL)
def test_row_21_the_page_shows_names_letter_by_letter(name, pages):
    """As often as a harmless name in its place; one name may be a part of another."""
    usual, text = (" ".join("".join(page.text).split()) for page in pages)
    wanted = {other: usual.count(plain) for other, plain in zip(EVIL, PLAIN, strict=True)}
    assert min(wanted.values()) >= 8
    shown = " ".join(name.split())
    assert text.count(shown) == sum(count * " ".join(other.split()).count(shown) for other, count in wanted.items())


@pytest.mark.parametrize("name", EVIL)
def test_row_21_tables_in_markdown_and_latex_hold_no_markup_of_a_name(name):
    [table] = compare_held_out(rows(name))
    markdown = table.markdown().splitlines()
    assert len(markdown) == 5 and "<" not in "".join(markdown)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in markdown[2:])
    latex = table.latex().splitlines()
    assert len(latex) == 7
    [line] = [line for line in latex if " & 25.0" in line]
    bare = re.sub(r"\\textbackslash\{\}|\\text\w+\{\}|\\[&%$#_{}]", "", line.removesuffix(r" \\"))
    assert not set(bare) & set("\\%$#_{}~^") and bare.count("&") == 2


def test_row_61_numbers_that_no_axis_can_hold_are_an_error_that_names_the_figure():
    def plot(width):
        figure, [panel] = grid(1, width, 2.0, 2.0)
        panel.plot([0, 1], [-1e308, 1e308])
        return figure

    with pytest.raises(UserError, match=r"the figure '01_losses' \(losses\) cannot be drawn"):
        draw("01_losses", "losses", plot)
