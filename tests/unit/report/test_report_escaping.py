"""Names from strangers in the report: shown as they are, never obeyed, in HTML, SVG, Markdown and LaTeX."""

import re
from html.parser import HTMLParser

import pytest

from disam_peft.common.records import ResultRow, append_event, write_results
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


def page_of(name, folder):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    write_results(run / "results.json", rows(name))
    (run / "metrics.jsonl").unlink(missing_ok=True)
    for step in (1, 10):
        values = {name: 1.0 / step, "photo": 2.0 / step}
        append_event(run / "metrics.jsonl", "step", step=step, loss=1.0, domain_loss=values, domain_weight=values)
    build_report(
        read_runs([run]), folder / "page.html", title=name, introduction=[name], pictures=[Picture(name, b"x")]
    )
    reader = Reader()
    reader.feed((folder / "page.html").read_text(encoding="utf-8"))
    return reader


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", EVIL)
def test_row_21_the_page_shows_names_and_obeys_none(name, tmp_path):
    plain, reader = page_of("plain-name", tmp_path), page_of(name, tmp_path)
    assert reader.tags == plain.tags, "a name brings no tag of its own"
    assert len(plain.tags) > 20
    assert {key for key, _ in reader.attributes} == {key for key, _ in plain.attributes}
    text, usual = (" ".join("".join(page.text).split()) for page in (reader, plain))
    assert text.count(" ".join(name.split())) == usual.count("plain-name") >= 8, "letter by letter, wherever it stands"
    assert "1337" not in text


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
