"""State that holds a value for each domain. Shapes in this file: D domains in play, A domains ever seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class DomainState:
    """A tensor of values, a row for each domain id that was ever in play.

    Where the ids in play are always the same (a training run says how many there are) nothing waits for the device,
    but for the first step.
    """

    def __init__(self) -> None:
        self._ids_A: Tensor | None = None
        self._value_A: Tensor | None = None
        self._in_play: Tensor | None = None  # the ids of the last call, and where they stand among all
        self._where_D: Tensor | None = None

    def bring_into_play(self, ids_D: Tensor, start_D: Tensor) -> None:
        """From now on ``value`` and ``where`` are those of these ids; ids that are new get the values ``start_D``."""
        if ids_D is self._in_play:
            return
        if self._ids_A is None or self._value_A is None:
            self._ids_A, self._value_A = ids_D, start_D
        else:
            known_A, value_A = self._ids_A.to(ids_D.device), self._value_A.to(start_D.device)
            is_new_D = ~torch.isin(ids_D, known_A)
            order_A = (ids_A := torch.cat([known_A, ids_D[is_new_D]])).argsort()
            self._ids_A, self._value_A = ids_A[order_A], torch.cat([value_A, start_D[is_new_D]])[order_A]
        self._in_play, self._where_D = ids_D, torch.searchsorted(self._ids_A, ids_D)

    @property
    def where_D(self) -> Tensor:
        """Rows of the ids in play."""
        assert self._where_D is not None  # bring_into_play comes first
        return self._where_D

    @property
    def value_A(self) -> Tensor:
        """The values of all ids."""
        assert self._value_A is not None  # bring_into_play comes first
        return self._value_A

    @value_A.setter
    def value_A(self, value_A: Tensor) -> None:
        self._value_A = value_A

    @property
    def value_D(self) -> Tensor:
        """The values of the ids in play."""
        return self.value_A[self.where_D]

    def among_all(self, value_D: Tensor) -> Tensor:
        """Values of the ids in play, with 0 for the others: (D, ...) to (A, ...)."""
        zeros_A = value_D.new_zeros(len(self.value_A), *value_D.shape[1:])
        return zeros_A.index_copy(0, self.where_D, value_D)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty before the first step."""
        if self._ids_A is None or self._value_A is None:
            return {}
        return {"domain_ids": self._ids_A.clone(), "values": self._value_A.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.__init__()  # type: ignore[misc]
        if state:
            self._ids_A, self._value_A = state["domain_ids"], state["values"]
