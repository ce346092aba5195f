"""An optimizer whose step has no effect where a loss or gradient is not finite.

On a GPU the host learns only later whether a step was taken: a fused optimizer decides that by a flag on the device.
The host, whose schedule and records depend on it, reads the flag one step later, when the passes of the next step are
queued. So the device always has work. On a CPU everything is known when ``step`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.errors import UserError

# How an optimizer computes is a matter of the device, not of the past of a run.
_OF_THE_DEVICE = {"params", "foreach", "fused", "capturable"}


class StepOutcome:
    """Whether an optimizer step changed the weights.

    Attributes:
        applied: shape (), bool, on the device of the weights: True if the step was taken. Computing with it does not
            wait for the device, reading it on the host does.
    """

    def __init__(self, applied: Tensor) -> None:
        self.applied = applied
        self._skipped: bool | None = None
        self._actions: list[Callable[[bool], None]] = []

    def when_known(self, action: Callable[[bool], None]) -> None:
        """Call ``action(skipped)`` as soon as the host knows: now, or in the next ``GuardedOptimizer.flush``."""
        if self._skipped is None:
            self._actions.append(action)
        else:
            action(self._skipped)

    def resolve(self, skipped: bool) -> None:
        """The host has learnt it. Called once, by the optimizer."""
        self._skipped = skipped
        actions, self._actions = self._actions, []
        for action in actions:
            action(skipped)


class GuardedOptimizer:
    """Wraps a torch optimizer, with Accelerate's loss scaler where there is one.

    Args:
        optimizer: of the trained parameters, in one group.
        names: what these parameters are called in checkpoints, in their order.
        accelerator: has the loss scaler, if any.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Sequence[str], accelerator: Accelerator) -> None:
        self.optimizer, self._names, self._accelerator = optimizer, list(names), accelerator
        self._scaled = accelerator.prepare_optimizer(optimizer)
        self._decides_itself = bool(optimizer.defaults.get("fused"))
        self._lags = self._params[0].is_cuda  # a CPU is done when a call returns
        self._pending: tuple[StepOutcome, _Flag, bool] | None = None

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def clip_gradients(self, limit: float | None) -> Tensor:
        """Scale the gradients down to a norm of at most ``limit`` (None: leave them), and remove the loss scale.

        Returns:
            The norm before clipping, at loss scale 1, shape ().
        """
        if self._accelerator.scaler is not None or limit is not None:
            norm = self._accelerator.clip_grad_norm_(self._params, float("inf") if limit is None else limit)
            assert norm is not None
            return norm
        return torch.nn.utils.get_total_norm([p.grad for p in self._params if p.grad is not None])

    def step(self, is_finite: Tensor) -> StepOutcome:
        """Update the weights where ``is_finite`` (shape (), bool, on the device), else change nothing at all.

        Under a loss scaler it is the scaler that finds what is not finite: it skips the step and halves its scale.
        """
        self.flush()
        if self._accelerator.scaler is not None:
            self._scaled.step()
            outcome = StepOutcome(torch.tensor(not self._scaled.step_was_skipped, device=self._params[0].device))
            outcome.resolve(bool(self._scaled.step_was_skipped))
        elif self._decides_itself:
            outcome = self._step_unseen(is_finite)
            if not self._lags:
                self.flush()
        else:
            skipped = not bool(is_finite)
            if not skipped:
                self._scaled.step()
            outcome = StepOutcome(is_finite)
            outcome.resolve(skipped)
        return outcome

    def flush(self) -> None:
        """Wait until the outcome of the last step is known; then schedule and records are up to date with it."""
        if self._pending is None:
            return
        (outcome, flag, is_first), self._pending = self._pending, None
        skipped = flag.read()
        if skipped and is_first:
            # torch made the state on the way, and left momentum as the memory happened to be
            self.optimizer.state.clear()
        outcome.resolve(skipped)

    def _step_unseen(self, is_finite: Tensor) -> StepOutcome:
        found_inf = (~is_finite).float()
        is_first = not self.optimizer.state
        flag = _Flag(found_inf)  # before the update is queued, for which it need not wait
        # Made for loss scalers: where it is 1, the kernels leave weights, state and the count of steps as they are.
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        try:
            self._scaled.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        outcome = StepOutcome(is_finite)
        self._pending = outcome, flag, is_first
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """Slots of the optimizer by parameter name, settings of its groups, and the loss scaler's state."""
        self.flush()
        nest, scaler = self.optimizer.state_dict(), self._accelerator.scaler
        return {
            "slots": {
                self._names[number]: {slot: value for slot, value in slots.items() if value is not None}
                for number, slots in nest["state"].items()
            },
            "groups": [_without_device_settings(group) for group in nest["param_groups"]],
            "scaler": None if scaler is None else dict(scaler.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: it is the state of another optimizer, of other parameters, or of another precision.
        """
        groups, scaler = self.optimizer.state_dict()["param_groups"], self._accelerator.scaler
        here, saved = [set(_without_device_settings(g)) for g in groups], [set(g) for g in state["groups"]]
        if here != saved or not set(state["slots"]) <= set(self._names):
            raise UserError(f"its optimizer differs (here {here}; saved {saved})")
        if (scaler is None) != (state["scaler"] is None):
            raise UserError("its precision differs: only one of the two has a loss scaler")
        for group, kept in zip(groups, state["groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
        slots = {self._names.index(name): dict(values) for name, values in state["slots"].items()}
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if scaler is not None:
            scaler.load_state_dict(dict(state["scaler"]))


def _without_device_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _OF_THE_DEVICE}


class _Flag:
    """A number on its way from the device to the host."""

    def __init__(self, on_device: Tensor) -> None:
        self._value, self._arrived = on_device, None
        if on_device.is_cuda:
            self._value = torch.empty((), dtype=on_device.dtype, pin_memory=True)  # or the copy would wait
            self._value.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.current_stream(on_device.device).record_event()

    def read(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
