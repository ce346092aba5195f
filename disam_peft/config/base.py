"""The base of every config: immutable, and strict about keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

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
