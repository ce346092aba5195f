"""The configs of adapters that work on the features of frozen towers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from disam_peft.config.adapter_parts import LARGEST_OPTION, CosineConfig, Seed
from disam_peft.config.base import Config

Weight = Annotated[float, Field(ge=0, le=LARGEST_OPTION)]


class TaskResConfig(CosineConfig):
    """A trained residual on the class features, ``t + alpha x`` (Yu et al. 2023, arXiv 2211.10277)."""

    other_names: ClassVar[Mapping[str, str]] = {"taskres": "kind: task_res"}
    of_each_class: ClassVar[bool] = True
    """It has weights for every class that it was trained on."""

    kind: Literal["task_res"] = "task_res"
    alpha: float = Field(default=0.5, gt=0, le=LARGEST_OPTION)
    """Factor of the residual, which starts at 0. The class features t that it is added to have length 1."""


class TipAdapterConfig(Config):
    """A cache of the features of training images, whose labels are added to the zero-shot logits of similar images
    (Zhang et al. 2022, arXiv 2207.09519): Tip-Adapter, and with ``trained: keys`` Tip-Adapter-F."""

    has_own_head: ClassVar[bool] = True
    """The cache has a part in the logits, and no class features."""
    other_names: ClassVar[Mapping[str, str]] = {
        "tip-adapter": "kind: tip_adapter",
        "tip": "kind: tip_adapter",
        **dict.fromkeys(("tip_adapter_f", "tip-adapter-f", "tip_f"), "kind: tip_adapter, trained: keys"),
    }

    kind: Literal["tip_adapter"] = "tip_adapter"
    trained: Literal["nothing", "keys"] = "nothing"
    """``nothing``: the cache and its two factors are fitted, and no step is taken. ``keys``: the steps train the keys
    of the cache, which start as the features (Tip-Adapter-F)."""
    shots: Annotated[int, Field(ge=1)] | Literal["all"] = 16
    """How many training images of each class and domain are in the cache, at most. ``all``: every one."""
    seed: Seed = 0
    """Draws them."""
    alpha: Weight | None = None
    """Factor of what the cache adds to the logits. Unset: the one that does best on source validation."""
    beta: Weight | None = None
    """How fast the weight of an image in the cache falls with its distance. Unset: as ``alpha``."""
    search_scale: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(default=[7.0, 3.0], min_length=2, max_length=2)
    """Where the search for beta and for alpha ends, as in the authors' code; it begins at 0.1."""
    search_step: list[Annotated[int, Field(ge=1, le=10_000)]] = Field(default=[200, 20], min_length=2, max_length=2)
    """How many values of beta and of alpha are tried."""


class ClosedFormProbeConfig(Config):
    """A linear layer on normalised image features that is fitted in closed form: ridge regression on the classes, or
    linear discriminant analysis (Wang et al. 2024, arXiv 2402.04087, use it on CLIP's features)."""

    has_own_head: ClassVar[bool] = True
    other_names: ClassVar[Mapping[str, str]] = {
        name: f"kind: closed_form_probe, solver: {solver}"
        for solver, names in {"ridge": ("ridge", "ridge_probe"), "lda": ("lda", "gda", "lda_probe")}.items()
        for name in names
    }

    kind: Literal["closed_form_probe"] = "closed_form_probe"
    solver: Literal["ridge", "lda"] = "ridge"
    trained: Literal["nothing", "head"] = "nothing"
    """``nothing``: the head is fitted, and no step is taken. ``head``: the steps train it from there."""
    regularisation: Annotated[float, Field(gt=0, le=LARGEST_OPTION)] | None = None
    """For ridge the factor of ``|W|^2`` beside the mean squared error; for lda how far the covariance is shrunk to a
    multiple of the identity, at most 1. Unset: the value that does best on source validation."""
    scale: Annotated[float, Field(gt=0, le=LARGEST_OPTION)] | None = None
    """Factor of all logits, which decides how certain they are. Unset: that with the lowest NLL on source validation,
    from 0.01 to 100."""

    @model_validator(mode="after")
    def _shrinks_at_most_to_the_identity(self) -> ClosedFormProbeConfig:
        if self.solver == "lda" and self.regularisation is not None and self.regularisation > 1:
            raise ValueError(
                f"regularisation={self.regularisation:g}: that of lda is a share of the covariance, and at most 1"
            )
        return self


class LpPlusPlusConfig(Config):
    """A linear probe beside the zero-shot logits, which each class weighs by a trained factor: the classifier of LP++
    (Huang et al. 2024, arXiv 2404.02285). It starts as zero-shot CLIP, and is trained by the run's optimizer."""

    has_own_head: ClassVar[bool] = True
    other_names: ClassVar[Mapping[str, str]] = dict.fromkeys(("lp++", "lpplusplus"), "kind: lp_plus_plus")

    kind: Literal["lp_plus_plus"] = "lp_plus_plus"


class ClapConfig(CosineConfig):
    """A weight for each class, which starts at its zero-shot features and is pulled back to them the harder, the better
    zero-shot CLIP knows the class (CLAP, Silva-Rodriguez et al. 2024, arXiv 2312.12730)."""

    of_each_class: ClassVar[bool] = True

    kind: Literal["clap"] = "clap"
    penalty: Weight = 1.0
    """Factor of ``mean_c lambda_c |w_c - t_c|^2`` in the objective. lambda_c, the mean zero-shot probability of class c
    on its own training images, is computed before the first step and stays. 1: as in the paper."""
    in_ascent: bool = True
    """Whether the perturbation of sam and disam climbs that term too. It is always part of what is descended."""


class LinearProbeConfig(Config):
    """A linear layer on normalised image features."""

    other_names: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cross_modal", "cross-modal", "cross_modal_probe"), "kind: linear_probe, text_weight: 1"
    )
    has_own_head: ClassVar[bool] = True
    """Its logits come from weights of its own, not from class features."""

    kind: Literal["linear_probe"] = "linear_probe"
    init: Literal["zero_shot", "random"] = "zero_shot"
    """zero_shot: logit scale times the class features, which gives the zero-shot logits; random: N(0, 0.01^2)."""
    bias: bool = True
    text_weight: float = Field(default=0.0, ge=0, le=LARGEST_OPTION)
    """The prompts are training samples too (cross-modal adaptation, Lin et al. 2023, arXiv 2301.06267): this times the
    mean cross entropy of the head on their normalised text features, each with its class, is added to the objective. 1:
    images and texts count alike, as in the paper. 0: no texts."""
    seed: Seed | None = None
    """Seeds the random weights; unset: torch's global generator, which the run seeds."""


class ClipAdapterConfig(CosineConfig):
    """A bottleneck behind the image tower, blended with the frozen features (Gao et al. 2021, arXiv 2110.04544)."""

    kind: Literal["clip_adapter"] = "clip_adapter"
    reduction: int = Field(default=4, ge=1)
    """How many times narrower the hidden layer is than the features."""
    ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of the adapted feature in the blend; 1 - ratio is the share of the frozen one."""
    seed: Seed | None = None
    """Seeds the initial weights; unset: torch's global generator, which the run seeds."""


def takes_no_steps(adapter: Config) -> bool:
    """Whether an adapter is fitted to the training features as a whole, so that nothing is left to descend."""
    return getattr(adapter, "trained", "") == "nothing"


def steps_conflict(adapter: Config, averages: Sequence[Config], *, sharpness: Config | None = None) -> str | None:
    """Why a run of this adapter cannot keep these averages of the weights, or measure sharpness, in a sentence. None:
    it can."""
    if not takes_no_steps(adapter) or not (averages or sharpness):
        return None
    kind = getattr(adapter, "kind", "")
    if averages:
        what, how = f"average={getattr(averages[0], 'kind', '')} is over steps", "the average"
    else:
        what, how = "evaluation.sharpness is around weights that steps have found", "sharpness"
    return (
        f"{what}, and adapter.kind={kind} takes none: it is fitted to the training features as a whole; leave {how} "
        "out, or set adapter.trained"
    )
