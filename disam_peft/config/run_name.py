"""The name of a run may be made of its settings: ``{adapter}-{method}-r{adapter.rank}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from disam_peft.config.identity import Settings, effective, settings_hash
from disam_peft.config.names import require_folder_name
from disam_peft.errors import did_you_mean

DEFAULT_NAME = "{adapter}-{method}-{hash}"
HASH = "hash"
NAME = r"^([\w.-]|\{[^{}]*\})+$"
_FIELD = re.compile(r"\{([^{}]*)\}")


def require_name(template: str) -> str:
    """``template`` itself, if it has fields or can be the name of a folder as it is.

    Raises:
        ValueError: neither.
    """
    return template if _FIELD.search(template) else require_folder_name(template, "name")


def run_name(template: str, recipe: Settings) -> str:
    """``template`` with every field replaced by what the recipe says.

    A field is a dotted key of the recipe, such as ``{train.learning_rate}``. A group stands for its kind or its name:
    ``{adapter}``, ``{method}``, ``{backbone}``. ``{hash}`` are the eight digits of ``settings_hash``.

    Raises:
        ValueError: a field that is no setting (names the near ones), or a name that cannot be that of a folder.
    """
    values: dict[str, Any] = {**effective(recipe), HASH: ""}

    def told(field: re.Match[str]) -> str:
        if field[1] == HASH:
            return settings_hash(recipe)
        value: Any = values
        for part in field[1].split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = [*_keys(values), HASH]
                raise ValueError(
                    f"name: the field {field[0]} of {template!r} is no setting of this recipe"
                    f"{did_you_mean(field[1], known)}; for example {DEFAULT_NAME} or {{train.learning_rate}}"
                )
            value = value[part]
        return _as_part_of_a_name(value)

    name = _FIELD.sub(told, template)
    try:
        return require_folder_name(name, "name")
    except ValueError as error:
        raise ValueError(f"name: {error}") from error


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if not isinstance(value, Mapping):
            found.append(f"{prefix}{key}")
        else:
            if "kind" in value or "name" in value:
                found.append(f"{prefix}{key}")
            found += _keys(value, f"{prefix}{key}.")
    return found


def _as_part_of_a_name(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("parts") or value.get("kind", value.get("name"))  # a combination is called by its parts
    if isinstance(value, list):
        return "+".join(map(_as_part_of_a_name, value)).replace("+", "-") or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "none"
