"""What training descends: the loss, how its mean is taken, and penalties that compare the domains."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from disam_peft.config.anchors import AnchorConfig
from disam_peft.config.base import Config
from disam_peft.config.losses import CrossEntropyConfig, LossConfig, head_conflict, with_kind_of_loss
from disam_peft.config.penalties import PenaltyConfig
from disam_peft.config.penalties import VRexConfig as VRexConfig


def adapter_conflict(objective: ObjectiveConfig, adapter: Config | None) -> str | None:
    """Why this objective cannot train this adapter, in a sentence; None: it can."""
    if conflict := head_conflict(objective.loss, adapter):
        return conflict
    kinds = [anchor.kind for anchor in objective.anchors]
    if "class_features" not in kinds or not getattr(adapter, "class_features_of_images", False):
        return None
    return (
        "objective.anchors has class_features, which is about the classes alone, but "
        f"adapter.kind={getattr(adapter, 'kind', '')} makes class features for each image; take the anchor logits, or "
        "another adapter (coop)"
    )


class ObjectiveConfig(Config):
    """The function that training descends: mean loss + sum of weight * penalty + sum of weight * anchor. The defaults
    are the plain mean."""

    loss: LossConfig = CrossEntropyConfig()
    """``cross_entropy`` unless it says its kind: ``focal``, ``margin_softmax``, ``sigmoid`` or ``contrastive``."""
    mean_over: Literal["samples", "domains"] | None = None
    """``samples``: the mean of all losses of a batch. ``domains``: the mean over the domains of their mean losses. Both
    are the same where a batch holds as many samples of every domain. Unset: ``domains`` with a penalty that was
    published so (coral, irm, mmd, vrex), ``samples`` otherwise."""
    penalties: list[PenaltyConfig] = Field(default=[])
    """Functions of the whole batch that are added to the mean loss; at most one of a kind. ``coral`` is short for
    ``[{kind: coral}]``, also in a list; a single one needs no list."""
    anchors: list[AnchorConfig] = Field(default=[])
    """Distances that hold the model near zero-shot CLIP, or near where it started; at most one of a kind. They
    have the short forms of ``penalties``."""

    @field_validator("loss", mode="before")
    @classmethod
    def _cross_entropy_where_left_out(cls, loss: Any) -> Any:
        return with_kind_of_loss(loss)

    @field_validator("penalties", "anchors", mode="before")
    @classmethod
    def _short_forms(cls, terms: Any) -> Any:
        listed = [terms] if isinstance(terms, str | dict) else terms
        return (
            [{"kind": term} if isinstance(term, str) else term for term in listed]
            if isinstance(listed, list)
            else listed
        )

    @field_validator("penalties", "anchors")
    @classmethod
    def _one_of_a_kind(cls, terms: list[Any], field: ValidationInfo) -> list[Any]:
        kinds = [term.kind for term in terms]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            what = {"penalties": "penalty", "anchors": "anchor"}[str(field.field_name)]
            raise ValueError(f"the {what} {twice[0]!r} stands {kinds.count(twice[0])} times; keep one of them")
        return terms

    @property
    def effective_mean_over(self) -> Literal["samples", "domains"]:
        if self.mean_over is not None:
            return self.mean_over
        return "domains" if any(penalty.averages_domains for penalty in self.penalties) else "samples"

    @property
    def climbs_mean_over_samples(self) -> bool:
        """Whether all samples count alike in what the perturbation climbs, apart from the variance term."""
        return self.effective_mean_over == "samples" and not any(penalty.in_ascent for penalty in self.penalties)

    @property
    def is_plain_mean(self) -> bool:
        """Whether it is the mean over samples of the plain cross entropy."""
        one_term = not self.penalties and not self.anchors
        return self.loss == CrossEntropyConfig() and self.effective_mean_over == "samples" and one_term
