"""The default of a setting never changes: recipes and run folders that leave it out would mean something else."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from disam_peft.config.recipe import Recipe
from disam_peft.config.study import Study
from tests.helpers.paths import ROOT


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default, of all settings that have one; ``adapter.lora.rank`` for the kinds of a union. Of a group
    of settings that has kinds, the kind: ``train.tracker`` was a word before it became such a group."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                kind = f"{inner.model_fields['kind'].default}." if field.discriminator == "kind" else ""
                found |= defaults(inner, f"{prefix}{name}.{kind}")
        if isinstance(field.default, BaseModel):
            found |= {prefix + name: field.default.kind} if hasattr(field.default, "kind") else {}
        elif not field.is_required():
            found[prefix + name] = to_jsonable_python(field.default)
    return found


def test_defaults_are_those_of_0_1() -> None:
    was = json.loads((ROOT / "tests/reference/defaults_of_0.1.json").read_text(encoding="utf-8"))
    for name, model in (("recipe", Recipe), ("study", Study)):
        now = defaults(model)
        assert {key: now.get(key, "gone") for key in was[name]} == was[name]
    assert len(was["recipe"]) > 90
    assert was["recipe"]["adapter.coop.class_specific"] is False
