"""When a run saves, from where it goes on, and how it ends early. All processes together: a decision that one of them
took alone would leave the others waiting."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from pydantic import ValidationError

from disam_peft.common.processes import from_all, largest, on_main
from disam_peft.config.training import TrainConfig
from disam_peft.disam.random_state import RandomState
from disam_peft.errors import Notice, Stopped, UserError
from disam_peft.training.checkpoint.signals import StopSignals
from disam_peft.training.checkpoint.state import RECORD, StateRecord, TrainingState
from disam_peft.training.checkpoint.storage import complete_checkpoints, read_checkpoint, sweep, write_checkpoint


@dataclass(frozen=True)
class Checkpoints:
    """Where a run of training keeps what it needs to go on after a kill, bit for bit.

    Attributes:
        folder: holds the checkpoints and nothing else. The main process alone reads and writes it.
        resume: go on from the newest checkpoint in ``folder``, if there is one.
        made_with: what must be the same for the same bits to come out, as names and values in words: data, weights.
        records: a file that grows line by line, such as ``metrics.jsonl``; cut back to what belongs to the checkpoint.
    """

    folder: Path
    resume: bool = False
    made_with: Mapping[str, str] = field(default_factory=dict)
    records: Path | None = None


class Saver:
    """Saves at the end of a step what it finds in ``state``; without ``checkpoints`` it does nothing at all."""

    def __init__(
        self, checkpoints: Checkpoints | None, state: TrainingState, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        self._checkpoints, self._state, self._config, self._accelerator = checkpoints, state, config, accelerator
        self._signals: StopSignals | None = None

    def resume(self) -> None:
        """Bring the state to where the newest checkpoint left it, if the run is to go on and there is one.

        Raises:
            UserError: the checkpoint is damaged, or was made with something else (says what).
        """
        where = self._checkpoints
        if where is None or not where.resume:
            return
        newest = on_main(lambda: self._newest(where))
        record = None
        if newest is not None:
            files, record = newest
            self._state.from_files(files, record, self._accelerator.process_index)
        if self._accelerator.is_main_process:
            _cut(where.records, None if record is None else record.records_bytes)
            after = "from the start: there is no checkpoint yet" if record is None else f"after step {record.step}"
            warnings.warn(f"going on {after} (of {self._config.steps} steps)", Notice, stacklevel=3)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the steps run: signals are noted, and errors say what is safe."""
        if self._checkpoints is None:
            yield
            return
        try:
            with StopSignals() as self._signals:
                yield
        except Stopped as stopped:
            stopped.args = (f"{stopped}. {self._safe()}",)
            raise
        except UserError as error:
            error.args = (f"{error}\n{self._safe()}",)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk is full: {error}. Make room. {self._safe()}") from error
            error.add_note(self._safe())
            raise
        except Exception as error:
            error.add_note(self._safe())
            raise
        finally:
            self._signals = None

    def end_of_step(self, step: int, *, validated: bool, settle: Callable[[], None]) -> None:
        """Save if it is time, or if a signal came to any process.

        Args:
            settle: called first, to bring the state up to date with this step.

        Raises:
            Stopped: on every process, for that signal.
            UserError: the checkpoint could not be written; the one before it is still there.
        """
        if self._checkpoints is None:
            return
        received = self._signals.received if self._signals is not None else None
        number = largest(int(received or 0), self._accelerator.device)
        every = self._config.save_every
        due = validated if every is None else step % every == 0 or step == self._config.steps
        if due or number:
            settle()
            self._save(self._checkpoints)
        if number:
            raise Stopped(f"stopped by a signal after step {step} of {self._config.steps}", number)

    def _save(self, where: Checkpoints) -> None:
        random_states = from_all(RandomState.of(list(self._state.classifier.trainable().values())))

        def write() -> None:
            length = _length_on_disk(where.records)
            files = self._state.to_files(random_states, made_with=where.made_with, records_bytes=length)
            write_checkpoint(where.folder, self._state.step, files, keep=self._config.keep_checkpoints)

        on_main(write)

    def _newest(self, where: Checkpoints) -> tuple[dict[str, bytes], StateRecord] | None:
        sweep(where.folder)
        found = complete_checkpoints(where.folder)
        if not found:
            return None
        files = read_checkpoint(found[-1])
        try:
            record = StateRecord.model_validate_json(files[RECORD])
        except (KeyError, ValidationError) as error:
            raise UserError(
                f"{found[-1]} is whole, but no checkpoint of this version of disam_peft ({error}); start again, or "
                "resume with the version that wrote it"
            ) from error
        _require_same_run(found[-1], record, where.made_with, self._accelerator.num_processes)
        return files, record

    def _safe(self) -> str:
        assert self._checkpoints is not None
        found = complete_checkpoints(self._checkpoints.folder)
        if not found:
            return "There is no checkpoint yet"
        return f"The last checkpoint is {found[-1]}; to go on from there, give the same command with --resume"


def _require_same_run(place: Path, record: StateRecord, made_with: Mapping[str, str], processes: int) -> None:
    if record.processes != processes:
        raise UserError(
            f"{place} was saved by {record.processes} process(es), this run has {processes}; the same result is "
            f"promised on the same number only: resume with {record.processes}, or start again with --overwrite"
        )
    before = record.made_with
    changes = [
        f"{key}: {before.get(key, 'none')} -> {made_with.get(key, 'none')}"
        for key in sorted(before.keys() | made_with.keys())
        if before.get(key) != made_with.get(key)
    ]
    if changes:
        shown = [*changes[:20], *([f"and {len(changes) - 20} more"] if len(changes) > 20 else [])]
        listed = "\n  ".join(shown)
        raise UserError(
            f"{place} was made with something else than what is there now; bring it back, or start again with "
            f"--overwrite. It differs in:\n  {listed}"
        )


def _length_on_disk(records: Path | None) -> int | None:
    """The length of a file, all of which is on the disk when this returns."""
    if records is None or not records.exists():
        return None
    with open(records, "rb") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def _cut(records: Path | None, length: int | None) -> None:
    """What was recorded after the checkpoint will be recorded again."""
    if records is not None and records.exists():
        os.truncate(records, min(records.stat().st_size, length or 0))
