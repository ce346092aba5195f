"""Everything that the next step depends on, as named tensors and JSON, and back.

torch's own ``state_dict`` of an optimizer is a nest of both. Here its tensors become ``optimizer/<slot>/<parameter>``
and its numbers JSON; nothing needs unpickling, and nothing but these classes' own fields can be set from a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue
from safetensors.torch import load, save
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.base import Config
from disam_peft.disam.random_state import RandomState
from disam_peft.errors import UserError
from disam_peft.training.selection import BestState
from disam_peft.training.step_metrics import StepCounters

TENSORS, RECORD = "tensors.safetensors", "state.json"
# Of an optimizer's settings: how it computes is up to the device, not to the past.
_HOW = {"params", "foreach", "fused", "capturable"}


class StateRecord(Config):
    """``state.json``: what is no tensor."""

    format: Literal["disam_peft.training"] = "disam_peft.training"
    format_version: Literal[1] = 1
    step: int = Field(ge=0)
    processes: int = Field(ge=1)
    made_with: dict[str, str]
    """What must be the same when the run goes on; see ``Checkpoints``."""
    records_bytes: int | None = Field(ge=0)
    """Length of ``metrics.jsonl``."""
    parameters: list[str]
    optimizer_groups: list[dict[str, JsonValue]]
    scheduler: dict[str, JsonValue]
    scaler: dict[str, JsonValue] | None
    """Of fp16's loss scale."""
    best_step: int | None
    skipped_in_a_row: int = Field(ge=0)
    counters: dict[str, int]


@dataclass
class TrainingState:
    """What changes from step to step. The position in the data is ``step`` alone: batches and augmentation are
    functions of it.

    Attributes:
        step: finished steps, as far as it is known what became of them (``outcome.Updates`` asks late).
        losses: of the first and the last step; None before.
        skipped_in_a_row: steps without effect, up to now.
    """

    classifier: ClipClassifier
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: Any
    counters: StepCounters
    best: BestState
    step: int = 0
    losses: tuple[Tensor, Tensor] | None = None
    skipped_in_a_row: int = 0

    def to_files(
        self,
        random_states: list[RandomState],
        *,
        made_with: Mapping[str, str],
        records_bytes: int | None,
    ) -> dict[str, bytes]:
        """The files of a checkpoint; ``random_states`` are those of all processes, in order."""
        parameters = self.classifier.trainable()
        names = list(parameters)
        nest = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {f"adapter/{name}": p.detach() for name, p in parameters.items()}
        for number, slots in nest["state"].items():
            filled = {slot: value for slot, value in slots.items() if value is not None}
            tensors.update({f"optimizer/{slot}/{names[number]}": value for slot, value in filled.items()})
        if self.best.tensors is not None:
            tensors.update({f"best/{name}": tensor for name, tensor in self.best.tensors.items()})
            # as tensors: JSON has no infinity
            tensors["best_score"] = torch.tensor(tuple(self.best.score), dtype=torch.float64)
        if self.losses is not None:
            tensors["losses"] = torch.stack(self.losses)
        for rank, state in enumerate(random_states):
            tensors[f"random/{rank}/cpu"] = state.cpu
            tensors.update({f"random/{rank}/device": tensor for _, tensor in state.accelerators})
        record = StateRecord(
            step=self.step,
            processes=len(random_states),
            made_with=dict(made_with),
            records_bytes=records_bytes,
            parameters=names,
            optimizer_groups=[_plain(group, without=_HOW) for group in nest["param_groups"]],
            scheduler=_plain(self.scheduler.state_dict(), without={"lr_lambdas"}),
            scaler=None if self.scaler is None else _plain(self.scaler.state_dict()),
            best_step=self.best.step,
            skipped_in_a_row=self.skipped_in_a_row,
            counters=self.counters.totals(),
        )
        # copies, as safetensors refuses tensors that share memory
        content = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return {TENSORS: save(content), RECORD: record.model_dump_json(indent=1).encode()}

    def from_files(self, files: Mapping[str, bytes], record: StateRecord, rank: int) -> None:
        """Become what ``to_files`` saw; the random numbers of process ``rank`` go on where they were.

        Raises:
            UserError: the tensors are those of another adapter or optimizer. Nothing is changed then.
        """
        tensors = load(files[TENSORS])
        parameters = self.classifier.trainable()
        adapter, best = _below(tensors, "adapter/"), _below(tensors, "best/")
        _require_same("adapter", _shapes(parameters), _shapes(adapter))
        if best:
            _require_same("best state", _shapes(parameters), _shapes(best))
        _require_same("order of parameters", list(parameters), record.parameters)
        nest = self._optimizer_state(_below(tensors, "optimizer/"), record)
        schedule = self.scheduler.state_dict()
        _require_same("schedule", set(schedule) - {"lr_lambdas"}, set(record.scheduler))
        _require_same("loss scaler", self.scaler is None, record.scaler is None)

        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(adapter[name])
        self.optimizer.load_state_dict(nest)
        self.scheduler.load_state_dict({**schedule, **record.scheduler})
        if self.scaler is not None:
            self.scaler.load_state_dict(record.scaler)
        device = next(iter(parameters.values())).device
        self.step, self.skipped_in_a_row = record.step, record.skipped_in_a_row
        self.counters.load(record.counters, device)
        if "losses" in tensors:
            first, last = tensors["losses"].to(device)
            self.losses = (first, last)
        if best:
            self.best.step, self.best.score = record.best_step, tuple(tensors["best_score"].tolist())
            self.best.tensors = {name: tensor.to(device) for name, tensor in best.items()}
        accelerators = ((device, tensors[f"random/{rank}/device"]),) if f"random/{rank}/device" in tensors else ()
        RandomState(tensors[f"random/{rank}/cpu"], accelerators).restore()

    def _optimizer_state(self, tensors: Mapping[str, Tensor], record: StateRecord) -> dict[str, Any]:
        """torch's nest: the saved slots and numbers, in the groups of this optimizer."""
        groups = self.optimizer.state_dict()["param_groups"]
        found = [set(group) for group in record.optimizer_groups]
        _require_same("optimizer", [set(group) - _HOW for group in groups], found)
        numbers = {name: number for number, name in enumerate(record.parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            slot, name = path.split("/", 1)
            state.setdefault(numbers[name], {})[slot] = tensor
        for group, saved in zip(groups, record.optimizer_groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
        return {"state": state, "param_groups": groups}


def _plain(values: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key not in without
    }


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (*tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _require_same(what: str, here: object, saved: object) -> None:
    if here != saved:
        raise UserError(
            f"the checkpoint is of another run: its {what} differs (here {str(here)[:300]}; saved {str(saved)[:300]}). "
            "Nothing was loaded; resume with the settings that it was saved with, or start again"
        )
