"""Nested states as tensors and JSON, and back, without pickle.

A component's ``state_dict()`` is a nest of dicts, lists and tuples of tensors, numbers, strings and None. Its tensors
go to a safetensors file under the path where they stood (``optimizer/slots/weight/exp_avg``); in the JSON a reference
stands in their place. So nothing is unpickled, and no class can be named by a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_REFERENCE = "tensor"


def to_json_and_tensors(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split a nest; ``path`` begins the names of its tensors.

    Raises:
        TypeError: it holds something that is neither.
    """
    if isinstance(state, Tensor):
        return {_REFERENCE: path}, {path: state}
    if state is None or isinstance(state, (bool, int, float, str)):
        return state, {}
    if isinstance(state, Mapping):
        if any(not isinstance(key, str) for key in state) or set(state) == {_REFERENCE}:
            raise TypeError(f"{path}: keys must be strings, and not {_REFERENCE!r} alone")
        items = {key: to_json_and_tensors(value, f"{path}/{key}" if path else key) for key, value in state.items()}
        tensors = {name: tensor for _, found in items.values() for name, tensor in found.items()}
        return {key: plain for key, (plain, _) in items.items()}, tensors
    if isinstance(state, (list, tuple)):
        parts = [to_json_and_tensors(value, f"{path}/{number}") for number, value in enumerate(state)]
        return [plain for plain, _ in parts], {name: tensor for _, found in parts for name, tensor in found.items()}
    raise TypeError(f"{path} holds a {type(state).__name__}, which a checkpoint cannot keep")


def from_json_and_tensors(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nest that was split; tuples come back as lists.

    Raises:
        KeyError: a reference to a tensor that is not there.
    """
    if isinstance(plain, dict):
        if set(plain) == {_REFERENCE}:
            return tensors[plain[_REFERENCE]]
        return {key: from_json_and_tensors(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [from_json_and_tensors(value, tensors) for value in plain]
    return plain
