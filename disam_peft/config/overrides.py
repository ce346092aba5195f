"""Overrides such as ``train.steps=200``, applied to the plain values of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from disam_peft.config.data import SOURCE_SETTINGS
from disam_peft.config.yaml import parse_yaml
from disam_peft.errors import UserError

SHORT_FOR_KINDS = ("average", "protocol", "tracker")
"""Sections of which a word is short for ``{kind: word}``, so that an override may set another key beside it."""


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], mistakes: list[str], *, as_text: bool = False
) -> None:
    """Apply overrides ``a.b=c`` in their order, where c is YAML. What is wrong with one is appended to ``mistakes``.

    A source of data that is named here replaces the one of the recipe, with the settings that say how that one is read
    and have no meaning for the new one: ``data.table=t.csv`` is enough where the recipe has ``data.root``.

    Args:
        as_text: values are texts, see ``parse_yaml``.
    """
    named = [source for override in overrides if (source := _source(override.partition("=")[0])) is not None]
    if named:
        _drop_other_sources(values, named)
    for override in overrides:
        _apply(values, override, mistakes, as_text)


def _apply(values: dict[str, Any], override: str, mistakes: list[str], as_text: bool) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        mistakes.append(f"override {override!r} must look like train.steps=200")
        return
    if key == "name" and "{" in text:  # a name with fields, which YAML would take for a mapping
        values[key] = text
        return
    try:
        value = parse_yaml(text, f"override {override!r}: the value", as_text=as_text)
    except UserError as error:
        mistakes.append(str(error).splitlines()[0])
        return
    set_key(values, key, value, mistakes)


def set_key(values: dict[str, Any], key: str, value: Any, mistakes: list[str]) -> None:
    """Set the dotted ``key`` in ``values``. A part of the key that holds a value in place of further keys is a mistake,
    which is appended to ``mistakes``. An entry of a list has its number as its key, from 0."""
    *parents, last = key.split(".")
    place: Any = values
    for depth, (parent, below) in enumerate(pairwise([*parents, last])):
        inner = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        if isinstance(inner, str) and parent in SHORT_FOR_KINDS:
            inner = place[parent] = {"kind": inner}
        where = f"override '{key}={value}': {parent} holds"
        if isinstance(inner, list) and inner:
            if not (below.isdecimal() and int(below) < len(inner)):
                path = ".".join(parents[: depth + 1])
                mistakes.append(f"{where} a list; its entries are {path}.0 to {path}.{len(inner) - 1}")
                return
        elif not isinstance(inner, dict):
            mistakes.append(f"{where} the value {inner!r}, not further keys")
            return
        place = inner
    place[int(last) if isinstance(place, list) else last] = value


def override(key: str, value: str) -> str:
    """``key=value`` for a command line, which is read back as this very text, also where the name looks like a number,
    a list or something else that YAML knows. A shell still needs its quotes."""
    try:
        is_plain = parse_yaml(value, "a value", as_text=True) == value
    except UserError:
        is_plain = False
    return f"{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}"


def _source(key: str) -> str | None:
    """The source of data that a dotted key names; ``data.shapes.seed`` names DomainShapes."""
    parts = key.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "data" and parts[1] in SOURCE_SETTINGS else None


def _drop_other_sources(values: dict[str, Any], named: Sequence[str]) -> None:
    data = values.get("data")
    if not isinstance(data, Mapping):
        return
    old = [source for source in SOURCE_SETTINGS if data.get(source) is not None and source not in named]
    if not old:
        return
    theirs = set().union(*(SOURCE_SETTINGS[source] for source in old))
    kept = set().union(*(SOURCE_SETTINGS[source] for source in named))
    values["data"] = {key: value for key, value in data.items() if key not in old and key not in theirs - kept}
