"""The mean loss of fixed samples as a function of what is trained: values, gradients, Hessian products.

Shapes in this file: B samples of a chunk, N samples in all, P trained numbers in one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import make_eval_loader
from disam_peft.disam.perturbation import flatten, restored, unflatten
from disam_peft.errors import UserError
from disam_peft.objectives.cross_entropy import cross_entropy


class LossSurface:
    """L(w) = (1/N) sum_i l_i(w), computed chunk by chunk so that memory does not grow with N.

    Nothing here touches ``p.grad``. Whoever walks on the surface does so inside ``restored()``.

    Args:
        params: w; of one device and dtype.
        per_sample_loss: the losses (B,) of a slice of the samples, at whatever the parameters hold now.
        num_samples: N.
        chunk: samples of one forward pass.
    """

    def __init__(
        self, params: Sequence[Tensor], per_sample_loss: Callable[[slice], Tensor], num_samples: int, chunk: int = 64
    ) -> None:
        self.params = list(params)
        self.per_sample_loss = per_sample_loss
        self.num_samples = num_samples
        self._chunk = chunk

    def restored(self) -> AbstractContextManager[None]:
        """On exit the parameters hold the bits that they held on entry."""
        return restored(self.params)

    def point(self) -> Tensor:
        """w as one new vector (P,)."""
        with torch.no_grad():
            return flatten(self.params)

    @torch.no_grad()
    def go(self, point_P: Tensor) -> None:
        """Set the parameters to ``point_P``."""
        torch._foreach_copy_(self.params, unflatten(point_P, self.params))

    @torch.no_grad()
    def loss(self) -> float:
        return sum(float(self.per_sample_loss(part).double().sum()) for part in self.parts()) / self.num_samples

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """L and its gradient (P,)."""
        total, gradient_P = 0.0, torch.zeros_like(self.point())
        for part in self.parts():
            loss = self.per_sample_loss(part).sum()
            gradient_P += self._derivative(loss)
            total += float(loss.detach().double())
        return total / self.num_samples, gradient_P / self.num_samples

    def gradient_of(self, part: slice) -> Tensor:
        """Gradient (P,) of the mean loss of some of the samples."""
        return self._derivative(self.per_sample_loss(part).mean())

    def hessian_product(self, vector_P: Tensor) -> Tensor:
        """H v (P,), by differentiating the gradient's product with v (Pearlmutter 1994)."""
        product_P = torch.zeros_like(vector_P)
        vectors = unflatten(vector_P, self.params)
        for part in self.parts():
            loss = self.per_sample_loss(part).sum()
            gradients = torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]).sum()
            if slope.requires_grad:  # the gradient of a linear loss is a constant: H is 0
                product_P += self._derivative(slope)
        return product_P / self.num_samples

    def parts(self, size: int | None = None) -> Iterator[slice]:
        """The samples in consecutive slices, of the chunk's size unless told otherwise."""
        size = size or self._chunk
        for start in range(0, self.num_samples, size):
            yield slice(start, min(start + size, self.num_samples))

    def _derivative(self, value: Tensor) -> Tensor:
        return flatten(torch.autograd.grad(value, self.params, materialize_grads=True))


def classifier_surface(
    classifier: ClipClassifier, dataset: DomainDataset, *, batch_size: int, workers: int | Literal["auto"] = 0
) -> LossSurface:
    """The cross entropy of ``dataset`` over the classifier's trainable parameters; its frozen part runs once, here.

    The images' frozen part stays on the device, so keep the dataset to some hundred samples. No autocast: curvature
    is measured in the precision of the parameters.

    Raises:
        UserError: nothing of the classifier is trained.
    """
    if not classifier.trainable():
        raise UserError(
            "sharpness is how the loss rises around trained weights, and this adapter was fitted to features as a "
            "whole; measure it for one that is trained (adapter.trained)"
        )
    like = next(classifier.model.parameters())
    loader = make_eval_loader(dataset, classifier.backbone.image_transform, batch_size, workers=workers)
    with torch.no_grad():
        frozen_N = torch.cat(
            [classifier.encode_frozen(batch["pixels"].to(like.device, like.dtype)) for batch in loader]
        )
    labels_N = torch.from_numpy(dataset.labels).to(like.device)

    def per_sample_loss(part: slice) -> Tensor:
        return cross_entropy(classifier.logits(frozen_N[part]), labels_N[part])

    return LossSurface(list(classifier.trainable().values()), per_sample_loss, len(dataset), batch_size)
