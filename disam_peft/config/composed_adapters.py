"""The configs of adapters that are made of others: a head on a tower, and several at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import (
    ClipAdapterConfig,
    LinearProbeConfig,
    TaskResConfig,
)
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig, VisualPromptsConfig


class ProbeStartConfig(Config):
    """The linear probe that LP-FT begins with: multinomial logistic regression on the normalised features of the
    training images, as they are in evaluation. It minimises the mean cross entropy plus ``weight_decay / 2`` times the
    squared distance of the weights from where they start, with L-BFGS on all images at once; it has no learning rate.
    """

    init: Literal["zero_shot", "zeros"] = "zero_shot"
    """zero_shot: it starts from, and ``weight_decay`` pulls it to, the zero-shot head; zeros: to nothing, as usual."""
    bias: bool = True
    weight_decay: float = Field(default=1e-3, ge=0)
    """0: no penalty. Classes that the features tell apart then have no minimum, and ``steps`` decides."""
    steps: int = Field(default=200, ge=1)
    """At most so many; it ends when it has come to the minimum."""


def _below_a_head(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if kind in ("coop", "cocoop", "ivlp", "maple"):
        raise ValueError(f"{kind} trains prompts, and with a head of its own the text has no part in the logits")
    if kind in ("task_res", "clap"):
        raise ValueError(f"{kind} trains class features, which have no part in the logits of a head of its own")
    if kind in ("linear_probe", "lp_ft", "tip_adapter", "closed_form_probe", "lp_plus_plus"):
        raise ValueError(
            f"{kind} has a head of its own, and lp_ft has one already; choose lora, peft, full or clip_adapter"
        )
    return value


class LpFtConfig(Config):
    """LP-FT: a linear probe first, then an adapter of the image tower from it, head and adapter together (Kumar et al.
    2022, arXiv 2202.10054)."""

    has_own_head: ClassVar[bool] = True
    other_names: ClassVar[Mapping[str, str]] = {"lp-ft": "kind: lp_ft", "lpft": "kind: lp_ft"}

    kind: Literal["lp_ft"] = "lp_ft"
    probe: ProbeStartConfig = ProbeStartConfig()
    """The first stage, before the first step."""
    adapter: Annotated[
        Annotated[LoraAdapterConfig | PeftAdapterConfig | FullConfig | ClipAdapterConfig, Field(discriminator="kind")],
        BeforeValidator(_below_a_head),
    ] = LoraAdapterConfig()
    """What the steps train together with the head: ``lora``, ``peft``, ``full`` or ``clip_adapter``."""

    @model_validator(mode="after")
    def _of_the_image_side(self) -> LpFtConfig:
        if "text" in getattr(self.adapter, "towers", []):
            raise ValueError(
                "adapter.towers has text, but with a head of its own the text has no part in the logits; use "
                "towers: [image]"
            )
        if self.adapter.logit_scale == "trained":
            raise ValueError("adapter.logit_scale is trained, but the head has no logit scale; leave it out")
        return self


_HOW_TO_COMBINE = (
    "choose at most one of lora, peft, full and visual_prompts, clip_adapter, and one of coop, task_res, linear_probe"
)


_ALONE = (
    *("lp_ft", "tip_adapter", "closed_form_probe", "lp_plus_plus", "clap"),
    *("cocoop", "ivlp", "maple", "combined"),
)


def _that_combines(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if kind in _ALONE:
        raise ValueError(f"{kind} stands alone, and cannot be a part of a combination; {_HOW_TO_COMBINE}")
    return value


class CombinedConfig(Config):
    """Several adapters at once, each at a place of its own: in the towers, behind the image tower, and on the side of
    the classes. A list is short for it: ``adapter: [{kind: lora}, {kind: coop}]``."""

    places: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("lora", "peft", "full", "visual_prompts"), "the towers"),
        "clip_adapter": "the features behind the image tower",
        **dict.fromkeys(("coop", "task_res", "linear_probe"), "the classes"),
    }
    """Kind of a part -> what it changes."""

    kind: Literal["combined"] = "combined"
    parts: Annotated[
        list[
            Annotated[
                Annotated[
                    LoraAdapterConfig
                    | PeftAdapterConfig
                    | FullConfig
                    | VisualPromptsConfig
                    | ClipAdapterConfig
                    | CoOpConfig
                    | TaskResConfig
                    | LinearProbeConfig,
                    Field(discriminator="kind"),
                ],
                BeforeValidator(_that_combines),
            ]
        ],
        Field(min_length=2),
    ]
    """They are trained together, from the first step on, in one forward pass."""

    @property
    def has_own_head(self) -> bool:
        return any(isinstance(part, LinearProbeConfig) for part in self.parts)

    @model_validator(mode="after")
    def _fit_together(self) -> CombinedConfig:
        taken: dict[str, str] = {}
        for part in self.parts:
            place = self.places[part.kind]
            if place in taken:
                raise ValueError(f"{taken[place]} and {part.kind} both change {place}; {_HOW_TO_COMBINE}")
            taken[place] = part.kind
            if getattr(part, "logit_scale", "frozen") == "trained":
                raise ValueError(
                    f"{part.kind} has logit_scale: trained, which a combination cannot train; leave it out"
                )
        if any("text" in getattr(part, "towers", []) for part in self.parts):
            self._require_text_to_matter()
        return self

    def _require_text_to_matter(self) -> None:
        for part in self.parts:
            if isinstance(part, LinearProbeConfig):
                raise ValueError(
                    "towers has text, but with a linear_probe the text has no part in the logits; use towers: [image]"
                )
            if isinstance(part, TaskResConfig):
                raise ValueError(
                    "towers has text, but task_res adds to the class features of a frozen text tower; use "
                    "towers: [image]"
                )
            if isinstance(part, CoOpConfig) and part.memory_budget_gb is not None:
                raise ValueError(
                    "memory_budget_gb of coop counts what a frozen text tower keeps, and towers has text; leave it out"
                )
