"""Several processes share the runs of a folder: each takes those that nobody else works on, and waits for the rest."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

from disam_peft.common.finished import FINISHED
from disam_peft.common.locks import InUse, locked
from disam_peft.common.processes import on_main
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.errors import Notice
from disam_peft.experiments import run_folder
from disam_peft.experiments.run_folder import Planned, is_finished

POLL_SECONDS = 1.0


class Turns:
    """The runs of one training, one after another, each with its folder locked while it is worked on.

    A run whose folder another process holds is left for later. When there is no other left, it is waited for: it is
    then finished, and kept, or it was given up, and goes on here.

    Args:
        runs: recipes that name the domain they hold out.
        dataset: their data.
        overwrite, resume: as in ``run.train``.
        wait: False: a folder that another process holds is an error, before anything is done.
    """

    def __init__(
        self, runs: Sequence[Recipe], dataset: DomainDataset, *, overwrite: bool, resume: bool, wait: bool
    ) -> None:
        self._runs, self._dataset = runs, dataset
        self._overwrite, self._resume, self._wait = overwrite, resume, wait
        self._began = time.time()

    def __iter__(self) -> Generator[tuple[int, Planned], None, None]:
        """The number of a run and what is to be done in its folder, which is locked until the next is asked for. All
        processes of a distributed run ask together.

        Raises:
            UserError: a folder holds something else, before anything is changed in any of them.
        """
        if len(self._runs) > 1:
            on_main(self._look_ahead)
        waiting = list(range(len(self._runs)))
        told = False
        while waiting:
            with ExitStack() as held:
                found = on_main(lambda: self._take(waiting, held))
                if not isinstance(found, str):
                    waiting.remove(found[0])
                    yield found
                    continue
            if not told:
                warnings.warn(f"{found}; this process waits for it (--no-wait does not)", Notice, stacklevel=3)
                told = True
            on_main(lambda: time.sleep(POLL_SECONDS))

    def _look_ahead(self) -> None:
        """Refuse what cannot be done before the first run has taken its hours."""
        for run in self._runs:
            try:
                with locked(_folder(run)):
                    self._plan(run, resume=self._resume)
            except InUse:
                if not self._wait:
                    raise

    def _take(self, waiting: Sequence[int], held: ExitStack) -> tuple[int, Planned] | str:
        """The first run that nobody else works on, locked; or who works on one."""
        busy = ""
        for number in waiting:
            run = self._runs[number]
            try:
                held.enter_context(locked(_folder(run)))
            except InUse as error:
                if not self._wait:
                    raise
                busy = error.who
                continue
            # What is half done by now was begun by another process meanwhile: there was nothing of the kind before.
            begun = len(self._runs) > 1 and not run_folder.is_free(_folder(run)) and not self._overwrite
            return number, self._plan(run, resume=self._resume or begun)
        return busy

    def _plan(self, run: Recipe, *, resume: bool) -> Planned:
        overwrite = self._overwrite and not finished_since(_folder(run), self._began)
        return run_folder.plan(run, lambda: self._dataset, overwrite=overwrite, resume=resume)


def finished_since(folder: Path, began: float) -> bool:
    """Whether the run of a folder was finished after this time: by a process that shares the work."""
    return is_finished(folder) and (folder / FINISHED).is_file() and (folder / FINISHED).stat().st_mtime >= began


def until_one_is_free(folders: Sequence[Path], poll: Callable[[float], object] = time.sleep) -> str:
    """Return when no other process holds one of these folders any more; says who held one, empty if nobody did."""
    who = ""
    while True:
        for folder in folders:
            try:
                with locked(folder):
                    return who
            except InUse as error:
                who = error.who
        poll(POLL_SECONDS)


def _folder(run: Recipe) -> Path:
    return run.folder(run.protocol.domain)
