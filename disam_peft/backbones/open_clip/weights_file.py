"""What a bare weights file cannot say: the activation of its model, and how its images were made.

Taken from the recipe, else from what all pretrained tags of the model's name share. Where tags differ, or open_clip
knows none, the defaults of open_clip are assumed with a warning, unless no tag agrees with them: that is an error.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from disam_peft.config.backbone import BackboneConfig, FilePreprocessing
from disam_peft.errors import Notice, UserError

Settings = dict[str, Any]
"""``activation``, ``mean``, ``std``, ``interpolation`` and ``resize``."""

_DEFAULTS: Settings = {
    "mean": tuple(OPENAI_DATASET_MEAN),
    "std": tuple(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize": "shortest",
}


@dataclass(frozen=True)
class _Known:
    """The settings of one pretrained tag."""

    tag: str
    settings: Settings


def file_settings(name: str, config: BackboneConfig, model_config: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The preprocessing of a weights file, as open_clip's ``PreprocessCfg`` names it, and the model's config with the
    activation that its weights were trained with.

    Raises:
        UserError: the known weights of the model differ, and none of them is as open_clip assumes.
    """
    assumed = {"activation": _activation(model_config), **_DEFAULTS}
    given = _given(config)
    known = [_Known(tag, _of_tag(name, tag, model_config)) for tag in open_clip.list_pretrained_tags_by_model(name)]
    open_ = [key for key in assumed if key not in given]
    shared = {key: known[0].settings[key] for key in open_ if len({one.settings[key] for one in known}) == 1}
    unsure = [key for key in open_ if key not in shared]
    chosen = {**assumed, **shared, **given}
    if unsure:
        _say_unsure(name, chosen, unsure, known)
    elif any(chosen[key] != assumed[key] for key in shared):
        warnings.warn(
            f"the file for '{name}' is taken to be as all its known weights are: {_listed(chosen, shared)}; otherwise "
            f"set {_how(open_)}",
            Notice,
            stacklevel=2,
        )
    preprocess = {key: value for key, value in chosen.items() if key not in ("activation", "resize")}
    return {**preprocess, "resize_mode": chosen["resize"]}, {
        **model_config,
        "quick_gelu": chosen["activation"] != "gelu",
    }


def _say_unsure(name: str, chosen: Settings, unsure: list[str], known: list[_Known]) -> None:
    if not known:
        warnings.warn(
            f"a weights file says nothing of its preprocessing and activation, and open_clip knows no weights of "
            f"'{name}': {_listed(chosen, unsure)} are assumed; set {_how(unsure)}",
            stacklevel=3,
        )
        return
    agreeing = [one.tag for one in known if all(one.settings[key] == chosen[key] for key in unsure)]
    others = [one for one in known if one.tag not in agreeing]
    examples = "; ".join(f"{one.tag}: {_listed(one.settings, unsure)}" for one in others[:3])
    text = (
        f"a weights file says nothing of its preprocessing and activation, and the known weights of '{name}' differ "
        f"in them ({examples})"
    )
    if not agreeing:
        raise UserError(f"{text}; set {_how(unsure)} to what the file was trained with")
    warnings.warn(
        f"{text}; {_listed(chosen, unsure)} is assumed, as {agreeing[0]} has it; set {_how(unsure)}", stacklevel=3
    )


def _given(config: BackboneConfig) -> Settings:
    preprocessing = config.preprocessing or FilePreprocessing()
    values = {"activation": config.activation, **preprocessing.model_dump()}
    return {key: value for key, value in values.items() if value is not None}


def _of_tag(name: str, tag: str, model_config: dict[str, Any]) -> Settings:
    found = open_clip.get_pretrained_cfg(name, tag)
    return {
        "activation": "quick_gelu" if found.get("quick_gelu") else _activation(model_config),
        "mean": tuple(found.get("mean") or _DEFAULTS["mean"]),
        "std": tuple(found.get("std") or _DEFAULTS["std"]),
        "interpolation": found.get("interpolation") or _DEFAULTS["interpolation"],
        "resize": found.get("resize_mode") or _DEFAULTS["resize"],
    }


def _activation(model_config: dict[str, Any]) -> str:
    return "quick_gelu" if model_config.get("quick_gelu") else "gelu"


def _listed(settings: Settings, keys: Any) -> str:
    return ", ".join(f"{key} {_plain(settings[key])}" for key in keys)


def _how(keys: list[str]) -> str:
    return ", ".join(f"backbone.{'' if key == 'activation' else 'preprocessing.'}{key}" for key in keys)


def _plain(value: Any) -> str:
    return f"[{', '.join(f'{one:g}' for one in value)}]" if isinstance(value, tuple) else str(value)
