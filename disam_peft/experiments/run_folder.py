"""The state of a run's folder: free, finished, to be continued, or holding another run; and what may be done then."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Literal

from disam_peft.common.files import is_draft, write_atomically
from disam_peft.common.records import RESULTS
from disam_peft.common.run_images import IMAGES, RunImages, write_images
from disam_peft.config.identity import is_harmless
from disam_peft.config.recipe import WRITTEN_BY_US, Recipe, as_yaml, differences, effective, load_recipe
from disam_peft.errors import Notice, UserError

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
Plan = Literal["start", "continue", "keep"]


def plan(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Plan:
    """What to do with the folder of a run that holds one domain out. Nothing is changed yet.

    Raises:
        UserError: it holds something else, or a run that did not finish, and nobody said what to do with it.
    """
    if overwrite and resume:
        raise UserError("--overwrite starts again and --resume goes on; choose one of them")
    folder = recipe.folder(recipe.protocol.held_out)
    if _is_free(folder):
        if resume:
            warnings.warn(f"nothing to go on with in {folder}; it is started", Notice, stacklevel=2)
        return "start"
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} holds files that are no run of disam-peft; choose another output or name")
    if overwrite:
        return "start"
    changes = changed(recipe)
    if changes:
        listed = "\n  ".join(changes)
        what = "holds another run, which cannot be continued so" if resume else "holds another run"
        raise UserError(f"{folder} {what}; choose another name, or --overwrite it. It differs in:\n  {listed}")
    if (folder / RESULTS).is_file():
        return "keep"
    if not resume:
        raise UserError(f"{folder} holds a run that did not finish; --resume continues it, --overwrite starts it again")
    return "continue"


def _is_free(folder: Path) -> bool:
    """Whether the folder holds nothing of worth: it is not there, it is empty, or it holds no more than what a run
    wrote down about itself which then stopped on a mistake before its first step."""
    if not folder.exists():
        return True
    held = {path.name for path in folder.iterdir() if not is_draft(path)}
    if held and held <= {RECIPE, IMAGES} and (folder / RECIPE).is_file():
        return (folder / RECIPE).read_bytes().startswith(WRITTEN_BY_US.encode())
    return not held


def changed(recipe: Recipe) -> list[str]:
    """``key: old -> new`` for every setting that makes ``recipe`` another run than the one in its folder.

    A setting that the folder's recipe lacks has its default, so that a run of an older version, which did not know
    the setting, stays the same run. Values are compared as they take effect: one average is the same written alone or
    as a list of one. A recipe that cannot be read is a difference as well.

    Raises:
        OSError: there is none.
    """
    path = recipe.folder(recipe.protocol.held_out) / RECIPE
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        before = load_recipe(path)
    except UserError as error:
        return [str(error).replace("\n", "\n  ")]
    lines = differences(effective(before), effective(recipe))
    return [line for line in lines if not is_harmless(line.split(":")[0])]


def find_runs(folder: Path) -> list[Path]:
    """The runs in ``folder`` and anywhere below it, by path.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob(RECIPE) if (path.parent / ADAPTER).is_dir())
    runs = [run for run in found if not any(part.startswith(".") for part in run.relative_to(folder).parts)]
    if not runs:
        raise UserError(f"no finished run in {folder}: expected {RECIPE} and {ADAPTER}/ there or in a folder below")
    return runs


def prepare(recipe: Recipe, images: RunImages, *, anew: bool) -> None:
    """Make the folder ready for training, and write which images the run has.

    Args:
        anew: a run of ours that is there goes. Otherwise what was written about its images stays.
    """
    folder = recipe.folder(recipe.protocol.held_out)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if anew and (folder / RECIPE).is_file():
        # as a whole, then its files: half of it would be nobody's run after a kill
        os.rename(folder, replaced)
        (replaced / RECIPE).unlink()
        shutil.rmtree(replaced)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and path.name.startswith(".adapter."):
            shutil.rmtree(path)  # of a kill while the adapter was saved
        elif is_draft(path):
            path.unlink()
    write_atomically(folder / RECIPE, as_yaml(recipe))
    if anew:
        write_images(folder / IMAGES, images)


def clear(folder: Path) -> None:
    """A finished run needs no checkpoints."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
