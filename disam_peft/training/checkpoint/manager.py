"""When a run saves, from where it goes on, and how it ends early.

All processes act together: a decision that one of them took alone would leave the others waiting.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from pydantic import Field, JsonValue, ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from disam_peft import __version__
from disam_peft.common.processes import from_all, largest, on_main
from disam_peft.config.base import Config
from disam_peft.config.training import TrainConfig
from disam_peft.disam.random_state import RandomState
from disam_peft.errors import Diverged, Notice, Stopped, UserError
from disam_peft.training.checkpoint.recorded_steps import cut_back
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from disam_peft.training.checkpoint.signals import StopSignals
from disam_peft.training.checkpoint.storage import complete_checkpoints, read_checkpoint, sweep, write_checkpoint

TENSORS, RECORD = "tensors.safetensors", "state.json"


class Stateful(Protocol):
    """A component of a run that changes from step to step."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that its future depends on; see ``serialization``."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from there, to the same bits.

        Raises:
            UserError: it is the state of another component, for example of an adapter of another rank.
        """


class CheckpointRecord(Config):
    """``state.json``: what is no tensor."""

    format: Literal["disam_peft.training"] = "disam_peft.training"
    format_version: Literal[2] = 2
    disam_peft_version: str
    """The version that wrote it."""
    step: int = Field(ge=0)
    processes: int = Field(ge=1)
    provenance: dict[str, str]
    """What must be the same when the run goes on; see ``CheckpointConfig``."""
    records_bytes: int | None = Field(ge=0)
    """Length of ``metrics.jsonl``."""
    components: dict[str, JsonValue]


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run of training keeps what it needs to go on after a kill, bit for bit.

    Attributes:
        folder: holds the checkpoints and nothing else. The main process alone reads and writes it.
        resume: go on from the newest checkpoint in ``folder``, if there is one.
        provenance: what must be the same for the same bits to come out, as names and values in words: data, weights.
        records: a file that grows by an event, which is a JSON line, at a time: ``metrics.jsonl``. It is cut back to
            what belongs to the checkpoint.
    """

    folder: Path
    resume: bool = False
    provenance: Mapping[str, str] = field(default_factory=dict)
    records: Path | None = None


class CheckpointManager:
    """Saves the components of a run at the end of a step, and brings them back; without a config it does nothing.

    The position in the data is the number of the step alone: batches and augmentation are functions of it.

    Args:
        components: name -> component. Each is registered here once, and nowhere else named.
        params: the trained tensors; their devices are those whose random states are kept.
    """

    def __init__(
        self,
        where: CheckpointConfig | None,
        components: Mapping[str, Stateful],
        params: list[Tensor],
        config: TrainConfig,
        accelerator: Accelerator,
    ) -> None:
        self._where, self._components, self._params = where, components, params
        self._config, self._accelerator = config, accelerator
        self._signals: StopSignals | None = None

    def resume(self) -> int:
        """Bring the components to where the newest checkpoint left them, if the run is to go on and there is one.

        Returns:
            The number of steps that were done by then.

        Raises:
            UserError: the checkpoint is damaged, or was made with something else (says what).
        """
        where = self._where
        if where is None or not where.resume:
            return 0
        newest = on_main(lambda: self._newest(where))
        record = None
        if newest is not None:
            place, files, record = newest
            self._restore(place, files, record)
        if self._accelerator.is_main_process:
            length, step = (None, 0) if record is None else (record.records_bytes, record.step)
            cut_back(where.records, length, step)
            after = "from the start: there is no checkpoint yet" if record is None else f"after step {record.step}"
            warnings.warn(f"going on {after} (of {self._config.steps} steps)", Notice, stacklevel=3)
        return 0 if record is None else record.step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the steps run: signals are noted, and errors say what is safe."""
        if self._where is None:
            yield
            return
        try:
            with StopSignals() as self._signals:
                yield
        except Stopped as stopped:
            stopped.args = (f"{stopped}. {self._safe()}",)
            raise
        except Diverged as error:
            error.args = (
                f"{error}\nGoing on from a checkpoint would come to the same: give the changed command with "
                "--overwrite, or with another name",
            )
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

    def end_of_step(self, step: int, *, validated: bool) -> None:
        """Save if it is time, or if a signal came to any process.

        Raises:
            Stopped: on every process, for that signal.
            UserError: the checkpoint could not be written; the one before it is still there.
        """
        if self._where is None:
            return
        received = self._signals.received if self._signals is not None else None
        number = largest(int(received or 0), self._accelerator.device)
        every = self._config.save_every
        due = validated if every is None else step % every == 0 or step == self._config.steps
        if due or number:
            self._save(self._where, step)
        if number:
            raise Stopped(f"stopped by a signal after step {step} of {self._config.steps}", number)

    def _save(self, where: CheckpointConfig, step: int) -> None:
        states = {name: component.state_dict() for name, component in self._components.items()}
        random_states = from_all(RandomState.of(self._params))

        def write() -> None:
            plain, tensors = to_json_and_tensors(states)
            for rank, state in enumerate(random_states):
                tensors[f"random/{rank}/cpu"] = state.cpu
                tensors.update({f"random/{rank}/device": tensor for _, tensor in state.accelerators})
            record = CheckpointRecord(
                disam_peft_version=__version__,
                step=step,
                processes=len(random_states),
                provenance=dict(where.provenance),
                records_bytes=_length_on_disk(where.records),
                components=plain,
            )
            # copies, as safetensors refuses tensors that share memory
            content = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            files = {TENSORS: save_tensors(content), RECORD: record.model_dump_json(indent=1).encode()}
            write_checkpoint(where.folder, step, files, keep=self._config.keep_checkpoints)

        on_main(write)

    def _newest(self, where: CheckpointConfig) -> tuple[Path, dict[str, bytes], CheckpointRecord] | None:
        sweep(where.folder)
        found = complete_checkpoints(where.folder)
        if not found:
            return None
        files = read_checkpoint(found[-1])
        try:
            record = CheckpointRecord.model_validate_json(files[RECORD])
        except (KeyError, ValidationError) as error:
            raise UserError(
                f"{found[-1]} is whole, but it was written by another version of disam_peft than {__version__}, whose "
                "checkpoints this version cannot go on from (0.1 wrote such ones); resume with the version that wrote "
                "it, or start the run again with --overwrite"
            ) from error
        _require_same_run(found[-1], record, where.provenance, self._accelerator.num_processes)
        return found[-1], files, record

    def _restore(self, place: Path, files: Mapping[str, bytes], record: CheckpointRecord) -> None:
        tensors, rank = load_tensors(files[TENSORS]), self._accelerator.process_index
        if set(record.components) != set(self._components):
            theirs, ours = ", ".join(sorted(record.components)), ", ".join(sorted(self._components))
            raise UserError(f"{place} holds the state of {theirs}; this run has {ours}. {_OTHER_RUN}")
        for name, component in self._components.items():
            try:
                component.load_state_dict(from_json_and_tensors(record.components[name], tensors))
            except UserError as error:
                raise UserError(f"the checkpoint {place} is of another run: {error}. {_OTHER_RUN}") from error
        device = self._params[0].device
        on_device = ((device, tensors[f"random/{rank}/device"]),) if f"random/{rank}/device" in tensors else ()
        RandomState(tensors[f"random/{rank}/cpu"], on_device).restore()

    def _safe(self) -> str:
        assert self._where is not None
        found = complete_checkpoints(self._where.folder)
        if not found:
            return "There is no checkpoint yet"
        return f"The last checkpoint is {found[-1]}; to go on from there, give the same command with --resume"


_OTHER_RUN = "Resume with the settings that it was saved with, or start again with --overwrite"


def _require_same_run(place: Path, record: CheckpointRecord, provenance: Mapping[str, str], processes: int) -> None:
    if record.processes != processes:
        raise UserError(
            f"{place} was saved by {record.processes} process(es), this run has {processes}; the same result is "
            f"promised on the same number only: resume with {record.processes}, or start again with --overwrite"
        )
    before = record.provenance
    changes = [
        f"{key}: {before.get(key, 'none')} -> {provenance.get(key, 'none')}"
        for key in sorted(before.keys() | provenance.keys())
        if before.get(key) != provenance.get(key)
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
