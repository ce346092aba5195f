"""The gradient of a step, from a batch to ``p.grad``; piece by piece where all at once would not fit into memory.

Shapes in this file: B samples of this process's part of a batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.device import to_device
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.disam.disam import DISAM, StepReport
from disam_peft.disam.passes import MAX_STORED_GRADIENT_BYTES
from disam_peft.errors import UserError
from disam_peft.objectives.losses import cross_entropy

Place = slice | Tensor


@dataclass(frozen=True)
class Pieces:
    """How each process takes its part of a batch through the model.

    Attributes:
        count: pieces of a part.
        size: images in the largest piece.
        way: of pass 1 over the pieces, see ``DISAM.backward_accumulated``. ``per_domain``: each piece is of one domain,
            and there may be more than ``count``. ``whole``: the trained part takes all at once, at most the frozen
            part goes in pieces.
    """

    count: int
    size: int
    way: Literal["whole", "mean", "two_phase", "per_domain"]

    def cut(self, domains_B: Tensor) -> list[Place]:
        """Where the samples of each piece stand in the part; each sample is in one piece."""
        if self.way == "per_domain":
            groups = [(domains_B == domain).nonzero()[:, 0] for domain in domains_B.unique()]
            return [piece for of in groups for piece in of.tensor_split(math.ceil(len(of) / self.size))]
        bounds = [len(domains_B) * k // self.count for k in range(self.count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    @property
    def memory_remedy(self) -> str:
        """What needs less memory than these."""
        if self.size == 1:
            return "Lower train.batch_size."
        more = min(2 * self.count, self.count * self.size)
        return f"Set train.gradient_accumulation_steps={more}, with the same result, or lower train.batch_size."


def choose_pieces(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    config: TrainConfig,
    method: MethodConfig,
    num_processes: int,
) -> Pieces:
    """The pieces of a run, from the recipe's sizes alone: the same on every process, in every step.

    Where the image tower is frozen (CoOp, a linear probe), what the trained part keeps for backward does not grow with
    the images, and pieces would repeat its text side: only the frozen part goes in pieces then.

    ``per_domain`` saves the forward passes of ``two_phase``'s first phase (N - 1 of N pieces), keeps a gradient for
    each domain, and needs more pieces where domains do not fill them. Small pieces cost what their number is, so it is
    chosen where M of them cost no more: 6 M <= 7 N - 1 forwards, a backward being two.

    Raises:
        UserError: more pieces than a process has images.
    """
    count = config.gradient_accumulation_steps
    smallest, largest = config.batch_size // num_processes, math.ceil(config.batch_size / num_processes)
    if count > max(1, smallest):
        raise UserError(
            f"train.gradient_accumulation_steps={count} cuts the images that each process has of a step into {count} "
            f"pieces, but there are {smallest} (train.batch_size={config.batch_size} over {num_processes} "
            f"process{'es' if num_processes > 1 else ''}); use at most {max(1, smallest)}, or a larger batch_size"
        )
    size = math.ceil(largest / count)
    assert classifier.adapter is not None  # fit checked
    if count == 1 or classifier.adapter.image_split is None:
        return Pieces(count, size, "whole")
    if method.effective_variance_weight == 0 or method.effective_rho == 0:
        return Pieces(count, size, "mean")
    by_domain = sum(math.ceil(images / size) for images in _images_per_domain(dataset, config, num_processes))
    stored_bytes = len(dataset.domains) * sum(p.numel() * p.element_size() for p in classifier.trainable().values())
    pays = 6 * by_domain <= 7 * count - 1 and stored_bytes <= MAX_STORED_GRADIENT_BYTES
    return Pieces(count, size, "per_domain" if pays else "two_phase")


def _images_per_domain(dataset: DomainDataset, config: TrainConfig, num_processes: int) -> list[int]:
    """Images of each source domain in a process's part; expected ones where sampling is proportional."""
    _, counts = np.unique(dataset.domain_ids, return_counts=True)
    share_of = np.full(len(counts), 1 / len(counts)) if config.sampling == "balanced" else counts / counts.sum()
    return [math.ceil(config.batch_size * float(share) / num_processes) for share in share_of]


class StepGradient:
    """Leaves the gradient of one batch after another in ``p.grad``, over all processes and pieces.

    The frozen part runs once for each piece, without a graph and outside of the passes. Its outputs are kept for the
    step: they are one activation per image, of the dozens that a block keeps for backward.

    Args:
        accelerator: gives device and precision; its own accumulation must be off, since it divides every loss.

    Raises:
        UserError: it is on.
    """

    def __init__(self, classifier: ClipClassifier, disam: DISAM, pieces: Pieces, accelerator: Accelerator) -> None:
        if accelerator.gradient_accumulation_steps != 1:
            raise UserError(
                f"the accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps} and would "
                "divide every loss by it; leave it at 1 there and set train.gradient_accumulation_steps"
            )
        self._classifier, self._disam, self._pieces, self._accelerator = classifier, disam, pieces, accelerator
        self._dtype = next(classifier.model.parameters()).dtype

    def __call__(self, batch: dict[str, Tensor]) -> StepReport:
        """The batch, this process's part of it, as a loader gives it."""
        way = self._pieces.way
        # domains stay on the host: the step would have to ask the device which pieces hold one domain only
        labels_B, domains_B = to_device(batch["labels"], self._accelerator.device), batch["domains"]
        if way == "whole":
            frozen = self._encoded(batch, slice(None)) if "frozen" in batch else self._encoded_in_pieces(batch)
            logits = self._classifier.cached_logits(frozen)
            return self._disam.backward(self._per_sample_loss(logits, labels_B), domains_B)
        places = self._pieces.cut(domains_B)
        # Pieces are there to save memory: nothing is kept from pass to pass but the frozen part's output.
        heads = [partial(self._classifier.logits, self._encoded(batch, place)) for place in places]
        losses = [self._per_sample_loss(of, _part(labels_B, at)) for of, at in zip(heads, places, strict=True)]
        # "auto" is one pass here; of the others it would ask the device, every step, which one is possible
        return self._disam.backward_accumulated(
            losses, [domains_B[place] for place in places], way="auto" if way == "mean" else way
        )

    def _encoded_in_pieces(self, batch: dict[str, Tensor]) -> Tensor:
        pieces = [self._encoded(batch, place) for place in self._pieces.cut(batch["domains"])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _encoded(self, batch: dict[str, Tensor], place: Place) -> Tensor:
        """The frozen part's output for these samples."""
        device = self._accelerator.device
        if "frozen" in batch:
            return to_device(_part(batch["frozen"], place), device)
        with self._accelerator.autocast():
            pixels_BCHW = to_device(_part(batch["pixels"], place), device).to(self._dtype)
            return self._classifier.encode_frozen(pixels_BCHW)

    def _per_sample_loss(self, logits: Callable[[], Tensor], labels_B: Tensor) -> Callable[[], Tensor]:
        def per_sample_loss() -> Tensor:
            with self._accelerator.autocast():  # per pass: its cache of casts must not outlive the weights
                logits_BC = logits()
            return cross_entropy(logits_BC, labels_B)

        return per_sample_loss


def _part(tensor: Tensor, place: Place) -> Tensor:
    """``tensor[place]``; where one is on the device and the other is not, torch would wait for it."""
    return tensor[place if isinstance(place, slice) else to_device(place, tensor.device)]
