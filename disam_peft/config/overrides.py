"""Overrides such as ``train.steps=200``, applied to the plain values of a recipe."""

from __future__ import annotations

from typing import Any

from disam_peft.config.yaml import parse_yaml
from disam_peft.errors import UserError


def apply_override(values: dict[str, Any], override: str, mistakes: list[str]) -> None:
    """Apply the override ``a.b=c``, where c is YAML. What is wrong with it is appended to ``mistakes``."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        mistakes.append(f"override {override!r} must look like train.steps=200")
        return
    if key == "name" and "{" in text:  # a name with fields, which YAML would take for a mapping
        values[key] = text
        return
    try:
        value = parse_yaml(text, f"override {override!r}: the value")
    except UserError as error:
        mistakes.append(str(error).splitlines()[0])
        return
    set_key(values, key, value, mistakes)


def set_key(values: dict[str, Any], key: str, value: Any, mistakes: list[str]) -> None:
    """Set the dotted ``key`` in ``values``. A part of the key that holds a value in place of further keys is a mistake,
    which is appended to ``mistakes``."""
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            mistakes.append(f"override '{key}={value}': {parent} holds the value {inner!r}, not further keys")
            return
        place = inner
    place[last] = value
