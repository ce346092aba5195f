"""The contracts of a loss and of a penalty.

Shapes in this file: B samples of a micro-batch, C classes, E embedding width, D domains.

How to add a penalty
--------------------
A penalty is one file, one config class, one line in a table, and its test.

1. *The config class*, in ``config/penalties.py``: a ``BasePenaltyConfig`` with ``kind: Literal["name"] = "name"`` and
   the settings. Add it to ``PenaltyConfig``, the union of all penalties. Set ``averages_domains`` if the penalty was
   published beside a mean over domains.
2. *The file*, ``objectives/name.py``: a ``Penalty`` of this config. Write it as a function of *sums over the samples of
   each domain*, of the losses (``sums.sum_D``) and of whatever ``statistics`` sums up. Nothing else is needed for the
   gradient to be exact over micro-batches and processes: the step adds up the sums over all of them first, and asks for
   ``value`` only then. A mean feature of each domain, for example, is

   .. code-block:: python

        class MeanFeature(Penalty):
            num_statistics = 1

            def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
                return (domains.sums(outputs.features),)

            def value(self, sums: DomainSums) -> Tensor:
                (sum_DE,) = sums.statistics
                mean_DE = sums.mean_of(sum_DE)
                return sums.over_domains(mean_DE.square().sum(dim=1))

   Use ``domains.outer_sums`` for second moments. Never build one tensor for each sample out of the features' square.
   What compares single samples, or depends on their order, collects them with ``domains.in_places``; see ``mmd.py``.
   Absent domains must not bring in a NaN: ``sums.mean_of``, ``sums.over_domains`` and ``sums.present_D`` see to it.
3. *The line*, in ``PENALTIES`` of ``objectives/objective.py``: ``NameConfig: Name``.
4. *The test*, ``tests/unit/objectives/test_name.py``: values and gradients against published code.
   ``tests/unit/objectives/test_contract.py`` drives every member of the table, as its defaults make it, with every
   method and over unequal micro-batches. An entry of ``OBJECTIVES`` in ``tests/helpers/objectives.py``, its formula
   in ``definition`` there, adds masks, missing domains, ranks and saved state.
   ``tests/matrix/test_terms.py`` trains it without a line of yours, in every variant that a setting names: processes,
   micro-batches, stores, resume, autocast, loss scaling and compiled blocks.

A penalty with state (an average over steps, weights of groups) moves it in ``begin_step`` and gives it to
``state_dict``. It is then saved, resumed and equal on all processes like the rest. A ``DomainState`` holds a value for
each domain, also for those that a batch lacks; see ``group_dro.py``.

A loss is added in the same way: a config class in ``LossConfig`` (``config/losses.py``), a ``Loss`` in its own file, a
line in ``LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums


@dataclass(frozen=True)
class Reference:
    """What zero-shot classification makes of the same images, without a graph.

    Attributes:
        logits_BC: its logits.
        features_BE: normalised image features of the plain image tower.
        class_features_CE: normalised class features of the plain text tower.
    """

    logits_BC: Tensor
    features_BE: Tensor
    class_features_CE: Tensor


@dataclass(frozen=True)
class Outputs:
    """The results of a forward pass of a micro-batch, with their graph.

    In a run of training all of them are there (the features where ``Objective.needs_features``). A loop of one's own
    may leave out all but the first two. A penalty that cannot do without one reads ``features``, ``class_features``,
    ``logit_scale`` or ``places``, which raise an error that says what to hand over.

    Attributes:
        logits_BC: of float32 or a wider type.
        labels_B: the true classes.
        features_BE: normalised image features, after the adapter's ``image_features``, as they meet the class features.
        class_features_CE: normalised class features. (A linear probe has a head of its own beside them.) Where each
            image has its own, (B, C, E), terms that need those of all images refuse them.
        scale, bias: the factor of the cosines in CLIP's logits, and what is added to them (None: nothing), shape ().
        place_B: place of each sample in the whole batch, over all micro-batches and processes: int64 below
            ``num_places``, and no two samples have the same. The batch is the same for any number of processes, and so
            are the places; but a process may have fewer samples than another.
        num_places: how many places there are.
        head_bias_C: (C,), the trained bias of an adapter's own head (a linear probe); None: there is none.
        caption_features_NE: normalised features of every prompt, the templates of a class side by side, with their
            graph: N = C * T captions (``Objective.needs_captions``). The class features are their ensemble.
        other_labels_B, share_B: of mixed samples, the class of the other image, and the share in [0, 1] that the image
            of ``labels_B`` has in the mixture. None: nothing is mixed. A loss need not read them: the objective calls
            it once for each class and adds up both by their shares. Penalties that read labels take ``targets_BC``.
        reference: of zero-shot classification; in a run where ``Objective.needs_zero_shot``.
    """

    logits_BC: Tensor
    labels_B: Tensor
    features_BE: Tensor | None = None
    class_features_CE: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    place_B: Tensor | None = None
    num_places: int | None = None
    caption_features_NE: Tensor | None = None
    other_labels_B: Tensor | None = None
    share_B: Tensor | None = None
    reference: Reference | None = None
    head_bias_C: Tensor | None = None

    @property
    def targets_BC(self) -> Tensor:
        """The true class of each sample as a row of zeros and a one; of a mixed sample, the share of each class."""
        target_BC = torch.zeros_like(self.logits_BC).scatter(1, self.labels_B[:, None], 1.0)
        if self.other_labels_B is None or self.share_B is None:
            return target_BC
        share_B1 = self.share_B.to(target_BC.dtype)[:, None]
        other_BC = torch.zeros_like(target_BC).scatter(1, self.other_labels_B[:, None], 1.0)
        return share_B1 * target_BC + (1 - share_B1) * other_BC

    @property
    def features(self) -> Tensor:
        """``features_BE``, for a penalty that cannot do without.

        Raises:
            ValueError: the caller gave none.
        """
        if self.features_BE is None:
            raise ValueError(
                "this penalty needs the image features, but there are none; hand them over as the third argument of "
                "Objective.forward(logits, labels, features), normalised and with their graph"
            )
        return self.features_BE

    @property
    def class_features(self) -> Tensor:
        """``class_features_CE``, or a ValueError."""
        how = "class_features_CE=..., (C, E), normalised, with their graph"
        return _given(self.class_features_CE, "the class features of all images", how, dimensions=2)

    @property
    def caption_features(self) -> Tensor:
        """``caption_features_NE``, or a ValueError."""
        how = "caption_features_NE=..., normalised, with their graph, the templates of a class side by side"
        return _given(self.caption_features_NE, "the features of every prompt", how)

    @property
    def logit_scale(self) -> Tensor:
        """``scale``, or a ValueError."""
        return _given(self.scale, "the factor of the cosines in the logits (100 in CLIP)", "scale=...")

    @property
    def places(self) -> tuple[Tensor, int]:
        """``place_B`` and ``num_places``, or a ValueError."""
        how = "place_B=..., num_places=..., counted over all micro-batches and processes"
        place_B = _given(self.place_B, "the place of each sample in the whole batch", how)
        return place_B, _given(self.num_places, "the number of places in the whole batch", how)

    @property
    def zero_shot(self) -> Reference:
        """``reference``, or a ValueError."""
        return _given(self.reference, "the outputs of zero-shot classification", "reference=Reference(...)")


T = TypeVar("T")


def _given(value: T | None, what: str, how: str, *, dimensions: int | None = None) -> T:
    if value is None or (dimensions is not None and getattr(value, "ndim", dimensions) != dimensions):
        raise ValueError(
            f"this objective needs {what}, but there is none; hand it over as Objective.forward(..., {how})"
        )
    return value


def mixed(loss: Callable[[Outputs], Tensor], outputs: Outputs) -> Tensor:
    """The losses (B,) of samples that may be mixtures: ``share * loss(labels) + (1 - share) * loss(other labels)``, as
    in mixup (Zhang et al. 2018, arXiv 1710.09412)."""
    loss_B = loss(outputs)
    if outputs.other_labels_B is None or outputs.share_B is None:
        return loss_B
    share_B = outputs.share_B.to(loss_B.dtype)
    other_B = loss(replace(outputs, labels_B=outputs.other_labels_B))
    return share_B * loss_B + (1 - share_B) * other_B


@dataclass(frozen=True)
class StepBatch:
    """What is known of a step's batch before anything is computed.

    Attributes:
        labels_B: the classes of the samples of this process, over all its micro-batches.
        place_B, num_places: as in ``Outputs``.
        num_classes, templates: C, and the captions of each class.
        step: counts from 0, and goes on where it was after a resume.
        seed: of the run.
        mask_B: False for samples that count nowhere; None: all count.
        process_group: the processes that share the batch; None: all.
    """

    labels_B: Tensor
    place_B: Tensor
    num_places: int
    num_classes: int
    templates: int
    step: int
    seed: int
    mask_B: Tensor | None = None
    process_group: dist.ProcessGroup | None = None


class Loss:
    """One loss for each sample; or one for each sample and a function of sums, which belongs to the whole batch.

    Most losses have ``__call__`` alone. One that compares samples with each other (``contrastive.py``) has
    ``statistics`` and ``value`` as a penalty has them, and may look at the whole batch before the passes.

    Args:
        config: its settings, of the class that stands beside it in ``LOSSES``.
    """

    is_cross_entropy: bool = False
    """Whether the losses are the plain cross entropy, which records show whatever is descended."""

    needs_features: bool = False
    """Whether it reads ``Outputs.features``. (A penalty that has statistics always finds them.)"""

    needs_captions: bool = False
    """Whether it reads ``Outputs.caption_features`` and is told of each batch by ``begin_batch``."""

    num_statistics: int = 0
    """How many tensors ``statistics`` gives; 0: the losses of samples are all of it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, outputs: Outputs) -> Tensor:
        """The losses (B,), in nats where that has a meaning, with a graph."""
        raise NotImplementedError(f"{type(self).__name__} must say what the losses are")

    def begin_batch(self, batch: StepBatch) -> None:
        """Called once in each step before its passes, on every process, where ``needs_captions``."""

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        """See ``Penalty.statistics``."""
        return ()

    def value(self, sums: DomainSums) -> Tensor:
        """What is added to the mean of the losses, shape (); see ``Penalty.value``. Only with statistics."""
        raise NotImplementedError(f"{type(self).__name__} has statistics, and must say what their value is")


class Penalty:
    """A function of sums over the samples of each domain, which is added to the mean loss.

    Args:
        config: its settings, of the class that stands beside it in ``PENALTIES``.
    """

    num_statistics: int = 0
    """How many tensors ``statistics`` gives."""
    replaces_mean: bool = False
    """Whether ``value`` stands in the place of the mean loss: then ``weight * (value - mean)`` is added."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        """Sums over the samples of each domain of one micro-batch, (D, ...) each, differentiable in the outputs.

        Whatever adds up over micro-batches is possible, such as the samples one by one, see ``domains.in_places``.
        """
        return ()

    def value(self, sums: DomainSums) -> Tensor:
        """The penalty, shape (), without its weight; differentiable in ``sums.sum_D`` and ``sums.statistics``.

        Args:
            sums: of the whole batch, over all micro-batches and processes, in float64 where there is one.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what the penalty is")

    def domain_values(self, sums: DomainSums) -> Mapping[str, Tensor]:
        """Numbers of each domain that records of steps show beside ``value``, (D,) each, by a name."""
        return {}

    def weight(self, step: int) -> float:
        """The factor of the penalty in the objective in step ``step``, which counts from 0.

        It changes after ``anneal`` steps. DomainBed throws away the state of Adam then, which is not done here.
        """
        return float(self.config.weight_before_anneal if step < self.config.anneal else self.config.weight)

    def prepare(self, train_count_A: Tensor) -> None:
        """Told once before training how many samples of the domains 0, 1, ... there are to train with; of float64."""

    def begin_step(self, sums: DomainSums) -> None:
        """State moves here: called once in a step, with the sums of pass 1, before ``value``.

        Both passes then see the same state. The sums are the same on every process. They may be infinite or NaN (such a
        step is skipped): state must not take that over, for example by ``torch.where(torch.isfinite(new), new, old)``,
        which does not wait for the device.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What ``begin_step`` has moved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""


def domain_mean_weights(count_D: Tensor) -> Tensor:
    """m_d of the mean over domains of their mean losses: ``1 / (K n_d)``, 0 for absent domains; (D,)."""
    present_D = count_D > 0
    weight_D = 1.0 / (present_D.sum().to(count_D.dtype) * count_D.clamp(min=1))
    return weight_D.where(present_D, torch.zeros_like(weight_D))
