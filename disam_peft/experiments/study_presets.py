"""The arms of a study that need no overrides: each method by its name, and ERM at the compute of two passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.study import Overrides
from disam_peft.config.training import TrainConfig


def preset(name: str, values: Mapping[str, Any]) -> Overrides:
    """The overrides of an arm that needs none. ``erm_2x`` stretches the whole schedule, that of penalties included, and
    validates as often. An ``alpha`` of GSAM is none of SAGM: such arms have the published one."""
    if name != "erm_2x":
        given = values.get("method")
        own = str(given.get("name")) if isinstance(given, Mapping) else ""
        is_of_another = any(of in name and other in own for of, other in (("gsam", "sagm"), ("sagm", "gsam")))
        return {"method.name": name, "method.alpha": None} if is_of_another else {"method.name": name}
    train = values.get("train") or {}
    stretched: Overrides = {"method.name": "erm"}
    for key in ("steps", "warmup_steps", "validate_every"):
        value = train.get(key, TrainConfig.model_fields[key].default)
        if isinstance(value, int):
            stretched[f"train.{key}"] = 2 * value
    penalties = _stretched_penalties(values.get("objective"))
    if penalties:
        stretched["objective.penalties"] = penalties
    return stretched


def _stretched_penalties(objective: Any) -> list[dict[str, Any]]:
    """The penalties with twice the steps of ``anneal``; none where there are none, or where they are mistaken, which is
    told when the recipe of a cell is checked."""
    try:
        penalties = ObjectiveConfig.model_validate(objective or {}).penalties
    except ValidationError:
        return []
    values = [penalty.model_dump(mode="json") for penalty in penalties]
    return [{**value, "anneal": 2 * value["anneal"]} if "anneal" in value else value for value in values]
