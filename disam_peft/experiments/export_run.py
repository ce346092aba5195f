"""Write the adapter of a finished run in a form that other software reads."""

from __future__ import annotations

from pathlib import Path

from disam_peft.adapters.manifest import read_manifest
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.names import name_of_folder
from disam_peft.errors import UserError, did_you_mean
from disam_peft.experiments.run_folder import ADAPTER, find_runs
from disam_peft.export.merged import export_merged
from disam_peft.export.peft import export_peft

FORMS = ("peft", "merged")


def export_run(folder: Path, to: str, output: Path, *, held_out: str | None = None) -> Path:
    """Export the adapter of a run: ``peft`` (the adapter alone) or ``merged`` (a complete checkpoint of its family).

    Args:
        output: a folder that is new or empty.
        held_out: which run is meant, where ``folder`` holds several.

    Raises:
        UserError: several runs in ``folder`` and none chosen; an ``output`` that holds files; an adapter that cannot
            be merged.
    """
    runs = find_runs(folder)
    names = [name_of_folder(run.name) for run in runs]
    if held_out is not None:
        runs = [run for run, name in zip(runs, names, strict=True) if held_out in (name, run.name)]
        if not runs:
            raise UserError(f"no run with held-out domain {held_out!r} in {folder}{did_you_mean(held_out, names)}")
    if len(runs) > 1:
        listed = ", ".join(names)
        raise UserError(f"{folder} holds {len(runs)} runs ({listed}): choose one with --held-out, or name its folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --output, or remove it")
    if to not in FORMS:
        raise UserError(f"--to {to!r} is not one of {', '.join(FORMS)}{did_you_mean(to, FORMS)}")
    source = runs[0] / ADAPTER
    classifier = load_adapter(source)
    if to == "merged":
        export_merged(output, classifier)
    else:
        export_peft(output, classifier, trained_with=read_manifest(source).trained_with)
    return output
