"""The verbs of ``disam-peft cache``: what is kept so that it need not be computed again, and how it is freed.

Nothing in the cache is needed: what is missing is computed, decoded, unpacked or checked again. What a running process
uses or builds is never removed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disam_peft.cli.options import num_bytes, seconds
from disam_peft.cli.terminal import say
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from disam_peft.common.cache import Kept

cache = typer.Typer(
    name="cache", no_args_is_help=True, help="Show and free what is kept so that it need not be redone."
)

Features = Annotated[
    Path | None, typer.Option("--features", help="Folder of feature stores, where a recipe sets features.folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]


@cache.command("ls")
def show(features: Features = None, as_json: AsJson = False) -> None:
    """List stores, unpacked archives and remembered checks: size, last use, data set, and whether they are in use."""
    from disam_peft.common.cache import kept
    from disam_peft.common.files import cache_folder

    entries = kept(features)
    if as_json:
        _print_json(entries)
    elif not entries:
        say(f"nothing is kept in {cache_folder()}")
    else:
        from disam_peft.cli.output import print_cache

        print_cache(entries, str(cache_folder()), now=time.time())


@cache.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(help="Names as `cache ls` shows them, or their beginnings.")],
    features: Features = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove these entries."""
    from disam_peft.common.cache import kept, named

    chosen = named(kept(features), names)
    busy = [entry.name for entry in chosen if entry.state == "in use"]
    if busy:
        raise UserError(f"{', '.join(busy)}: in use by a running process; wait until it has ended. Nothing was removed")
    _remove(chosen, dry_run=dry_run, as_json=as_json)


@cache.command("prune")
def prune(
    unused_for: Annotated[str | None, typer.Option(help="What was not used for this long: 12h, 30d, 2w.")] = None,
    down_to: Annotated[
        str | None, typer.Option(help="The longest unused first, until this much is left: 500MB, 20GB.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Only of data sets whose name holds this text.")] = None,
    features: Features = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is old, too much, or of one data set. What a running process uses stays."""
    from disam_peft.common.cache import kept, to_prune

    age, size = seconds("--unused-for", unused_for), num_bytes("--down-to", down_to)
    if age is None and size is None and data is None:
        raise UserError("say what may go: --unused-for 30d, --down-to 20GB, --data NAME, or several of them")
    chosen = to_prune(kept(features), now=time.time(), unused_for=age, down_to=size, data=data)
    _remove(chosen, dry_run=dry_run, as_json=as_json)


def _remove(chosen: list[Kept], *, dry_run: bool, as_json: bool) -> None:
    from disam_peft.common.cache import remove as remove_entry

    gone = chosen if dry_run else [entry for entry in chosen if remove_entry(entry)]
    if as_json:
        _print_json(gone)
        return
    from rich.filesize import decimal

    for entry in gone:
        say(f"{'would remove' if dry_run else 'removed'} {entry.name} ({decimal(entry.size)})")
    for entry in chosen:
        if entry not in gone:
            say(f"kept {entry.name}: a process has begun to use it")
    say(f"{decimal(sum(entry.size for entry in gone))} {'would be freed' if dry_run else 'freed'}")


def _print_json(entries: list[Kept]) -> None:
    rows = [
        {
            "name": entry.name,
            "kind": entry.kind,
            "path": str(entry.path),
            "bytes": entry.size,
            "used": entry.used,
            "data": list(entry.data),
            "state": entry.state,
        }
        for entry in entries
    ]
    say(json.dumps(rows, indent=1))
