"""Penalties that compare the domains of a batch, and are added to the mean loss.

``weight`` and ``anneal`` default to the values that each was published with. They were found with whole ResNets and
their own features: on CLIP they are a start of a search.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from disam_peft.config.base import Config


class BasePenaltyConfig(Config):
    """The settings that every penalty has."""

    averages_domains: ClassVar[bool] = False
    """Whether the mean loss beside this penalty is one over domains, unless ``mean_over`` says otherwise."""
    weight_before_anneal: ClassVar[float] = 1.0
    """The weight during the first ``anneal`` steps."""
    is_zero_for_one_domain: ClassVar[bool] = True
    """Whether it does nothing where there is one source domain."""

    weight: float = Field(default=1.0, ge=0)
    """The factor of the penalty in the objective."""
    in_ascent: bool = True
    """Whether the perturbation of sam and disam climbs the penalty too. It is always part of what is descended."""
    anneal: int = Field(default=0, ge=0)
    """As in DomainBed the weight is 1 (of fishr: 0) during so many steps, and ``weight`` afterwards. 0: ``weight`` from
    the start."""


class CoralConfig(BasePenaltyConfig):
    """Distances between the means and the covariances of the domains' features (CORAL, Sun & Saenko 2016, arXiv
    1607.01719), with the constants of DomainBed.

    It has no effect on an adapter that leaves the image features as they are, such as CoOp or a linear probe.
    """

    averages_domains: ClassVar[bool] = True

    kind: Literal["coral"] = "coral"
    weight: float = Field(default=1.0, ge=0)
    """DomainBed's default of ``mmd_gamma``; it searches 0.1 to 10."""


class FishrConfig(BasePenaltyConfig):
    """Distance between the variances of the domains' gradients by the classifier's weights (Fishr, Rame et al. 2022,
    arXiv 2109.02934), as DomainBed has it: squared, averaged over the entries, with averages over the steps."""

    weight_before_anneal: ClassVar[float] = 0.0

    kind: Literal["fishr"] = "fishr"
    weight: float = Field(default=1000.0, ge=0)
    """DomainBed's default of ``lambda``; it searches 10 to 10000. With CLIP's features of length 1 the gradients are
    small, and so is the penalty: search upwards."""
    anneal: int = Field(default=1500, ge=0)
    """The weight is 0 during so many steps, while the averages are taken already; DomainBed's default."""
    ema: float = Field(default=0.95, ge=0, lt=1)
    """How much of the average over earlier steps is kept in a step; DomainBed's default. 0: the variances of each step
    alone. The penalty is that of ``average / (1 - ema)``, so it grows over the first steps."""


class GroupDROConfig(BasePenaltyConfig):
    """The domains' mean losses weighted by q, which grows where the loss is high (GroupDRO, Sagawa et al. 2020, arXiv
    1911.08731). It stands in the place of the mean loss: with ``weight`` w training descends
    ``(1 - w) * mean + w * sum_d q_d L_d``."""

    kind: Literal["groupdro"] = "groupdro"
    weight: float = Field(default=1.0, ge=0, le=1)
    """The share of the weighted losses. 1, as published: the mean loss has no part in it."""
    variant: Literal["domainbed", "sagawa"] = "domainbed"
    """``domainbed``: q moves and sums to one over the domains of the batch; others keep theirs. ``sagawa``: as in the
    code of its authors, domains that the batch lacks take part in the normalisation with a loss of 0."""
    eta: float = Field(default=0.01, ge=0)
    """The step size of q; 0.01 in DomainBed (which searches 0.001 to 0.1) and in the authors' code."""
    normalize_loss: bool = False
    """``sagawa`` alone: the losses that move q are divided by their sum."""
    adjustment: float = Field(default=0.0, ge=0)
    """``sagawa`` alone: C of the generalization adjustment, which adds ``C / sqrt(n_d)`` to the losses that move q. n_d
    is the number of training images of domain d. 0: none; the paper searches 0 to 5."""

    @model_validator(mode="after")
    def _of_the_variant(self) -> Self:
        if self.variant == "domainbed" and (self.normalize_loss or self.adjustment):
            raise ValueError(
                "normalize_loss and adjustment belong to the variant 'sagawa', and this is 'domainbed', which has "
                "neither; write variant: sagawa, or remove them"
            )
        return self


class IRMConfig(BasePenaltyConfig):
    """The squared gradient of each domain's loss by a factor of the logits (invariant risk minimization, IRM, Arjovsky
    et al. 2019, arXiv 1907.02893)."""

    averages_domains: ClassVar[bool] = True
    is_zero_for_one_domain: ClassVar[bool] = False

    kind: Literal["irm"] = "irm"
    variant: Literal["domainbed", "v1"] = "domainbed"
    """``domainbed``: the gradient over the even rows of a domain times that over the odd ones, in the order of the
    batch. ``v1``: the square of the gradient over the whole domain, as in the authors' code. The default is the one
    that ``weight`` and ``anneal`` were published for. It is also an unbiased estimate of the square, while that of
    ``v1`` is too large by the variance of the gradient over the number of images, which is small in a batch."""
    weight: float = Field(default=100.0, ge=0)
    """DomainBed's default of ``irm_lambda``; it searches 0.1 to 100000."""
    anneal: int = Field(default=500, ge=0)
    """As in DomainBed the weight is 1 during so many steps, and ``weight`` afterwards. 0: ``weight`` from the start."""


class MMDConfig(BasePenaltyConfig):
    """Maximum mean discrepancy (MMD) between the domains' features (Gretton et al. 2012; Li et al. 2018), with
    DomainBed's sum of seven Gaussian kernels.

    It compares each pair of images, so that its memory grows with the square of ``train.batch_size`` (about 0.1 MB for
    32 images and 25 MB for 512) on every process. It has no effect on an adapter that leaves the image features as they
    are, such as CoOp or a linear probe.
    """

    averages_domains: ClassVar[bool] = True

    kind: Literal["mmd"] = "mmd"
    weight: float = Field(default=1.0, ge=0)
    """DomainBed's default of ``mmd_gamma``; it searches 0.1 to 10."""


class VRexConfig(BasePenaltyConfig):
    """Variance of the mean losses of the domains (V-REx, Krueger et al. 2021, arXiv 2003.00688)."""

    averages_domains: ClassVar[bool] = True

    kind: Literal["vrex"] = "vrex"
    weight: float = Field(default=10.0, ge=0)
    """The published default of DomainBed; it searches 0.1 to 100000."""
    anneal: int = Field(default=500, ge=0)
    """As in DomainBed the weight is 1 during so many steps, and ``weight`` afterwards. 0: ``weight`` from the start."""


PenaltyConfig = Annotated[
    CoralConfig | FishrConfig | GroupDROConfig | IRMConfig | MMDConfig | VRexConfig, Field(discriminator="kind")
]
"""All penalties."""
