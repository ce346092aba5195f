"""One training step of every kind that is compared, ours and the peers'.

The learning rate is 0 everywhere: the same work, and every variant stays at the same weights, so that gradients can be
compared at any time. Shapes in this file: B samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from disam_peft import DISAM
from disam_peft.adapters.base import Autocast
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.device import prefetch_to_device
from disam_peft.objectives.cross_entropy import cross_entropy

RHO = 0.05
VARIANCE_WEIGHT = 0.1
DOMAINS = 3


@dataclass(frozen=True)
class Batch:
    """Random images; what they show changes no time."""

    pixels_BCHW: Tensor
    labels_B: Tensor
    domains_B: Tensor

    @classmethod
    def draw(cls, size: int, backbone: ClipBackbone, classes: int) -> Batch:
        generator = torch.Generator().manual_seed(0)
        pixels_BCHW = torch.randn(size, 3, *backbone.preprocessing.size, generator=generator)
        labels_B = torch.randint(classes, (size,), generator=generator)
        device = backbone.device
        return cls(
            pixels_BCHW.to(device, backbone.dtype), labels_B.to(device), (torch.arange(size) % DOMAINS).to(device)
        )


@dataclass(frozen=True)
class Step:
    """``run`` does everything from the batch to the optimizer's step and leaves the gradients in ``params``.

    Attributes:
        launched: the same with every kernel launched one by one, so that its operations can be counted; None where
            ``run`` does so.
    """

    run: Callable[[], object]
    params: Mapping[str, Tensor]
    launched: Callable[[], object] | None = None

    def gradients(self) -> dict[str, Tensor]:
        self.run()
        found = {name: p.grad for name, p in self.params.items()}
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def difference(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """``|a - b| / |b|``, with the norm over all parameters.

    Raises:
        ValueError: the gradients are not of the same parameters.
    """
    if ours.keys() != reference.keys():
        raise ValueError(f"gradients of different parameters: {sorted(ours.keys() ^ reference.keys())}")
    a, b = (torch.cat([gradients[name].flatten() for name in reference]) for gradients in (ours, reference))
    return float((a.double() - b).norm() / b.norm())


class Rows(Protocol):
    """Where a step reads the frozen part's output from."""

    def read(self) -> Tensor: ...


class Stored:
    """The frozen part's output as a feature store serves it: rows of a memory-mapped file, copied out by each read."""

    def __init__(self, frozen: Tensor) -> None:
        self._device = frozen.device
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "rows.npy"
        np.save(path, frozen.cpu().numpy())
        self._rows = np.load(path, mmap_mode="r")
        self._indices = np.arange(len(frozen))

    def read(self) -> Tensor:
        return torch.from_numpy(self._rows[self._indices]).to(self._device)


class Pinned:
    """The frozen part's output as the training loop gets it on a GPU: rows gathered in pinned memory, on their way to
    the device while it is busy with the step before."""

    def __init__(self, frozen: Tensor) -> None:
        rows = frozen.cpu()
        batch = {"rows": rows.pin_memory() if frozen.is_cuda else rows}
        self._arriving = prefetch_to_device(repeat(batch), frozen.device, ("rows",))

    def read(self) -> Tensor:
        return next(self._arriving)["rows"]


def ours(
    classifier: ClipClassifier,
    batch: Batch,
    *,
    rho: float = RHO,
    variance_weight: float = VARIANCE_WEIGHT,
    stored: Rows | None = None,
    autocast: Autocast = nullcontext,
) -> Step:
    """A step of this package's training loop; rho 0 is plain training, in one pass.

    Args:
        stored: the frozen part's output; None: computed in the step.
        autocast: entered anew for each forward pass, as its cache of casts must not outlive the weights.
    """
    trainable = classifier.trainable()
    params = list(trainable.values())
    disam = DISAM(params, rho, variance_weight, num_domains=DOMAINS)
    optimizer = torch.optim.AdamW(params, lr=0.0, fused=True)

    @cache
    def captured() -> AbstractContextManager[object]:  # not before the first step: models may be moved until then
        return classifier.captured(autocast)

    def encoded() -> Tensor:
        with autocast():
            return classifier.encode_frozen(batch.pixels_BCHW)

    def launched() -> None:
        logits = classifier.cached_logits(encoded() if stored is None else stored.read())

        def per_sample_loss() -> Tensor:
            with autocast():
                logits_BC = logits()
            return cross_entropy(logits_BC, batch.labels_B)

        disam.backward(per_sample_loss, batch.domains_B)
        optimizer.step()

    def run() -> None:
        with captured():
            launched()

    return Step(run, trainable, launched)


def peer_erm(
    params: Mapping[str, Tensor], logits: Callable[[], Tensor], labels_B: Tensor, *, autocast: Autocast = nullcontext
) -> Step:
    """Plain training as it is usually written."""
    optimizer = torch.optim.AdamW(params.values(), lr=0.0)

    def run() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = nn.functional.cross_entropy(logits(), labels_B)
        loss.backward()
        optimizer.step()

    return Step(run, params)


def peer_sam(
    params: Mapping[str, Tensor], logits: Callable[[], Tensor], labels_B: Tensor, *, autocast: Autocast = nullcontext
) -> Step:
    """Two full passes, with the optimizer of pytorch_optimizer driven as its documentation shows."""
    optimizer = sam_optimizer(params.values())

    def run() -> None:
        optimizer.zero_grad()

        def closure() -> Tensor:
            optimizer.zero_grad()
            with autocast():
                loss = nn.functional.cross_entropy(logits(), labels_B)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)

    return Step(run, params)


def sam_optimizer(params: Iterable[Tensor], lr: float = 0.0) -> Any:
    """pytorch_optimizer's SAM around AdamW."""
    try:
        from pytorch_optimizer import SAM
    except ImportError as error:
        raise SystemExit('pytorch_optimizer is missing: pip install "disam_peft[bench]"') from error
    return SAM(params, torch.optim.AdamW, rho=RHO, lr=lr)
