"""A CLIP that classifies: backbone + adapter + class prompts.

Shapes in this file: B images, C classes, T templates, N = C * T prompts, L tokens, E embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, Autocast, cosine_logits
from disam_peft.adapters.interpolation import MoveTo
from disam_peft.adapters.prompts import (
    ClassPrompts,
    FrozenText,
    ensemble,
    fill_templates,
    normalised,
    prompt_features,
    text_trunk,
    zero_shot_features,
)
from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone
from disam_peft.backbones.pass_cache import PassCache
from disam_peft.errors import UserError

SAME = 1e-6
"""Normalised features that differ by less differ by rounding."""


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass of a classifier has computed, with its graph.

    Attributes:
        logits_BC: (B, C).
        features_BE: image features as the adapter changes them, (B, E), not normalised.
        class_features_CE: normalised class features (C, E), or (B, C, E) where each image has its own.
        scale, bias: the factor of the cosines in the logits, and what is added to them (None: nothing), shape ().
        head_bias_C: (C,), the trained bias of the adapter's own head (a linear probe); None: it has none.
        caption_features_NE: normalised features of every prompt, whose ensemble the class features are; None unless
            they were asked for.
    """

    logits_BC: Tensor
    features_BE: Tensor
    class_features_CE: Tensor
    scale: Tensor
    bias: Tensor | None
    head_bias_C: Tensor | None = None
    caption_features_NE: Tensor | None = None


class ClipClassifier(nn.Module):
    """Images to logits over named classes; zero-shot without an adapter.

    ``encode_frozen`` runs the part that training cannot change, without a graph, once per batch. ``logits`` runs the
    rest; each pass of a sharpness-aware step repeats it.

    Args:
        backbone: a frozen CLIP; an adapter may have changed modules inside ``backbone.model``.
        adapter: built on this very backbone, or None for zero-shot classification.
        prompts: class names and templates.
        image_split: for zero-shot classification, the number of blocks of the image tower that ``encode_frozen`` runs,
            so that it can read what is stored for an adapter; unset: the whole tower. An adapter has its own split.

    Raises:
        UserError: a template or class name that cannot be used, a prompt longer than the context (names it), or
            prompts that the text tower cannot tell apart.
        ValueError: both an adapter and an ``image_split``.
    """

    def __init__(
        self, backbone: ClipBackbone, adapter: Adapter | None, prompts: ClassPrompts, *, image_split: int | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model  # registered, so that .to() moves it
        if adapter is not None and image_split is not None:
            raise ValueError(f"image_split={image_split} is for zero-shot; this adapter's is {adapter.image_split}")
        self.adapter = adapter
        self._zero_shot_split = image_split
        self.prompts = prompts
        self._tokens_NL = backbone.tokenize(fill_templates(prompts))
        if len(set(prompts.class_names)) > 1:
            backbone.require_different(self._tokens_NL, len(prompts.templates))
        self._text: FrozenText | None = None
        self._text_key: tuple[torch.device, torch.dtype] | None = None
        self._zero_shot_CE: Tensor | None = None
        self._captions_NE: Tensor | None = None
        self.train(False)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.prompts.class_names

    @property
    def image_split(self) -> int | None:
        """Blocks of the image tower that ``encode_frozen`` runs; None: all of the tower; -1: nothing of it."""
        return self._zero_shot_split if self.adapter is None else self.adapter.image_split

    def train(self, mode: bool = True) -> ClipClassifier:
        """Only the adapter trains: dropout and running statistics of the frozen backbone stay in eval mode."""
        super().train(mode)
        self.model.eval()
        if self.adapter is not None:
            self.adapter.train(mode)
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's trained parameters by name; empty for zero-shot."""
        return {} if self.adapter is None else self.adapter.trainable()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All tensors that training may change, by name: the trained parameters, and the adapter's own buffers."""
        if self.adapter is None:
            return {}
        kept = self.adapter.state_dict()
        return {**self.trainable(), **{name: b for name, b in self.adapter.named_buffers() if name in kept}}

    def frozen_text(self) -> FrozenText:
        """The text side's frozen part, computed on first use and kept while device and dtype stay the same."""
        key = (self.backbone.device, self.backbone.dtype)
        if self._text is None or self._text_key != key:
            # Not in inference mode even inside an evaluation that is: training saves these tensors for backward.
            off = torch.autocast(self.backbone.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), off:
                self._text, self._text_key = self._compute_frozen_text(), key
                self._zero_shot_CE = self._captions_NE = None
        return self._text

    def _compute_frozen_text(self) -> FrozenText:
        tokens_NL, templates = self._tokens_NL.to(self.backbone.device), len(self.prompts.templates)
        if self.adapter is not None and self.adapter.replaces_class_prompts:
            return FrozenText(tokens_NL, templates, None, None)
        split = None if self.adapter is None else self.adapter.text_split
        if split is None:
            features_CE = zero_shot_features(self.backbone, tokens_NL, templates)
            self._require_different(features_CE)
            return FrozenText(tokens_NL, templates, None, features_CE)
        return FrozenText(tokens_NL, templates, text_trunk(self.backbone, tokens_NL, split), None)

    def _require_different(self, features_CE: Tensor) -> None:
        """Raises UserError if the text tower makes the same of all classes, which classifies at chance."""
        same = len(set(self.class_names)) > 1 and bool((features_CE - features_CE[:1]).abs().max() <= SAME)
        if same:
            raise UserError(
                f"the text features of all {len(features_CE)} classes are equal, although their prompts differ: "
                f"backbone '{self.backbone.config.name}' has weights, a tokenizer or a pooling that do not belong "
                "together; check the files that it was loaded from"
            )

    def encode_frozen(self, pixels_BCHW: Tensor) -> Tensor:
        """The image tower up to ``image_split``: block activations, features (B, E) where all is frozen, or the
        pixels themselves where not even the stem is."""
        if self.image_split == BEFORE_STEM:
            return pixels_BCHW
        with torch.no_grad():
            if self.image_split is None:
                return self.backbone.encode_image(pixels_BCHW)
            return self.backbone.image_trunk(pixels_BCHW, self.image_split)

    def tower_features(self, frozen: Tensor, cache: PassCache | None = None) -> Tensor:
        """The image tower's features (B, E), not normalised, from the output of ``encode_frozen``."""
        if self.image_split == BEFORE_STEM:
            return self.backbone.encode_image(frozen)
        return frozen if self.image_split is None else self.backbone.image_head(frozen, self.image_split, cache)

    def features(self, frozen: Tensor, cache: PassCache | None = None) -> Tensor:
        """Image features (B, E) as the adapter changes them, not normalised, from the output of ``encode_frozen``."""
        features_BE = self.tower_features(frozen, cache)
        return features_BE if self.adapter is None else self.adapter.image_features(features_BE)

    def class_features(self) -> Tensor:
        """Normalised class features (C, E), with a graph where the text side is trained."""
        text = self.frozen_text()
        if self.adapter is not None:
            return self.adapter.class_features(self.backbone, text)
        assert text.features_CE is not None  # without an adapter the whole text tower is frozen
        return text.features_CE

    def shared_class_features(self) -> Tensor | None:
        """``class_features``; None where each image has its own, so that there is nothing to compute beforehand."""
        if self.adapter is not None and self.adapter.has_class_features_of_images():
            return None
        return self.class_features()

    def _class_features_of(self, features_BE: Tensor) -> Tensor:
        if self.adapter is None:
            return self.class_features()
        return self.adapter.class_features_of_images(self.backbone, self.frozen_text(), features_BE)

    def interpolation(self) -> AbstractContextManager[MoveTo]:
        """A context that yields a function of alpha, which puts this classifier at ``w0 + alpha (w1 - w0)``, w0 the
        zero-shot and w1 the trained weights (WiSE-FT, arXiv 2109.01903). The frozen part and so ``encode_frozen`` are
        the same at every alpha; ``class_features`` are not. On leaving it computes to the bit as before.

        Raises:
            UserError: zero-shot classification, or an adapter without zero-shot weights; when called, an alpha that is
                negative or not finite.
        """
        if self.adapter is None:
            raise UserError("zero-shot classification has no trained weights, so there is nothing to interpolate")
        return self.adapter.interpolation(self.backbone, self.prompts)

    @property
    def templates(self) -> int:
        """T, the prompts of each class that the class features are made of: 1 where the adapter has its own."""
        has_own = self.adapter is not None and self.adapter.replaces_class_prompts
        return 1 if has_own else len(self.prompts.templates)

    def text_features(self) -> tuple[Tensor, Tensor]:
        """``class_features`` (C, E) and the normalised features of every prompt (N, E), with a graph where the text
        side is trained.

        Raises:
            UserError: the adapter makes class features of its own, which are no ensemble of prompts.
        """
        text, adapter = self.frozen_text(), self.adapter
        if adapter is not None and not adapter.has_prompt_features():
            raise UserError(
                f"a '{adapter.kind}' adapter changes class features, not those of each prompt, so that there are no "
                "captions to compare images with; take objective.loss.kind=cross_entropy, or another adapter"
            )
        if text.features_CE is not None:
            if self._captions_NE is None:
                off = torch.autocast(self.backbone.device.type, enabled=False)
                with torch.inference_mode(False), torch.no_grad(), off:
                    self._captions_NE = normalised(prompt_features(self.backbone, text.tokens_NL))
            return text.features_CE, self._captions_NE
        assert adapter is not None  # without an adapter the whole text tower is frozen
        features_NE = adapter.prompt_features(self.backbone, text)
        return ensemble(features_NE, self.templates), normalised(features_NE)

    def captured(self, autocast: Autocast = nullcontext) -> AbstractContextManager[object]:
        """See ``Adapter.captured``. Open it around the steps of a training loop, when the model is on its device."""
        return nullcontext() if self.adapter is None else self.adapter.captured(self.backbone, autocast)

    def cached_logits(self, frozen: Tensor) -> Callable[[], Tensor]:
        """A function that returns ``logits(frozen)``, to be called once in each pass of one step.

        Its first call keeps the outputs of the frozen layers inside the first trained block (four activations for each
        image), and later calls use them. They are freed together with the function.
        """
        outputs = self.cached_outputs(frozen)
        return lambda: outputs().logits_BC

    def cached_outputs(self, frozen: Tensor, *, captions: bool = False) -> Callable[[], ForwardPass]:
        """As ``cached_logits``, for ``outputs``."""
        compute = partial(self.outputs, frozen, {})
        return partial(compute, captions=True) if captions else compute

    def repeated_logits(self, frozen: Tensor) -> Callable[[], Tensor]:
        """The name that ``cached_logits`` had in 0.1."""
        warnings.warn(
            "ClipClassifier.repeated_logits is now called cached_logits; the old name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.cached_logits(frozen)

    def logits(self, frozen: Tensor, cache: PassCache | None = None, class_features_CE: Tensor | None = None) -> Tensor:
        """Logits (B, C) from the output of ``encode_frozen``; the part of the model that a training pass repeats.

        Args:
            cache: see ``ClipBackbone.image_head``.
            class_features_CE: the result of ``shared_class_features``, for several batches between which nothing is
                trained; unset: they are computed.
        """
        return self.outputs(frozen, cache, class_features_CE).logits_BC

    def outputs(
        self,
        frozen: Tensor,
        cache: PassCache | None = None,
        class_features_CE: Tensor | None = None,
        *,
        captions: bool = False,
    ) -> ForwardPass:
        """Logits (B, C), as ``logits`` has them, and what they come from; with the features of every prompt on wish."""
        features_BE = self.features(frozen, cache)
        captions_NE: Tensor | None = None
        if captions:
            class_features_CE, captions_NE = self.text_features()
        elif class_features_CE is None:
            class_features_CE = self._class_features_of(features_BE)
        if self.adapter is None:
            scale, bias = self.backbone.logit_scale, self.backbone.logit_bias
        else:
            scale, bias = self.adapter.scale_and_bias(self.backbone)
        logits = cosine_logits if self.adapter is None else self.adapter.logits
        logits_BC = logits(features_BE, class_features_CE, scale, bias)
        head_bias_C = None if self.adapter is None else self.adapter.head_bias
        return ForwardPass(logits_BC, features_BE, class_features_CE, scale, bias, head_bias_C, captions_NE)

    # -- zero-shot beside an adapter -------------------------------------------------------------------------

    def zero_shot_class_features(self) -> Tensor:
        """Normalised class features (C, E) of the templates by the plain text tower, without a graph: those of
        zero-shot classification, whatever the adapter does. They are kept as ``frozen_text`` is."""
        text = self.frozen_text()
        if text.features_CE is not None:
            return text.features_CE
        if self._zero_shot_CE is None:
            off = torch.autocast(self.backbone.device.type, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), off, self._bypassed():
                self._zero_shot_CE = zero_shot_features(self.backbone, text.tokens_NL, text.templates)
        return self._zero_shot_CE

    @torch.no_grad()
    def zero_shot_outputs(self, frozen: Tensor) -> ForwardPass:
        """What zero-shot classification computes from the output of ``encode_frozen``, without a graph: equal, to the
        bit, to ``outputs`` of a classifier of this backbone without an adapter.

        An image tower that is frozen as a whole has computed everything already. Otherwise the rest of the tower runs
        once, with the adapter switched off.
        """
        class_features_CE = self.zero_shot_class_features()
        with self._bypassed() if self.image_split is not None else nullcontext():
            features_BE = self.tower_features(frozen)
        scale, bias = self.backbone.logit_scale, self.backbone.logit_bias
        logits_BC = cosine_logits(features_BE, class_features_CE, scale, bias)
        return ForwardPass(logits_BC, features_BE, class_features_CE, scale, bias)

    def _bypassed(self) -> AbstractContextManager[object]:
        return nullcontext() if self.adapter is None else self.adapter.bypassed(self.backbone)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, C)."""
        return self.logits(self.encode_frozen(pixels_BCHW))


def zero_shot(backbone: ClipBackbone, class_names: Sequence[str], templates: Sequence[str]) -> ClipClassifier:
    """Zero-shot CLIP over these classes."""
    return ClipClassifier(backbone, None, ClassPrompts(tuple(class_names), tuple(templates)))
