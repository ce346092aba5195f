"""The gradient of one step: from a batch to ``p.grad``, in micro-batches where the batch would not fit into memory.

Shapes in this file: B samples of this process's part of a batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier, ForwardPass
from disam_peft.common.device import to_device
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.disam.disam import DISAM
from disam_peft.disam.domain_objective import Forward
from disam_peft.disam.passes import MAX_STORED_GRADIENT_BYTES
from disam_peft.disam.step_report import StepReport
from disam_peft.errors import UserError
from disam_peft.objectives.base import Reference
from disam_peft.objectives.objective import Objective

Indices = slice | Tensor
"""Which samples of a batch belong to a micro-batch."""


@dataclass(frozen=True)
class MicroBatches:
    """How each process divides its part of a batch into micro-batches.

    Attributes:
        count: number of micro-batches of a part.
        size: images in the largest micro-batch.
        mode: how pass 1 goes over the micro-batches, see ``DISAM.backward_accumulated``. In the mode ``per_domain``
            every micro-batch holds one domain, and there may be more than ``count``. ``whole`` means that the trained
            part of the model takes all images at once; only the frozen part runs in micro-batches.
    """

    count: int
    size: int
    mode: Literal["whole", "mean", "two_phase", "per_domain"]

    def indices(self, domains_B: Tensor) -> list[Indices]:
        """The samples of each micro-batch, as indices into the part; every sample is in exactly one micro-batch."""
        if self.mode == "per_domain":
            of_each_domain = [(domains_B == domain).nonzero()[:, 0] for domain in domains_B.unique()]
            return [chunk for rows in of_each_domain for chunk in rows.tensor_split(math.ceil(len(rows) / self.size))]
        bounds = [len(domains_B) * k // self.count for k in range(self.count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    @property
    def memory_remedy(self) -> str:
        """A change of the recipe that needs less memory."""
        if self.size == 1:
            return "Lower train.batch_size."
        more = min(2 * self.count, self.count * self.size)
        return f"Set train.gradient_accumulation_steps={more}, with the same result, or lower train.batch_size."


def choose_micro_batches(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    config: TrainConfig,
    method: MethodConfig,
    num_processes: int,
    objective: Objective | None = None,
) -> MicroBatches:
    """The micro-batches of a run. They follow from the recipe alone and are the same on every process, in every step.

    Where the image tower is frozen (CoOp, a linear probe), the memory of the trained part does not grow with the number
    of images, and each micro-batch would repeat the text side. Only the frozen part runs in micro-batches then. (Not
    where each image has class prompts of its own, as in CoCoOp.)

    The mode ``per_domain`` saves the forward passes of ``two_phase``'s first phase (N - 1 of N micro-batches). It keeps
    one gradient for each domain, and it needs more micro-batches where the images of a domain do not fill them. The
    cost of small micro-batches grows with their number, so the mode is chosen where M of them cost no more. A backward
    pass counts as two forward passes: P passes cost 3 P M against 3 P N + W (N - 1), where W of the passes have weights
    that depend on all losses. (DISAM: 6 M <= 7 N - 1.)

    Raises:
        UserError: there are more micro-batches than a process has images.
    """
    count = config.gradient_accumulation_steps
    smallest, largest = config.batch_size // num_processes, math.ceil(config.batch_size / num_processes)
    if count > max(1, smallest):
        raise UserError(
            f"train.gradient_accumulation_steps={count} divides the images that each process has of a step into "
            f"{count} micro-batches, but there are {smallest} (train.batch_size={config.batch_size} over "
            f"{num_processes} process{'es' if num_processes > 1 else ''}); use at most {max(1, smallest)}, or a larger "
            "batch_size"
        )
    size = math.ceil(largest / count)
    assert classifier.adapter is not None  # fit checked
    repeats_text = classifier.adapter.image_split is None and not classifier.adapter.has_class_features_of_images()
    if count == 1 or repeats_text:
        return MicroBatches(count, size, "whole")
    objective = Objective() if objective is None else objective
    climbs = method.effective_rho > 0
    passes, waiting = 1 + climbs, int(objective.has_penalty(in_ascent=False))
    if climbs:
        waiting += method.effective_variance_weight > 0 or objective.has_penalty(in_ascent=True)
    if waiting == 0:
        return MicroBatches(count, size, "mean")
    by_domain = sum(math.ceil(images / size) for images in _images_per_domain(dataset, config, num_processes))
    stored_bytes = len(dataset.domains) * sum(p.numel() * p.element_size() for p in classifier.trainable().values())
    pays = 3 * passes * by_domain <= 3 * passes * count + waiting * (count - 1)
    possible = not objective.has_statistics and stored_bytes <= MAX_STORED_GRADIENT_BYTES
    return MicroBatches(count, size, "per_domain" if pays and possible else "two_phase")


def _images_per_domain(dataset: DomainDataset, config: TrainConfig, num_processes: int) -> list[int]:
    """Images of each source domain in a process's part; their expected number where sampling is proportional."""
    domains, of_sample_N = np.unique(dataset.domain_ids, return_inverse=True)
    _, class_N, images_C = np.unique(dataset.labels, return_inverse=True, return_counts=True)
    weight_N = np.ones(len(of_sample_N)) if config.class_sampling == "natural" else 1 / images_C[class_N]
    share_of = np.bincount(of_sample_N, weight_N) / weight_N.sum()
    if config.sampling == "balanced":
        share_of = np.full(len(domains), 1 / len(domains))
    return [math.ceil(config.batch_size * float(share) / num_processes) for share in share_of]


class StepGradient:
    """Leaves the gradient of one batch after another in ``p.grad``, over all processes and micro-batches.

    The frozen part of the model runs once for each micro-batch, without a graph and outside of the passes. Its outputs
    are kept for the whole step: they are one activation per image, while a trained block keeps dozens for backward.

    Args:
        accelerator: gives device and precision. Its own gradient accumulation must be off, since it divides every loss.
        objective: what is descended; unset: the mean of the cross entropy.
        batch_size: samples of a whole batch, over all processes; unset: every process has as many as this one.

    Raises:
        UserError: the accelerator's gradient accumulation is on.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        disam: DISAM,
        micro_batches: MicroBatches,
        accelerator: Accelerator,
        objective: Objective | None = None,
        batch_size: int | None = None,
    ) -> None:
        if accelerator.gradient_accumulation_steps != 1:
            raise UserError(
                f"the accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps} and would "
                "divide every loss by it; leave it at 1 there and set train.gradient_accumulation_steps"
            )
        self._classifier, self._disam, self._accelerator = classifier, disam, accelerator
        self._micro_batches = micro_batches
        self._objective = Objective() if objective is None else objective
        self._batch_size = batch_size
        if self._objective.needs_zero_shot:
            classifier.zero_shot_class_features()  # before any step, so not by compiled blocks
        if self._objective.needs_captions:
            with torch.no_grad():
                classifier.text_features()
        self._dtype = next(classifier.model.parameters()).dtype

    def __call__(self, batch: dict[str, Tensor]) -> StepReport:
        """The gradient of ``batch``, which is this process's part of a batch as a loader gives it."""
        micro_batches = self._micro_batches_of_this_step
        mode = micro_batches.mode
        # domains stay on the host: otherwise the step would ask the device which micro-batches hold a single domain
        domains_B, targets = batch["domains"], self._targets(batch)
        if self._objective.needs_captions:
            self._objective.begin_batch(
                targets.labels_B,
                num_classes=len(self._classifier.class_names),
                templates=self._classifier.templates,
                place_B=targets.place_B,
                num_places=targets.num_places,
            )
        if mode == "whole":
            frozen = self._encoded(batch, slice(None)) if "frozen" in batch else self._encoded_in_micro_batches(batch)
            outputs = self._classifier.cached_outputs(frozen, captions=self._objective.needs_captions)
            forward = self._forward(outputs, targets, self._reference(frozen))
            return self._disam.backward(forward, domains_B, objective=self._objective)
        indices = micro_batches.indices(domains_B)
        # Micro-batches are there to save memory: only the output of the frozen part is kept between the passes.
        frozen_of = [self._encoded(batch, rows) for rows in indices]
        compute: Callable[..., ForwardPass] = self._classifier.outputs
        if self._objective.needs_captions:
            compute = partial(compute, captions=True)
        forwards = [
            self._forward(partial(compute, frozen), targets.of(rows), self._reference(frozen))
            for frozen, rows in zip(frozen_of, indices, strict=True)
        ]
        # "auto" is one pass here; of the others it would ask the device, every step, which one is possible
        return self._disam.backward_accumulated(
            forwards,
            [domains_B[rows] for rows in indices],
            mode="auto" if mode == "mean" else mode,
            objective=self._objective,
        )

    @property
    def _micro_batches_of_this_step(self) -> MicroBatches:
        """A step that perturbs nothing descends a mean, whose weights need no losses: one pass over its micro-batches
        is enough then."""
        chosen = self._micro_batches
        needs_losses = self._disam.rho > 0 or self._objective.has_penalty(in_ascent=False)
        return chosen if needs_losses or chosen.mode == "whole" else replace(chosen, mode="mean")

    def _encoded_in_micro_batches(self, batch: dict[str, Tensor]) -> Tensor:
        outputs = [self._encoded(batch, rows) for rows in self._micro_batches.indices(batch["domains"])]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _encoded(self, batch: dict[str, Tensor], rows: Indices) -> Tensor:
        """The output of the frozen part for these samples."""
        device = self._accelerator.device
        if "frozen" in batch:
            return to_device(_rows(batch["frozen"], rows), device)
        with self._accelerator.autocast():
            pixels_BCHW = to_device(_rows(batch["pixels"], rows), device).to(self._dtype)
            return self._classifier.encode_frozen(pixels_BCHW)

    def _targets(self, batch: dict[str, Tensor]) -> _Targets:
        """Process r of W has the places r, r + W, ... of a batch, see ``DomainBatches``."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        size, device = len(batch["labels"]), self._accelerator.device
        return _Targets(
            labels_B=to_device(batch["labels"], device),
            place_B=torch.arange(rank, rank + size * processes, processes, device=device),
            num_places=size * processes if self._batch_size is None else self._batch_size,
            other_labels_B=to_device(batch["other_labels"], device) if "other_labels" in batch else None,
            share_B=to_device(batch["shares"], device) if "shares" in batch else None,
        )

    def _reference(self, frozen: Tensor) -> Reference | None:
        """What zero-shot classification makes of these images, once for all passes of a step."""
        if not self._objective.needs_zero_shot:
            return None
        with self._accelerator.autocast():
            found = self._classifier.zero_shot_outputs(frozen)
        return Reference(found.logits_BC, _normalised(found.features_BE), found.class_features_CE)

    def _forward(
        self, outputs: Callable[[], ForwardPass], targets: _Targets, reference: Reference | None
    ) -> Callable[[], Forward]:
        def forward() -> Forward:
            with self._accelerator.autocast():  # per pass: its cache of casts must not outlive the weights
                found = outputs()
            normalised_BE = _normalised(found.features_BE) if self._objective.needs_features else None
            return self._objective.forward(
                found.logits_BC,
                targets.labels_B,
                normalised_BE,
                class_features_CE=found.class_features_CE,
                scale=found.scale,
                bias=found.bias,
                head_bias_C=found.head_bias_C,
                place_B=targets.place_B,
                num_places=targets.num_places,
                other_labels_B=targets.other_labels_B,
                share_B=targets.share_B,
                reference=reference,
                caption_features_NE=found.caption_features_NE,
            )

        return forward


@dataclass(frozen=True)
class _Targets:
    """What the objective is told of each sample beside the model's outputs, see ``objectives.base.Outputs``."""

    labels_B: Tensor
    place_B: Tensor
    num_places: int
    other_labels_B: Tensor | None
    share_B: Tensor | None

    def of(self, rows: Indices) -> _Targets:
        other_B = None if self.other_labels_B is None else _rows(self.other_labels_B, rows)
        share_B = None if self.share_B is None else _rows(self.share_B, rows)
        return _Targets(_rows(self.labels_B, rows), _rows(self.place_B, rows), self.num_places, other_B, share_B)


def _normalised(features_BE: Tensor) -> Tensor:
    wide = torch.promote_types(features_BE.dtype, torch.float32)
    return torch.nn.functional.normalize(features_BE.to(wide), dim=-1)


def _rows(tensor: Tensor, rows: Indices) -> Tensor:
    """``tensor[rows]``; where one is on the device and the other is not, torch would wait for it."""
    return tensor[rows if isinstance(rows, slice) else to_device(rows, tensor.device)]
