"""The verb ``models``: which CLIPs there are, with which weights, and what works with each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from disam_peft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from disam_peft.backbones.listed_model import ListedModel

_DETAILED = 12
"""Up to so many models are shown with the names of their weights."""
_FAMILIES = ("open_clip", "transformers")


def models(
    family: Annotated[str | None, typer.Option(help="open_clip or transformers; both if it is left out.")] = None,
    search: Annotated[
        str, typer.Option(help="Only names, weights or towers that hold all of these words, in any case.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List CLIPs by name: weights, image size, and what works with each. Downloads and builds nothing."""
    if family not in (None, *_FAMILIES):
        raise UserError(f"--family {family} is none of {', '.join(_FAMILIES)}{did_you_mean(family, _FAMILIES)}")
    from disam_peft.backbones.families import listed_models

    everything = listed_models(family)
    found = [model for model in everything if _holds(model, search)]
    if not found:
        known = [model.name for model in everything]
        raise UserError(f"no model holds '{search}' in its name, weights or tower{did_you_mean(search, known)}")
    if as_json:
        sys.stdout.write(json.dumps([asdict(model) for model in found], indent=1) + "\n")
    else:
        print_models(found)


def _holds(model: ListedModel, search: str) -> bool:
    text = " ".join([model.name, model.image_tower, *model.pretrained]).lower()
    return all(word in text for word in search.lower().split())


def print_models(found: Sequence[ListedModel], console: Console | None = None) -> None:
    """One line for each; of a few also the tower and the names of the weights."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from disam_peft.cli.output import Terminal

    console = console or Terminal()
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("backbone.name", overflow="fold")
    for name in ("pixels", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("LoRA", "parts", "token", "CoOp"):
        table.add_column(name, no_wrap=True)
    for model in found:
        table.add_row(
            escape(model.name),
            "own" if model.pixels is None else str(model.pixels),
            "own" if model.brings_weights else str(len(model.pretrained) or "-"),
            ",".join(model.projections) or "-",
            *("yes" if one else "-" for one in (model.splits, model.one_token, model.prompts)),
        )
    console.print(table)
    if len(found) <= _DETAILED:
        for model in found:
            tags = f"; backbone.pretrained: {', '.join(model.pretrained)}" if model.pretrained else ""
            console.print(f"{model.name}: {model.image_tower}{tags}", markup=False)
        console.print()
    console.print(
        "weights: values of backbone.pretrained, or the name brings its own. LoRA: layers of the image tower; q,v is "
        "the default, others are set as adapter.projections. parts: blocks before the first trained one run once, or "
        "come from a store. token: the last block is computed for the class token alone. CoOp: the text tower takes "
        "learned prompts."
    )
