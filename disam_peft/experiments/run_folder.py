"""The state of a run's folder: free, finished, to be continued, or holding another run; and what may be done then."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from disam_peft.common.files import is_draft, require_no_link, require_own_file, wait_for_disk, write_atomically
from disam_peft.common.finished import FINISHED, Finished, read_finished, write_finished
from disam_peft.common.processes import is_main
from disam_peft.common.records import RESULTS, read_results
from disam_peft.common.run_images import IMAGES, RunImages, read_images, write_images
from disam_peft.config.identity import COMPUTED_FROM_DATA, effective, is_harmless
from disam_peft.config.names import name_of_folder
from disam_peft.config.protocol import named_domain
from disam_peft.config.recipe import WRITTEN_BY_US, Recipe, as_yaml, differences, load_recipe
from disam_peft.errors import Notice, UserError, did_you_mean
from disam_peft.experiments.run_data import DataComparison, compare_data

if TYPE_CHECKING:
    from disam_peft.data.dataset import DomainDataset

RECIPE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
_SUFFIXES = {".json", ".jsonl", ".parquet", ".yaml"}
"""Of the files that a run writes; its folders have none."""
_BEFORE_THE_FIRST_STEP = {RECIPE, IMAGES, "tracking.jsonl", "tensorboard", "wandb"}
Plan = Literal["start", "continue", "keep"]


class Planned(NamedTuple):
    """What to do with the folder of a run; and where a finished run is kept, what that rests on, if not on the content
    of every image as it is now."""

    plan: Plan
    basis: str = ""


def plan(
    recipe: Recipe, data: Callable[[], DomainDataset], *, overwrite: bool = False, resume: bool = False
) -> Planned:
    """What to do with the folder of a run that holds one domain out. Nothing is changed yet.

    Args:
        data: loads the recipe's data. It is called where a run in the folder recorded which images it had.

    Raises:
        UserError: it holds something else, or a run that did not finish, and nobody said what to do with it; a folder
            stands where a file of the run belongs.
    """
    if overwrite and resume:
        raise UserError("--overwrite starts again and --resume goes on; choose one of them")
    folder = recipe.folder(recipe.protocol.domain)
    _refuse_links(folder)
    if is_free(folder):
        if resume:
            warnings.warn(f"nothing to go on with in {folder}; it is started", Notice, stacklevel=2)
        return Planned("start")
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} holds files that are no run of disam-peft; choose another output or name")
    if overwrite:
        return Planned("start")
    changes = changed(recipe)
    if changes:
        raise UserError("\n".join([*_mistakes(recipe), _other_run(folder, "another run", changes, resume=resume)]))
    compared = compared_data(recipe, data)
    if compared.differences:
        raise UserError(_other_run(folder, "a run of other data", compared.differences, resume=resume))
    gone = lost(folder)
    if is_finished(folder) and not gone:
        if other := _other_backbone(recipe, folder):
            raise UserError(_other_run(folder, "a run with another backbone", [other], resume=resume))
        return Planned("keep", compared.basis)
    if not resume and (folder / FINISHED).is_file():
        raise UserError(f"{folder} holds a finished run whose {gone} is gone; --resume makes it again")
    if not resume:
        raise UserError(f"{folder} holds a run that did not finish; --resume continues it, --overwrite starts it again")
    for path in sorted(folder.iterdir()):  # and not after all of the training, when they are written
        if path.suffix in _SUFFIXES:
            require_own_file(path)
    return Planned("continue")


def _mistakes(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe beyond what its keys and values show, as far as it can be told without loading
    anything: a misspelt model is a mistake, and not another run."""
    from disam_peft.adapters.prompts import ClassPrompts, fill_templates, prompt_templates
    from disam_peft.backbones.families import require_known

    found = []
    for check in (
        lambda: require_known(recipe.backbone),
        lambda: fill_templates(ClassPrompts(("class",), prompt_templates(recipe.prompts))),
    ):
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def _other_run(folder: Path, what: str, differences: Sequence[str], *, resume: bool) -> str:
    verb = f"holds {what}, which cannot be continued so" if resume else f"holds {what}"
    first = {"another run": "", "a run of other data": "bring its data back, "}.get(what, "bring its files back, ")
    return f"{folder} {verb}; {first}choose another name, or --overwrite it. It differs in:\n  " + "\n  ".join(
        differences
    )


def _refuse_links(folder: Path) -> None:
    """Pass if the folder and the files in it are no links: what a run writes stays in its folder.

    Raises:
        UserError: one is; names it and where it leads.
    """
    for place in (folder, folder / CHECKPOINTS, folder / ADAPTER):
        require_no_link(place)
        for path in place.iterdir() if place.is_dir() else ():
            require_no_link(path)


def is_free(folder: Path) -> bool:
    """Whether the folder holds nothing of worth: it is not there, it is empty, or it holds no more than what a run
    wrote down about itself which then stopped on a mistake before its first step."""
    if not folder.exists():
        return True
    held = {path.name for path in folder.iterdir() if not is_draft(path)}
    if held and held <= _BEFORE_THE_FIRST_STEP and (folder / RECIPE).is_file():
        return (folder / RECIPE).read_bytes().startswith(WRITTEN_BY_US.encode())
    return not held


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a run with all that belongs to it. Version 0.1 wrote nothing after the results; its runs
    are those that did not record their images."""
    if not (folder / RESULTS).is_file():
        return False
    return (folder / FINISHED).is_file() or not (folder / IMAGES).is_file()


def warn_if_unfinished(run: Path) -> None:
    """Warn where the adapter of a run is not the one that it would end with."""
    if not is_finished(run):
        warnings.warn(
            f"{run} did not finish: its adapter is the best state so far, and not the run's result; train with "
            "--resume first",
            stacklevel=3,
        )


def lost(folder: Path) -> str:
    """What a finished run cannot be without and its folder does not hold: its results or its adapter; empty: nothing.

    Raises:
        UserError: results that are damaged.
    """
    if not (folder / RESULTS).is_file() or not read_results(folder / RESULTS):
        return RESULTS
    has_adapter = (folder / ADAPTER).is_dir() and any((folder / ADAPTER).iterdir())
    return "" if has_adapter else ADAPTER


def changed(recipe: Recipe) -> list[str]:
    """``key: old -> new`` for every setting that makes ``recipe`` another run than the one in its folder.

    A setting that the folder's recipe lacks has its default, so that a run of an older version, which did not know
    the setting, stays the same run. Values are compared as they take effect: one average is the same written alone or
    as a list of one. A recipe that cannot be read is a difference as well. Where the data come from makes no
    difference where the run recorded its images, which ``compared_data`` compares, or is bound to a checkpoint.

    Raises:
        OSError: there is none.
    """
    folder = recipe.folder(recipe.protocol.domain)
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(folder / RECIPE)
    try:
        before = load_recipe(folder / RECIPE)
    except UserError as error:
        return [str(error).replace("\n", "\n  ")]
    knows_images = (folder / IMAGES).is_file() and not _both_painted(before, recipe)
    place_matters = is_finished(folder) and not knows_images and not _same_place(before.data.root, recipe.data.root)

    def counts(key: str) -> bool:
        if key == "data.root":
            return place_matters
        if key.startswith("data.") and knows_images:
            return key in COMPUTED_FROM_DATA
        return not is_harmless(key)

    old, new = effective(before), effective(recipe)
    for values, one in ((old, before), (new, recipe)):  # by name: earlier versions wrote a domain called all as all
        values["protocol"]["held_out"] = one.protocol.domain
    lines = differences(old, new)
    return [line for line in lines if counts(line.split(":")[0])]


def compared_data(recipe: Recipe, data: Callable[[], DomainDataset]) -> DataComparison:
    """How the recipe's data compare with those of the run in its folder, whose settings are the same.

    Raises:
        UserError: what the run recorded of its images cannot be read; data that cannot be loaded.
    """
    folder = recipe.folder(recipe.protocol.domain)
    if _both_painted(load_recipe(folder / RECIPE), recipe):
        return DataComparison()  # painted from the same settings
    if not (folder / IMAGES).is_file():
        why = f"its {IMAGES} is gone" if (folder / FINISHED).is_file() else "its version did not record them"
        return DataComparison(
            basis=f"which images the run had is not known, as {why}: it is kept as its recipe agrees, with the place "
            "of its data"
        )
    return compare_data(read_images(folder / IMAGES), recipe, data())


def _other_backbone(recipe: Recipe, folder: Path) -> str:
    """``what: before -> now`` where the files of the finished run's backbone make another one by now; else empty.

    The backbone is loaded only where these files are others: a changed comment makes no other backbone. Where there are
    none any more, or the run is of an older version, nothing can be compared.

    Raises:
        UserError: they cannot be loaded.
    """
    from disam_peft.backbones.families import load_backbone, local_files_hash

    before = read_finished(folder)
    if not before.backbone_files:
        return ""
    try:
        now = local_files_hash(recipe.backbone, again=recipe.data.verify == "full")
    except OSError as error:
        raise UserError(f"the backbone {recipe.backbone.name} cannot be read ({error})") from error
    if now in ("", before.backbone_files):
        return ""
    found = load_backbone(recipe.backbone).identity
    name = recipe.backbone.pretrained or recipe.backbone.name
    return "" if found == before.backbone else f"backbone {name}: sha256 {before.backbone[:12]} -> {found[:12]}"


def _both_painted(before: Recipe, recipe: Recipe) -> bool:
    return before.data.shapes is not None and recipe.data.shapes is not None


def _same_place(before: Path | None, now: Path | None) -> bool:
    return before == now or (
        before is not None and now is not None and os.path.realpath(before) == os.path.realpath(now)
    )


def find_run(folder: Path, held_out: str | None = None) -> Path:
    """The one run in ``folder``, or the one there that left ``held_out`` out.

    Raises:
        UserError: there is none, or there are several and none was chosen.
    """
    runs = find_runs(folder)
    names = [name_of_folder(run.name) for run in runs]
    if held_out is not None:
        meant = (held_out, named_domain(held_out))
        runs = [run for run, name in zip(runs, names, strict=True) if name in meant or run.name in meant]
        if not runs:
            raise UserError(f"no run with held-out domain {held_out!r} in {folder}{did_you_mean(held_out, names)}")
    if len(runs) > 1:
        listed = ", ".join(names)
        raise UserError(f"{folder} holds {len(runs)} runs ({listed}): choose one with --held-out, or name its folder")
    return runs[0]


def find_runs(folder: Path) -> list[Path]:
    """The runs in ``folder`` and anywhere below it, by path.

    Raises:
        UserError: there is none.
    """
    # a pipe with the name of a recipe would wait for ever for somebody who writes to it
    found = sorted(path.parent for path in folder.rglob(RECIPE) if path.is_file() and (path.parent / ADAPTER).is_dir())
    runs = [run for run in found if not any(part.startswith(".") for part in run.relative_to(folder).parts)]
    if not runs:
        raise UserError(f"no finished run in {folder}: expected {RECIPE} and {ADAPTER}/ there or in a folder below")
    return runs


def prepare(recipe: Recipe, images: RunImages, *, anew: bool) -> None:
    """Make the folder ready for training, and write which images the run has.

    Args:
        anew: a run of ours that is there goes. Otherwise what was written about its images stays.
    """
    folder = recipe.folder(recipe.protocol.domain)
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
    (folder / FINISHED).unlink(missing_ok=True)  # of a run whose results are gone: it is not finished now
    write_atomically(folder / RECIPE, as_yaml(recipe))
    if anew:
        write_images(folder / IMAGES, images)


@contextmanager
def withdrawn_unless_begun(folder: Path) -> Iterator[None]:
    """Leave nothing of a run that fails before its first step, so that the corrected one finds a free folder."""
    try:
        yield
    except Exception:
        if is_main() and folder.exists() and is_free(folder):
            for name in (IMAGES, RECIPE):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # a tracker's files stay
                folder.rmdir()
        raise


def finish(folder: Path, *, backbone: str = "", backbone_files: str = "") -> None:
    """Say that the run is complete, after all its other files are on the disk. It then needs no checkpoints.

    Args:
        backbone, backbone_files: see ``Finished``.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and CHECKPOINTS not in path.relative_to(folder).parts
    ]
    for path in files:
        wait_for_disk(path)
    images = read_images(folder / IMAGES)
    write_finished(folder, Finished(len(images), images.identity, backbone, backbone_files))
    clear(folder)


def clear(folder: Path) -> None:
    """A finished run needs no checkpoints."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
