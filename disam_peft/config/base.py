"""The base of every config: immutable, and strict about keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen record of settings in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    other_names: ClassVar[Mapping[str, str]] = {}
    """Kinds that people write for this one -> the settings that do what they mean; for the message about them."""


def with_kind(value: Any) -> Any:
    """``word`` is short for ``{kind: word}``. YAML turns ``no`` into False and nothing into None: both are ``none``."""
    if value is None or value is False:
        return {"kind": "none"}
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and "kind" in value and (value["kind"] is None or value["kind"] is False):
        return {**value, "kind": "none"}
    return value
