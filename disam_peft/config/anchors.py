"""Terms of the objective that hold a model near zero-shot CLIP, or near where it started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from disam_peft.config.base import Config


class BaseAnchorConfig(Config):
    """The settings that every anchor has."""

    weight: float = Field(default=1.0, ge=0)
    """The factor of the distance in the objective."""


class BaseModelAnchorConfig(BaseAnchorConfig):
    """An anchor that looks at the model alone, whatever the samples are: it counts once in a step."""

    in_ascent: bool = True
    """Whether the perturbation of sam and disam climbs the anchor too. It is always part of what is descended."""


class LogitsAnchorConfig(BaseAnchorConfig):
    """Distance of the logits of each sample to those of zero-shot classification of the same image.

    It is part of the loss of a sample, so the perturbation climbs it and DISAM's variance sees it.
    """

    kind: Literal["logits"] = "logits"
    weight: float = Field(default=1.0, ge=0)
    """As in the paper of PromptSRC (Khattak et al. 2023, arXiv 2307.06948), whose code divides by the number of classes
    besides."""
    distance: Literal["kl", "l1"] = "kl"
    """``kl``: the Kullback-Leibler divergence KL(p || q) in nats, of the adapted model's probabilities q from the
    zero-shot ones p. ``l1``: mean over the classes of the absolute differences of the logits."""


FeatureDistance = Literal["l1", "squared", "cosine"]
"""Between normalised vectors a and b. ``l1``: mean over the dimensions of |a - b|. ``squared``: ||a - b||^2, their sum.
``cosine``: 1 - <a, b>, half of ``squared``."""


class ImageFeaturesAnchorConfig(BaseAnchorConfig):
    """Distance of the normalised features of each image to those of the plain image tower on the same image.

    It is part of the loss of a sample, as ``logits``. Without effect where nothing that the image features depend on is
    trained (coop, linear_probe).
    """

    kind: Literal["image_features"] = "image_features"
    weight: float = Field(default=10.0, ge=0)
    """The published default of PromptSRC (arXiv 2307.06948), for its distance l1."""
    distance: FeatureDistance = "l1"
    """``l1``: mean over the dimensions, as in PromptSRC's code (its paper writes a sum). ``squared`` or ``cosine``."""


class ClassFeaturesAnchorConfig(BaseModelAnchorConfig):
    """Mean over the classes of the distance of their normalised features to those of the plain text tower for the
    prompts of ``prompts.templates``. Without effect where the text side is frozen.
    """

    kind: Literal["class_features"] = "class_features"
    weight: float = Field(default=8.0, ge=0)
    """The published default of KgCoOp (Yao et al. 2023, arXiv 2303.13283). PromptSRC has 25 with the distance l1."""
    distance: FeatureDistance = "squared"
    """``squared``: as in KgCoOp's paper. ``cosine``, half of it: as in its code. ``l1``: as in PromptSRC's code."""


class WeightsAnchorConfig(BaseModelAnchorConfig):
    """Half the squared distance of the trained tensors to where they started: L2-SP (Li et al. 2018, arXiv 1802.01483).

    Of LoRA these are the factors A and B, not their product, and B starts at 0. Of a prompt it is the context, of a
    probe the head.
    """

    kind: Literal["weights"] = "weights"
    weight: float = Field(default=0.1, ge=0)
    """alpha of L2-SP, in the authors' published command; they search it, and it is for whole networks."""


AnchorConfig = Annotated[
    LogitsAnchorConfig | ImageFeaturesAnchorConfig | ClassFeaturesAnchorConfig | WeightsAnchorConfig,
    Field(discriminator="kind"),
]
"""All anchors."""
