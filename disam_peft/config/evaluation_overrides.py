"""Which settings of a finished run may be given anew where its adapter is evaluated again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.errors import UserError

EVALUATION_SETTINGS = (
    "backbone.precision",
    "data",
    "evaluation",
    "features.store",
    "features.folder",
    "train.mixed_precision",
    "train.timeout_minutes",
)
"""A setting, or the group that it stands in. Everything else made the adapter, or says which data it was trained on."""


def recipe_for_evaluation(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run recorded, with what is to be different in an evaluation of its adapter.

    Raises:
        UserError: an override of what made the adapter (all of them at once, with the settings that may be changed);
            whatever ``load_recipe`` refuses.
    """
    keys = [override.partition("=")[0] for override in overrides]
    refused = [key for key in dict.fromkeys(keys) if not _may_change(key)]
    if refused:
        allowed = ", ".join(f"{name}.*" if name in Recipe.model_fields else name for name in EVALUATION_SETTINGS)
        raise UserError(
            f"{', '.join(refused)}: not for evaluate, which judges the adapter as it was trained. What may be given "
            f"here is {allowed}; for another adapter, split or backbone train another run"
        )
    return load_recipe(path, overrides)


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:count]) in EVALUATION_SETTINGS for count in range(1, len(parts) + 1))
