"""What settings are called in words, wherever they are shown: what a run says, the report, the list of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter

from disam_peft.config.anchors import AnchorConfig, BaseAnchorConfig
from disam_peft.config.average import Averages, kept_averages
from disam_peft.config.base import Config
from disam_peft.config.identity import effective, identifying_settings
from disam_peft.config.losses import LossConfig
from disam_peft.config.penalties import BasePenaltyConfig, PenaltyConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.unused import method_settings_without_effect

WHOLE = (
    "method.rho",
    "method.variance_weight",
    "method.rho_factors",
    "objective.loss",
    "objective.penalties",
    "objective.anchors",
    "average",
)
"""Settings that may be groups or lists, and are told as one value."""
SPEAKING = ("objective.loss", "objective.penalties", "objective.anchors", "average")
"""Those of them whose words need no name before them: ``coral``, ``swad``."""
UNSET = "-"
_WRITTEN_OUT = 4  # entries of a group that are told one by one


def objective_in_words(recipe: Recipe) -> str | None:
    """What a step descends, such as ``cross_entropy + fishr (weight 1000 from step 1,501 on)``; None where it is the
    plain cross entropy of images as they are."""
    objective, mixup = recipe.objective, recipe.augment.mixup
    if objective.is_plain_mean and mixup is None:
        return None
    terms = [with_settings(objective.loss)]
    terms += [term_in_words(term) for term in (*objective.penalties, *objective.anchors)]
    words = " + ".join(terms)
    if objective.effective_mean_over == "domains":
        words += ", averaged over domains"
    return words if mixup is None else f"{words}, of mixtures of two domains' {mixup.of} (mixup, alpha {mixup.alpha:g})"


def term_in_words(term: BasePenaltyConfig | BaseAnchorConfig) -> str:
    """``fishr (weight 1e6 from step 21 on)``, or ``logits anchor (weight 0.5)``."""
    weight = f"weight {number_text(term.weight)}"
    if isinstance(term, BasePenaltyConfig):
        begin = f" from step {term.anneal + 1:,} on" if term.anneal else ""
        return with_settings(term, f"{weight}{begin}", "weight", "anneal")
    kind, _, rest = with_settings(term, weight, "weight").partition(" ")
    return f"{kind} anchor {rest}"


def with_settings(config: Config, first: str | None = None, *told: str) -> str:
    """The kind, and the settings that a recipe gives it: ``margin_softmax (margin 0.3)``.

    Args:
        first: said before them.
        told: settings that it says already.
    """
    said = [] if first is None else [first]
    for name in type(config).model_fields:
        if name in config.model_fields_set and name not in ("kind", *told):
            value = getattr(config, name)
            group = f"{{{_group_text(value)}}}" if isinstance(value, Mapping) else None
            said.append(f"{name} {group or setting_in_words(name, value)}")
    kind = getattr(config, "kind", "")
    return f"{kind} ({', '.join(said)})" if said else kind


def settings_that_tell(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of what tells a run from others but for seed, data and held-out domain, with those in
    ``WHOLE`` as one value each. Settings that the method does not use are not there. Neither is how the run is
    evaluated: numbers depend on it by rounding alone."""
    flat, values = identifying_settings(recipe), effective(recipe)
    unused = method_settings_without_effect(recipe)
    found: dict[str, Any] = {}
    for key, value in flat.items():
        group = next((whole for whole in WHOLE if key == whole or key.startswith(f"{whole}.")), None)
        if (group or key) in unused or key.startswith("evaluation."):
            continue
        if group is None:
            found[key] = value
            continue
        found[group] = values
        for part in group.split("."):
            found[group] = found[group][part]
    return found


def setting_in_words(key: str, value: Any) -> str:
    """A value of a setting as it stands in a cell of a table; ``-`` where it is unset, or nothing: no penalty, no
    average.

    Args:
        key: dotted, of the setting; of those in ``SPEAKING`` the value is as ``settings_that_tell`` has it.
    """
    if key in SPEAKING and value is not None:
        return _speaking(key, value)
    if value is None:
        return UNSET
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return number_text(value)
    if isinstance(value, Mapping):
        return _group_text(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def number_text(value: float) -> str:
    """``0.05``, ``1e6``, ``1e-05``: whole numbers in full up to a million."""
    return str(value) if isinstance(value, int) else f"{value:g}".replace("e+0", "e").replace("e+", "e")


_LOSS: TypeAdapter[Any] = TypeAdapter(LossConfig)
_PENALTIES: TypeAdapter[list[Any]] = TypeAdapter(list[PenaltyConfig])
_ANCHORS: TypeAdapter[list[Any]] = TypeAdapter(list[AnchorConfig])
_AVERAGES: TypeAdapter[Any] = TypeAdapter(Averages)


def _speaking(key: str, value: Any) -> str:
    if key == "objective.loss":
        return with_settings(_beyond_defaults(_LOSS.validate_python(value)))
    if key == "average":
        return _joined(with_settings(_beyond_defaults(one)) for one in kept_averages(_AVERAGES.validate_python(value)))
    terms = (_PENALTIES if key == "objective.penalties" else _ANCHORS).validate_python(value)
    return _joined(_short_term(term) for term in terms)


def _short_term(term: Any) -> str:
    """The term with what differs from its defaults alone: ``coral``."""
    short = _beyond_defaults(term)
    if short.model_fields_set & {"weight", "anneal"}:
        return term_in_words(short)
    words = with_settings(short)
    if isinstance(term, BasePenaltyConfig):
        return words
    kind, _, rest = words.partition(" ")
    return f"{kind} anchor {rest}".rstrip()


def _joined(words: Iterable[str]) -> str:
    return " + ".join(words) or UNSET


def _beyond_defaults(config: Any) -> Any:
    """The same, in which nothing that is as by default counts as set."""
    values = {name: getattr(config, name) for name in config.model_dump(exclude_defaults=True) if name != "kind"}
    return type(config).model_validate({"kind": config.kind, **values})


def _group_text(group: Mapping[str, Any]) -> str:
    """``linear(from=0.1, to=0.02)``, or ``*lora_A*=0.5``; of many entries how many, and digits that tell them apart."""
    if len(group) > _WRITTEN_OUT + ("kind" in group):
        digest = hashlib.sha256(json.dumps(group, sort_keys=True, default=str).encode()).hexdigest()
        return f"{len(group)} values, {digest[:8]}"
    told = ", ".join(f"{key}={setting_in_words('', value)}" for key, value in group.items() if key != "kind")
    return f"{group['kind']}({told})" if "kind" in group else told or UNSET
