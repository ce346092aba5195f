"""Names of classes as they stand in a prompt: ``Alarm_Clock`` on disk reads ``alarm clock``."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disam_peft.common.strict_json import parse_json
from disam_peft.config.yaml import parse_yaml
from disam_peft.errors import UserError, did_you_mean

# A number in front is a numbering if a dot follows it, or if it is padded with zeros or has three digits: `001.ak47`,
# `02_dog`, `257-cat`. The 18 of `18_wheeler` belongs to the name. A letter must follow.
_NUMBERING = re.compile(r"^(?:\d+\.|0\d+[_\- ]|\d{3,}[_\- ])[_\-. ]*(?=.*[^\W\d_])")
_SEPARATORS = re.compile(r"[_\-]+|(?<!\d)\.|\.(?!\d)")
_NO_WORD = re.compile(r"[+-]?[\d.,_]*\d|n\d{8}|(?:class|label|category)?[ _\-.]?\d+", re.IGNORECASE)
# Two small letters before the capital, so that iPod and McDonald stay whole.
_CAMEL = re.compile(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def clean_class_name(name: str) -> str:
    """A folder name or label as words for a prompt.

    Unicode is brought to NFC; numbering in front goes (``001.ak47``); underscores, hyphens, dots and CamelCase
    become spaces. Where every word is capitalised (``Alarm_Clock``) the capitals are style and go, except in
    acronyms (``TV``, ``GIRAFFE``); where only some are (``the_Eiffel_Tower``, ``African elephant``) they are meant and
    stay. Braces, emoji and right-to-left text pass unchanged.

    Raises:
        UserError: nothing is left.
    """
    text = unicodedata.normalize("NFC", name).strip()
    text = _SEPARATORS.sub(" ", _NUMBERING.sub("", text))
    words = [word for part in text.split() for word in _CAMEL.sub(" ", part).split()]
    if not words:
        raise UserError(f"class name {name!r} is empty once cleaned; rename the class or give data.class_names")
    cased = [word for word in words if word.lower() != word.upper()]
    if all(word[0].isupper() for word in cased):
        words = [word.lower() if word[1:].islower() or len(word) == 1 else word for word in words]
    return " ".join(words)


def says_nothing(name: str) -> bool:
    """Whether a class is a number or a code, which no language model knows as a word: ``7``, ``0.0``, ``n01440764``."""
    return _NO_WORD.fullmatch(name.strip()) is not None


def read_overrides(path: Path) -> dict[str, str]:
    """The YAML or JSON file of ``data.class_names``: one mapping, class as on disk -> name in a prompt.

    Raises:
        UserError: no such file, not a mapping, or a key or value that is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_names: cannot read {path} ({error}); give a YAML or JSON file") from error
    content = _parse(path, text)
    if not isinstance(content, dict):
        raise UserError(
            f"data.class_names: {path} holds a {type(content).__name__}; write one 'folder name: name' per line"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(
                f"data.class_names: {key!r}: {value!r} in {path} is not text on both sides; put it in quotes"
            )
    return {unicodedata.normalize("NFC", key): value for key, value in content.items()}


def _parse(path: Path, text: str) -> Any:
    where = f"data.class_names: {path}"
    if path.suffix != ".json":
        return parse_yaml(text, where, as_text="keys")  # 0, no and 2009 are names of classes as others are
    try:
        return parse_json(text.encode())
    except ValueError as error:
        raise UserError(f"data.class_names: {path} cannot be parsed: {error}") from error


def prompt_names(classes: Sequence[str], overrides: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """One prompt name per class: the override where there is one, else the cleaned name.

    Raises:
        UserError: an override for a class that is not there; an empty override; two classes with one name.
    """
    overrides = overrides or {}
    for key in overrides:
        if key not in classes:
            raise UserError(
                f"data.class_names: no class {key!r}{did_you_mean(key, classes)} (classes: {', '.join(classes)})"
            )
    names = tuple(_given(name, overrides[name]) if name in overrides else clean_class_name(name) for name in classes)
    owners: dict[str, list[str]] = defaultdict(list)
    for raw, name in zip(classes, names, strict=True):
        owners[name].append(raw)
    for name, raws in owners.items():
        if len(raws) > 1:
            raise UserError(
                f"classes {', '.join(map(repr, raws))} all read {name!r} in a prompt and could not be told apart; "
                "give them different names in data.class_names"
            )
    return names


def _given(raw: str, name: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", name).split())
    if not text:
        raise UserError(f"data.class_names: the name of class {raw!r} is empty; write the words for a prompt")
    return text
