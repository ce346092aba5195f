"""The verb that looks at data before anything is trained on them: ``check-data``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from disam_peft.cli.options import Overrides

if TYPE_CHECKING:
    from disam_peft.config.recipe import Recipe


def check_data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or archive of <domain>/<class>/*.jpg; a CSV, Parquet or JSON Lines file; a folder saved by "
            "the library datasets; a recipe; or a setting such as data.hub=NAME.",
        ),
    ],
    overrides: Overrides = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all findings to this file.")] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Judge the data for this held-out domain; short for protocol.held_out=NAME.")
    ] = None,
) -> None:
    """Census of domains and classes, bad files, duplicates, and what training will say. Exits with 1 where it would
    refuse the data, or where a file cannot be used."""
    recipe = _recipe(source, overrides or [], held_out)
    from dataclasses import asdict

    from disam_peft.cli.data_tables import print_data_report, print_verdict
    from disam_peft.common.files import write_output
    from disam_peft.common.records import json_text
    from disam_peft.experiments.data_verdict import look_at_data

    report, verdict = look_at_data(recipe)
    print_data_report(report)
    print_verdict(verdict)
    if json_file is not None:
        write_output(json_file, json_text({**report.to_dict(), "train": asdict(verdict)}))
    if verdict.refusals or (report.bad and not recipe.data.skip_bad):
        raise typer.Exit(1)


def _recipe(source: str, overrides: list[str], held_out: str | None) -> Recipe:
    """The recipe whose data are looked at: the one in a file, or one with every default for a source of data.

    Raises:
        UserError: all mistakes in it, at once.
    """
    from disam_peft.config.mistakes import all_mistakes
    from disam_peft.config.name_texts import with_names
    from disam_peft.config.overrides import apply_overrides, set_key
    from disam_peft.config.recipe import Recipe, checked
    from disam_peft.config.yaml import read_yaml
    from disam_peft.errors import UserError

    path, mistakes = Path(source), list[str]()
    values: dict[str, Any]
    if path.suffix.lower() in (".yaml", ".yml"):
        values, what = read_yaml(path, "recipe"), f"recipe {path}"
    else:
        # what is looked at depends on data, protocol and seed alone; the rest has to be something
        values, what = {"name": "check", "backbone": {"name": "ViT-B-32"}, "adapter": {"kind": "linear_probe"}}, "data"
        if not path.exists() and source.partition("=")[0].startswith("data."):
            overrides = [source, *overrides]
        elif not any(override.partition("=")[0] in _sources() for override in overrides):
            set_key(values, f"data.{_setting(path)}", source, mistakes)
    apply_overrides(values, overrides, mistakes)
    if held_out is not None:
        set_key(values, "protocol.held_out", held_out, mistakes)
    protocol = values.setdefault("protocol", {})
    if what == "data" and isinstance(protocol, dict) and protocol.get("kind") != "all":
        protocol.setdefault("held_out", "all")

    def texts() -> dict[str, Any]:
        found = {} if what == "data" else read_yaml(path, "recipe", as_text=True)
        apply_overrides(found, overrides, [], as_text=True)
        return found

    recipe = checked(with_names(values, Recipe, texts), mistakes)
    if recipe is None or mistakes:
        raise UserError(all_mistakes(mistakes, what))
    return recipe


def _sources() -> set[str]:
    from disam_peft.config.data import SOURCE_SETTINGS

    return {f"data.{name}" for name in SOURCE_SETTINGS}


def _setting(path: Path) -> str:
    """The setting of ``data`` that names a path as a source."""
    from disam_peft.config.data import SOURCE_OF_SUFFIX

    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return "hub" if saved or any(any(path.glob(ending)) for ending in ("*.parquet", "data/*.parquet")) else "root"
    return SOURCE_OF_SUFFIX.get(path.suffix.lower(), "root")
