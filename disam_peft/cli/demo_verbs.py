"""The verbs that need no data of the user: ``demo`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from disam_peft.cli.options import Overrides
from disam_peft.cli.terminal import say


def demo(
    output: Annotated[Path, typer.Option(help="A folder for the report and the runs.")] = Path("disam-peft-demo"),
    held_out: Annotated[str, typer.Option(help="The domain that training does not see.")] = "painting",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each arm.", min=1)] = 400,
) -> None:
    """See it work: a small CLIP, six drawing styles, ERM, SAM, DISAM and an anchor; no download, no GPU."""
    from disam_peft.cli.output import print_demo
    from disam_peft.experiments.demo import MISLEADING
    from disam_peft.experiments.demo import demo as run_demo

    lines = run_demo(output, held_out, steps=steps, say=say)
    print_demo(lines, held_out)
    say(MISLEADING)
    say(f"open {output / 'report.html'}")
    say("next, on your own data: disam-peft check-data FOLDER   |   disam-peft train RECIPE data.root=FOLDER")


def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; without one, LoRA on the demo's CLIP.")] = None,
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    seconds: Annotated[float, typer.Option(help="Checks that would take longer are left out.", min=1)] = 40,
) -> None:
    """Examine this machine, backbone and adapter: is the step exact here? No data needed. Exits with 1 on a failure."""
    from disam_peft.config.recipe import load_recipe

    checked = None if recipe is None else load_recipe(recipe, overrides or [])
    from disam_peft.cli.output import print_examination
    from disam_peft.common.files import write_output
    from disam_peft.common.records import json_text
    from disam_peft.doctor.examine import demo_recipe, examine

    examination = examine(demo_recipe() if checked is None else checked, seconds=seconds)
    print_examination(examination)
    if json_file is not None:
        write_output(json_file, json_text(examination.as_dict()))
    if examination.failed:
        raise typer.Exit(1)
