"""SIGTERM and Ctrl-C before training: no traceback, and the exit code of a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from disam_peft.cli import app as command_line
from tests.helpers.paths import ROOT

IMPORTING = """
import os, signal, sys
from disam_peft.cli import app
sys.path.insert(0, sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
app.app = lambda: __import__("slow_module")
app.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_an_import_ends_at_once_without_a_traceback(tmp_path, number, code):
    (tmp_path / "slow_module.py").write_text(
        "import os, sys\nos.kill(os.getpid(), int(sys.argv[1]))\nprint('went on')\n"
    )
    command = [sys.executable, "-c", IMPORTING, str(int(number)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.strip() == f"stopped by {number.name} while loading; nothing was begun"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_verb_ends_it_in_order_and_handlers_are_put_back(number, code, monkeypatch, capsys):
    at_first = signal.signal(number, signal.default_int_handler)  # it may be ignored: a shell does so in the background
    before, cleaned = signal.getsignal(number), []

    def verb():
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(command_line, "app", verb)
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, at_first)
    assert ended.value.code == code and cleaned
    assert f"stopped by {number.name}; what was finished before stays" in capsys.readouterr().err
