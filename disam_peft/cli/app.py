"""The list of verbs, and the entry point ``disam-peft``.

Every verb imports what it works with inside its function, so that ``--help`` and a mistake in a recipe are answered
without waiting for torch.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, TextIO

import typer

from disam_peft import __version__
from disam_peft.cli.cache_verbs import cache
from disam_peft.cli.data_verbs import check_data
from disam_peft.cli.demo_verbs import demo, doctor
from disam_peft.cli.early_signals import orderly_end
from disam_peft.cli.frontier_verb import frontier
from disam_peft.cli.model_verbs import models
from disam_peft.cli.predict_verb import predict
from disam_peft.cli.result_verbs import evaluate, export, report, soup
from disam_peft.cli.run_verbs import runs
from disam_peft.cli.terminal import say
from disam_peft.cli.training_verbs import compare, sweep, train
from disam_peft.common import progress
from disam_peft.common.processes import is_main
from disam_peft.errors import Notice, Stopped, UserError

app = typer.Typer(name="disam-peft", no_args_is_help=True, pretty_exceptions_enable=False)
VERBS = (
    *(check_data, train, sweep, compare, runs, evaluate, frontier, soup, export, predict, report, demo, doctor, models),
)
for verb in VERBS:
    app.command()(verb)
app.add_typer(cache)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"disam-peft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune CLIP on new domains with DISAM, and judge it on the domain it has not seen."""


_shown: set[str] = set()
"""The texts of the warnings of this command so far: several places, or runs, may have the same to say."""


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, once for each text; where the code stands that warned is of no use to who typed a command."""
    if is_main() and str(message) not in _shown:
        _shown.add(str(message))
        kind, colour = ("note", "cyan") if issubclass(category, Notice) else ("warning", "yellow")
        say(f"{kind}: {message}", err=True, colour=colour)


def main() -> None:
    """Entry point: a user's mistake is a message and exit code 2, not a traceback; a signal's is 143 or 130."""
    _shown.clear()
    warnings.showwarning = _show_warning
    progress.write_lines(True)
    try:
        with orderly_end():
            app()
    except UserError as error:
        if is_main():
            say(f"error: {error}", err=True, colour="red")
        sys.exit(2)
    except Stopped as stopped:
        if is_main():
            say(stopped, err=True, colour="yellow")
        sys.exit(stopped.exit_code)
    finally:
        progress.write_lines(False)
