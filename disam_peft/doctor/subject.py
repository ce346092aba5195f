"""What is examined: a recipe's classifier on a few synthetic images.

Shapes in this file: B samples, C classes, P numbers that are trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.method import MethodConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.schedules import largest
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.experiments.build import load_pretrained
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training.trainer import rho_factors

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
TEMPLATES = 2
DOMAINS = (0, 0, 0, 1, 1, 0, 2, 2)
FEW_DOMAINS = (0, 0, 1, 2)
NOISE = 0.05
SMALL = 20_000_000
EXACT_BELOW = 0.2
QUICK_BELOW = 0.1


class Subject:
    """A classifier in eval mode and one batch for it. Dropout, whose masks differ between two passes, is left out.

    Attributes:
        labels_B, domains_B: three domains, whose mean losses lie apart; the last samples lack the first domain.
        exact_dtype: in which equalities are examined: float64 where a gradient takes less than 0.2 s in float32, else
            float32.
        seconds: how long a gradient of the whole batch takes in float32.
    """

    def __init__(self, classifier: ClipClassifier, method: MethodConfig, device: torch.device) -> None:
        self.classifier, self.method, self.device = classifier.to(device).eval(), method, device
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from initial zeros, where much is equal that should not be
            for p in self.params:
                p += NOISE * torch.randn(p.shape, generator=generator).to(p)
        weights = sum(p.numel() for p in classifier.model.parameters())
        self.domains_B = torch.tensor(DOMAINS if weights < SMALL else FEW_DOMAINS, device=device)
        size = classifier.backbone.preprocessing.size
        self._pixels_BCHW = torch.randn(len(self.domains_B), 3, *size, generator=generator)
        self._frozen: dict[tuple[torch.dtype, torch.dtype | None], Tensor] = {}
        with torch.no_grad():
            order_BC = classifier.logits(self.frozen()).argsort(dim=1, descending=True)
        # the first domain's labels are likely ones, the last domain's unlikely
        self.labels_B = order_BC.gather(1, (2 * self.domains_B + 1)[:, None])[:, 0]
        self.seconds = self._timed()
        has_float64 = device.type != "mps"
        self.exact_dtype = torch.float64 if has_float64 and self.seconds < EXACT_BELOW else torch.float32

    @property
    def params(self) -> list[Tensor]:
        return list(self.classifier.trainable().values())

    @property
    def few(self) -> slice:
        """The first and the last samples that hold two domains, where a whole batch would take long."""
        return slice(0, len(self.domains_B)) if self.quick else slice(1, 3)

    @property
    def quick(self) -> bool:
        return self.seconds < QUICK_BELOW

    @property
    def precision(self) -> str:
        """The type of the present numbers, in words."""
        return str(self.classifier.backbone.dtype).removeprefix("torch.")

    def use(self, dtype: torch.dtype) -> Subject:
        """Convert the classifier to this precision. From float32 to float64 and back changes no bit."""
        if self.classifier.backbone.dtype != dtype:
            self._clear_gradients()
            self._frozen.clear()
            self.classifier.to(dtype=dtype)
        return self

    def frozen(self, autocast: torch.dtype | None = None) -> Tensor:
        """The frozen part's output, computed once."""
        dtype = self.classifier.backbone.dtype
        if (dtype, autocast) not in self._frozen:
            with self._autocast(autocast):
                self._frozen[dtype, autocast] = self.classifier.encode_frozen(self.pixels())
        return self._frozen[dtype, autocast]

    def pixels(self) -> Tensor:
        return self._pixels_BCHW.to(self.device, self.classifier.backbone.dtype)

    def losses(
        self, where: slice | Tensor = slice(None), *, autocast: torch.dtype | None = None, outside: bool = False
    ) -> Callable[[], Tensor]:
        """Per-sample losses of these samples, for ``DISAM.backward``.

        Args:
            autocast: of every forward pass.
            outside: the caller holds that autocast around all passes instead.
        """
        frozen, labels_B = self.frozen(autocast)[where], self.labels_B[where]

        def per_sample_loss() -> Tensor:
            with self._autocast(None if outside else autocast):
                logits_BC = self.classifier.logits(frozen)
            return cross_entropy(logits_BC, labels_B)

        return per_sample_loss

    def disam(self, **changes: Any) -> DISAM:
        """The recipe's step; where it is ERM or SAM, with a perturbation and a variance all the same."""
        options: dict[str, Any] = {
            "rho": largest(self.method.rho) or 0.05,
            "variance_weight": largest(self.method.variance_weight) or 0.1,
            "variance_over": self.method.variance_over,
            "variance_scale": self.method.variance_scale,
            "variance_form": self.method.variance_form,
            "descent": self.method.descent,
            "alpha": self.method.effective_alpha,
            "adaptive": self.method.adaptive,
            "num_domains": len(set(DOMAINS)),
        }
        disam = DISAM(self.params, **(options | changes))
        if self.method.effective_rho > 0:
            disam.rho_factors = rho_factors(self.classifier.trainable(), self.method.rho_factors)
        return disam

    def gradient(self) -> Tensor:
        """The gradient (P,) that the last step left; the parameters have none afterwards."""
        gradient_P = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.params])
        self._clear_gradients()
        return gradient_P

    def weights(self) -> Tensor:
        """A copy of all that is trained, (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def _clear_gradients(self) -> None:
        for p in self.params:
            p.grad = None

    def _autocast(self, dtype: torch.dtype | None) -> Any:
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _timed(self) -> float:
        """Seconds of a gradient; the first one warms up, and is enough where it is slow."""
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            self.losses()().sum().backward()
            float(self.gradient().norm())  # waits for the device
            seconds = time.perf_counter() - start
            if seconds > 2:
                break
        return seconds


def _started(classifier: ClipClassifier) -> None:
    """Give an adapter whose size is that of a training set a made-up one: two images of each class and domain."""
    adapter = classifier.adapter
    if adapter is None or all(p.numel() for p in adapter.trainable().values()):
        return
    cells = torch.cartesian_prod(torch.arange(len(CLASSES)), torch.tensor(sorted(set(DOMAINS)))).repeat(2, 1)
    like = next(iter(adapter.trainable().values()))
    features_ME = torch.randn(len(cells), like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
    with torch.no_grad():
        adapter.fit_start(features_ME, *cells.to(like.device).unbind(1))


def build_subject(recipe: Recipe, device: torch.device) -> Subject:
    """The recipe's backbone, adapter, method and prompts, with made-up classes and data; the same for the same recipe.

    Raises:
        UserError: a backbone, adapter or prompt that cannot be used; an adapter that takes no step.
    """
    if takes_no_steps(recipe.adapter):
        raise UserError(
            f"adapter.kind={recipe.adapter.kind} is fitted to the training features and takes no step, so there is "
            "nothing to examine; set adapter.trained, or choose another adapter"
        )
    pretrained = load_pretrained(recipe, CLASSES)
    prompts = ClassPrompts(CLASSES, pretrained.prompts.templates[:TEMPLATES])
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had been built
        classifier = replace(pretrained, prompts=prompts).with_new_adapter()
        _started(classifier)
    return Subject(classifier, recipe.method, device)
