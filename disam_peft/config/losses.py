"""The loss of one sample, and how much the samples of each class count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from disam_peft.config.base import Config

Weight = Annotated[float, Field(ge=0, le=1e6)]


class BaseLossConfig(Config):
    """What every loss has."""

    without: ClassVar[Mapping[str, str]] = {}
    """Settings of other losses that this one cannot have -> why; without a reason: they have no effect."""

    needs_cosines: ClassVar[bool] = False
    """Whether it compares image features with class features, so that an adapter with a head of its own is no use."""

    @model_validator(mode="before")
    @classmethod
    def _says_why_not(cls, values: Any) -> Any:
        """A setting of another loss is told with its reason, and may stand there while it is off."""
        if not isinstance(values, Mapping):
            return values
        for key, reason in cls.without.items():
            if reason and values.get(key) not in (None, False, 0, "none", {}):
                raise ValueError(f"{key}={values[key]!r} has no meaning with kind: {values.get('kind')} ({reason})")
        return {key: value for key, value in values.items() if key not in cls.without}


class WeighedLossConfig(BaseLossConfig):
    """A loss whose samples may count by their class."""

    class_weights: Literal["none", "balanced", "effective_number"] | dict[str, Weight] = "none"
    """The factor of each sample's loss, by its class. ``balanced``: 1/n for a class of n training samples.
    ``effective_number``: ``(1 - beta) / (1 - beta^n)`` (Cui et al. 2019, arXiv 1901.05555). Or ``{class: weight}``;
    classes that are not named have 1. All are normalised to the mean 1 over the training samples, so that the size of
    the loss stays. Numbers of samples stay what they are: only losses are weighed."""
    class_weights_beta: float = Field(default=0.999, ge=0, lt=1)
    """beta of ``effective_number``: 0 weighs no class, towards 1 it becomes ``balanced``. Its paper tries 0.9, 0.99,
    0.999 and 0.9999; the more samples a class has, the larger."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _none_is_a_word(cls, weights: Any) -> Any:
        return "none" if weights is None or weights is False else weights

    @field_validator("class_weights")
    @classmethod
    def _not_all_zero(cls, weights: Any) -> Any:
        if isinstance(weights, Mapping) and not weights:
            raise ValueError("no class is named; write {class: weight, ...}, balanced, effective_number or none")
        return weights


class CrossEntropyConfig(WeighedLossConfig):
    """Cross entropy of the logits."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The share of each label that is spread evenly over all classes."""


class FocalConfig(WeighedLossConfig):
    """Focal loss, which counts a sample the less the surer it is of its class (Lin et al. 2017, arXiv 1708.02002).

    ``(1 - p_y)^gamma (-log p_y)``. The paper's alpha is ``class_weights``.
    """

    kind: Literal["focal"] = "focal"
    gamma: float = Field(default=2.0, ge=0, le=100)
    """0 is the cross entropy. The paper's best is 2."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """As for ``cross_entropy``; every class then adds its share times ``(1 - p_j)^gamma (-log p_j)``."""


class MarginSoftmaxConfig(WeighedLossConfig):
    """Margin metric softmax of CLIPood (Shu et al. 2023, arXiv 2302.00864): cross entropy with margins from the text.

    A class that means something else than the true one must stay further away from the image:
    ``scale (u . t_j - margin (t_y . t_j))`` stands in the place of the logits. Evaluation has no margin.
    """

    needs_cosines: ClassVar[bool] = True

    kind: Literal["margin_softmax"] = "margin_softmax"
    margin: float = Field(default=0.3, ge=0, le=100)
    """lambda of the paper; its code has 0.3, and 0.1 for classes that training has not seen ("in the wild")."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """As for ``cross_entropy``, of the logits with their margins."""


class SigmoidConfig(WeighedLossConfig):
    """SigLIP's loss: each pair of an image and a class is a yes or a no (Zhai et al. 2023, arXiv 2303.15343).

    ``-sum_j log sigmoid(z_j (logit_j + bias))``, z is 1 for the true class and -1 for the others; summed over classes.
    """

    without: ClassVar[Mapping[str, str]] = {
        "label_smoothing": "each class is a yes or a no of its own; take kind: cross_entropy, focal or margin_softmax"
    }

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float | None = Field(default=None, ge=-1000, le=1000)
    """Added to the cosines times the scale, in the place of the model's own bias. Unset: the model's (SigLIP). A model
    without one was trained with a softmax, which does not see what all logits of an image have in common (about 25 in
    CLIP), while a sigmoid would take that for certainty. Its logits are therefore counted from their mean over the
    classes, plus ``-log(C - 1)``: without a preference an image says yes to one of C classes."""


class ContrastiveConfig(BaseLossConfig):
    """CLIP's own loss between the images and captions of the whole batch: finetune like you pretrain (FLYP, Goyal et
    al. 2022, arXiv 2212.00638).

    The caption of an image is its class name in one of ``prompts.templates``, drawn anew in every step. The batch is
    that of all processes and micro-batches. Records and evaluation show the ordinary classification.
    """

    needs_cosines: ClassVar[bool] = True
    without: ClassVar[Mapping[str, str]] = {
        "label_smoothing": "its targets are pairs of images and captions; take kind: cross_entropy",
        "class_weights": "half of it compares the images of a caption; draw class-balanced batches instead",
        "class_weights_beta": "",
    }

    kind: Literal["contrastive"] = "contrastive"


LossConfig = Annotated[
    CrossEntropyConfig | FocalConfig | MarginSoftmaxConfig | SigmoidConfig | ContrastiveConfig,
    Field(discriminator="kind"),
]
"""All losses."""


def with_kind_of_loss(loss: Any) -> Any:
    """Settings without a kind are those of the cross entropy, and a word is a kind."""
    if isinstance(loss, str):
        return {"kind": loss}
    return {"kind": "cross_entropy", **loss} if isinstance(loss, dict) else loss


def head_conflict(loss: BaseLossConfig, adapter: Config | None) -> str | None:
    """Why this loss cannot train this adapter, in a sentence; None: it can."""
    own_ways = (getattr(adapter, name, False) for name in ("has_own_head", "class_features_of_images"))
    if not loss.needs_cosines or not any(own_ways):
        return None
    kind, of_adapter = getattr(loss, "kind", ""), getattr(adapter, "kind", "")
    if not getattr(adapter, "has_own_head", False):
        return (
            f"objective.loss.kind={kind} compares images with class features that are the same for all of them, but "
            f"adapter.kind={of_adapter} makes class features for each image; take cross_entropy, focal or sigmoid, or "
            "another adapter (coop)"
        )
    return (
        f"objective.loss.kind={kind} compares image features with class features, but adapter.kind={of_adapter} has a "
        "head of its own, which they would not train; take cross_entropy, focal or sigmoid, or another adapter"
    )
