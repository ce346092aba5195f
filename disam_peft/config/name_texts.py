"""Names that YAML reads as something else: ``2009``, ``0.0``, ``true``, ``null`` are texts where a text is wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from disam_peft.config.mistakes import keys_of

_WANTS_TEXT = ("string_type", "path_type")


def with_names(
    values: dict[str, Any], model: type[BaseModel], texts: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """``values`` in which numbers, dates and words such as ``true`` are texts wherever ``model`` wants a text alone.

    Args:
        texts: the same values as they are written, see ``parse_yaml``; asked for only where something is to be
            replaced.
    """
    wanting = [["protocol", "held_out"]] if _has_null_domain(values) else []
    try:
        model.model_validate(values)
    except ValidationError as error:
        wanting += [
            keys_of(model, details["loc"])
            for details in error.errors(include_url=False)
            if details["type"] in _WANTS_TEXT and not isinstance(details["input"], (str, dict, list))
        ]
    if not wanting:
        return values
    written, replaced = texts(), copy.deepcopy(values)
    for keys in wanting:
        text, holder = _at(written, keys), _at(replaced, keys[:-1])
        if isinstance(text, str) and isinstance(holder, list):
            holder[int(keys[-1])] = text
        elif isinstance(text, str) and isinstance(holder, dict):
            holder[keys[-1]] = text
    return replaced


def _has_null_domain(values: Mapping[str, Any]) -> bool:
    """Whether ``protocol.held_out`` is written down without a value that YAML knows: a domain may be called null. To
    leave it unset is no mistake of type, so that validation does not find it."""
    protocol = values.get("protocol")
    return isinstance(protocol, dict) and protocol.get("kind") != "all" and protocol.get("held_out", "") is None


def _at(values: Any, keys: Sequence[str]) -> Any:
    """What stands at these keys; None where nothing does."""
    for key in keys:
        if isinstance(values, Mapping):
            values = values.get(key)
        elif isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
    return values
