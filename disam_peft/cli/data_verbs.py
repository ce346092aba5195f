"""The verb that looks at data before anything is trained on them: ``check-data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from disam_peft.cli.terminal import say


def check_data(
    root: Annotated[
        Path, typer.Argument(help="A folder or archive of <domain>/<class>/*.jpg; a CSV, Parquet or JSON Lines file.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Also look for leaks into this domain.")] = None,
) -> None:
    """Census of domains and classes, bad files, duplicates. Exits with 1 if a file cannot be used."""
    from disam_peft.cli.output import print_data_report
    from disam_peft.common.files import write_output
    from disam_peft.common.records import json_text
    from disam_peft.config.data import SOURCE_OF_SUFFIX, DataConfig
    from disam_peft.data.check import inspect
    from disam_peft.data.load import load
    from disam_peft.data.splits import check_no_leak, leave_out

    source = SOURCE_OF_SUFFIX.get(root.suffix.lower(), "root")
    # The data are shown as they are: what training would refuse is listed here, it is no error.
    look = DataConfig.model_validate({source: root, "verify": False, "classes": "union"})
    dataset = load(look)
    report = inspect(dataset)
    print_data_report(report)
    if json_file is not None:
        write_output(json_file, json_text(report.to_dict()))
    if held_out is not None:
        check_no_leak(*leave_out(dataset, held_out))
        say(f"no file of '{held_out}' is in another domain")
    if report.bad:
        raise typer.Exit(1)
