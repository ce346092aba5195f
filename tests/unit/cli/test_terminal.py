"""What the command line prints of names from data: shown, never obeyed by the terminal or by rich."""

from __future__ import annotations

import io
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest

import disam_peft.cli
from disam_peft.cli import app as command_line
from disam_peft.cli.data_tables import print_data_report
from disam_peft.cli.frontier_verb import print_frontier
from disam_peft.cli.output import (
    Terminal,
    print_evaluation,
    print_examination,
    print_held_out,
    print_sharpness,
    print_sweep,
)
from disam_peft.common.frontier_records import Frontier, FrontierRow
from disam_peft.common.progress import track
from disam_peft.common.records import ResultRow
from disam_peft.data.census import BadFile, DataReport
from disam_peft.doctor.check_result import CheckResult
from disam_peft.doctor.examine import Examination
from disam_peft.errors import Notice, Stopped, UserError, printable

# A title for the window, red, the screen cleared, C1's own escape, a bell, going back, turned text; markup and emoji.
EVIL = "\x1b]0;owned\x07\x1b[31m\x1b[2J\x9b31m\x08\r\u202eeman\u2028[bold red]:cat:[/]"
SHOWN = r"\x1b]0;owned\x07\x1b[31m\x1b[2J\x9b31m\x08\r\u202eeman\u2028[bold red]:cat:[/]"
ROW = ResultRow(EVIL, EVIL, "disam", EVIL, 0, "held_out", EVIL, "top1", 0.5, 3)


def rows(**changes):
    measured = [ROW.__dict__ | {"metric": metric} for metric in ("top1", "macro_accuracy", "nll", "ece")]
    return [ResultRow(**values | changes) for values in measured]


def data_report():
    return DataReport(
        origin=EVIL,
        fingerprint="",
        domains=(EVIL, "photo"),
        classes=(EVIL,),
        prompt_names=("word",),
        counts=((3,), (0,)),
        bad=(BadFile(EVIL, EVIL, EVIL, EVIL),),
        duplicates_within=(),
        duplicates_across=(),
        sizes=None,
        ignored={EVIL: 2},
    )


FRONTIER = Frontier(
    EVIL,
    EVIL,
    EVIL,
    EVIL,
    0,
    EVIL,
    "r",
    "m",
    1.0,
    [
        FrontierRow(1.0, split, domain, "top1", 0.5, 3)
        for split in ("source_validation", "held_out")
        for domain in (EVIL, "b")
    ],
)
PRINTED = {
    "held out": lambda console: print_held_out(rows(), console),
    "evaluation": lambda console: print_evaluation(rows(), [], EVIL, console),
    "frontier": lambda console: print_frontier([FRONTIER, FRONTIER], EVIL, console),
    "frontier of one": lambda console: print_frontier([FRONTIER], EVIL, console),
    "sharpness": lambda console: print_sharpness(rows(), console),
    "sweep": lambda console: print_sweep([], EVIL, console),
    "data": lambda console: print_data_report(data_report(), console),
    "examination": lambda console: print_examination(
        Examination({EVIL: EVIL}, EVIL, (CheckResult(EVIL, EVIL, 1.0, 2.0, "ok"),), 1.0), console
    ),
}


@pytest.mark.parametrize("table", PRINTED)
def test_row_66_tables_show_terminal_escapes_and_do_not_send_them(table):
    text = io.StringIO()
    PRINTED[table](Terminal(file=text, width=400))

    assert SHOWN.replace(" ", "") in "".join(text.getvalue().split())  # a narrow table breaks its title
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text.getvalue())


@pytest.mark.parametrize(
    ("raised", "code"), [(UserError(f"no domain {EVIL}"), 2), (Stopped(f"stopped in {EVIL}", 15), 143)]
)
def test_row_66_messages_show_terminal_escapes_and_do_not_send_them(raised, code, monkeypatch, capsys):
    def verb():
        warnings.warn(f"seen {EVIL}", stacklevel=1)
        warnings.warn(f"noted {EVIL}", Notice, stacklevel=1)
        raise raised

    monkeypatch.setattr(command_line, "app", verb)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("always")
        command_line.main()

    shown = capsys.readouterr().err
    assert ended.value.code == code
    assert shown.count(SHOWN) == 3
    assert "\x1b" not in shown and "\x9b" not in shown


def test_row_61_of_a_value_without_end_a_message_shows_the_beginning():
    error = UserError(f"backbone.name '{'x' * 100_000}' is unknown; {'p' * 4096} is a path")
    assert str(error) == f"backbone.name '{'x' * 199}... (100002 characters) is unknown; {'p' * 4096} is a path"


def test_row_66_errors_are_printable_in_notebooks_and_logs_too():
    error = UserError(f"line one\n\tline two of {EVIL}")

    assert str(error) == f"line one\n\tline two of {SHOWN}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert printable("草图 رسم 👩‍🔬 é") == "草图 رسم 👩‍🔬 é"
    printable("half \ud800 of a pair").encode()


def test_row_66_a_bar_shows_terminal_escapes_and_markup(monkeypatch):
    watched = io.StringIO()
    watched.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", watched)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "xterm")

    assert list(track([1, 2], EVIL)) == [1, 2]

    assert SHOWN in watched.getvalue()
    assert "owned\x07" not in watched.getvalue()


def test_row_66_verbs_print_through_one_door():
    """Whoever adds a verb prints with ``say`` or a ``Terminal``, or names get through raw."""
    for path in Path(disam_peft.cli.__file__).parent.glob("*.py"):
        if path.name != "terminal.py":
            code = path.read_text(encoding="utf-8")
            assert not re.findall(r"typer\.s?echo\b|(?<![\w.])print\(|(?<![\w.])Console\(\)", code), path.name
