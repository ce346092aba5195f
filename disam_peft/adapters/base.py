"""The contract of every adapter: what is trained, how it takes part in the forward pass, and what is saved of it.

Shapes in this file: B images, C classes, T templates, N = C * T prompts, L tokens, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from disam_peft.adapters.averaging import mean_of_tensors, require_same_shape
from disam_peft.adapters.interpolation import MoveTo, require_alpha, tensors_on_a_line, wise_ft
from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.adapters.prompts import ClassPrompts, FrozenText, ensemble
from disam_peft.adapters.start_hooks import StartHooks
from disam_peft.adapters.trained_scale import TrainedScale, zero_shot_scale
from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone
from disam_peft.config.base import Config
from disam_peft.errors import UserError

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context of a forward pass, as ``Accelerator.autocast`` does."""


class Adapter(StartHooks, nn.Module, ABC):
    """A trainable part on a frozen backbone.

    An adapter is built once (``build``), which may change modules inside ``backbone.model``; its parameters are
    float32 and are the only ones that require a gradient. In each forward pass the classifier calls its hooks in this
    order: ``image_features`` (on the output of the image tower), ``class_features`` (text side; for adapters whose
    prompts depend on the image ``class_features_of_images``), ``logits``. It also asks where the frozen part of each
    tower ends, so that the frozen part need not run in both passes.

    To write one: a config class in ``config/adapters.py`` (one line in its union), a subclass in a file of its own,
    and one line in ``registry.py``. Only ``build`` and the hooks that differ from zero-shot classification need code;
    ``docs/extending.md`` writes a complete example, and ``clip_adapter.py`` is the smallest shipped one: it has
    ``build`` and one hook. Each hook works on what it is given and returns a value, and never looks at the classifier
    or at another adapter, so that several adapters could take part in one forward pass. The hooks of a start from the
    training features are in ``start_hooks.py``.
    """

    kind: ClassVar[str]
    config: Config

    def __init__(self) -> None:
        super().__init__()
        self.trained_scale: TrainedScale | None = None
        """Set by ``build_adapter`` where the config has ``logit_scale: trained``."""

    # -- the frozen part of the towers ---------------------------------------------------------------------------

    image_split: int | None = None
    """Leading blocks of the image tower that this adapter leaves frozen; None: the whole tower is frozen; BEFORE_STEM
    (-1): nothing of it is."""

    text_split: int | None = None
    """The same for the text tower; None: it is frozen for the class prompts, whose features are computed once.
    (A text prompt trains none of the tower and replaces the class prompts: it overrides ``class_features``.)"""

    replaces_class_prompts: bool = False
    """``class_features`` has prompts of its own: those of the templates need never run."""

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        """The ``image_split`` that ``build`` will give. It is asked before ``build``, which changes the tower.

        Raises:
            UserError: as ``build``, for modules that this backbone does not have.
        """
        return None

    # -- building ------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> Adapter:
        """Attach to ``backbone``.

        Raises:
            UserError: the config asks for something that this backbone does not have.
        """

    # -- the forward pass ----------------------------------------------------------------------------------------

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E), with a graph where the text side is trained."""
        if text.features_CE is not None:
            return text.features_CE
        return ensemble(self.prompt_features(backbone, text), text.templates)

    def class_features_of_images(self, backbone: ClipBackbone, text: FrozenText, features_BE: Tensor) -> Tensor:
        """Normalised class features for these images, whose features are as ``image_features`` gives them: (C, E) where
        they are the same for all, which is ``class_features``; or (B, C, E), one set for each image."""
        return self.class_features(backbone, text)

    def has_class_features_of_images(self) -> bool:
        """Whether each image has class features of its own, so that there is no use of ``class_features``."""
        return type(self).class_features_of_images is not Adapter.class_features_of_images

    def prompt_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Features (N, E) of every prompt, not normalised, with their graph: the class features before their ensemble.
        Asked for where the text side is trained."""
        assert text.hidden is not None and self.text_split is not None  # FrozenText holds these or the features
        if self.text_split == BEFORE_STEM:
            return backbone.encode_text(text.tokens_NL)
        return backbone.text_head(text.hidden, text.tokens_NL, self.text_split)

    def has_prompt_features(self) -> bool:
        """Whether the class features of this adapter are the ensemble of ``prompt_features``."""
        own = type(self)
        return own.class_features is Adapter.class_features or own.prompt_features is not Adapter.prompt_features

    def image_features(self, features_BE: Tensor) -> Tensor:
        """The image tower's features (B, E) as this adapter changes them; neither is normalised."""
        return features_BE

    def scale_and_bias(self, backbone: ClipBackbone) -> tuple[Tensor, Tensor | None]:
        """The factor of the cosines in the logits, and what is added to them (None: nothing), shape ()."""
        if self.trained_scale is None:
            return backbone.logit_scale, backbone.logit_bias
        return self.trained_scale.scale_and_bias()

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Features from ``image_features`` (not normalised) against class features, (C, E) or of each image (B, C, E):
        logits (B, C)."""
        return cosine_logits(features_BE, class_features_CE, scale, bias)

    @property
    def head_bias(self) -> Tensor | None:
        """The trained bias (C,) of a head of its own, in the place of class features; None where it has none."""
        return None

    own_term_in_ascent: bool = True
    """Whether the perturbation of sam and disam climbs ``own_term`` too."""

    def own_term(self) -> Tensor | None:
        """What this method adds to the objective, shape (), with its factor and a graph: a function of the adapter
        alone, in which no image takes part. It counts once in a step. None, at every call: nothing is added."""
        return None

    def captured(self, backbone: ClipBackbone, autocast: Autocast) -> AbstractContextManager[object]:
        """A context in which a GPU replays a recording of this adapter's text side, where that is faster.

        While it is open, passes with a gradient run the same kernels without the host launching them one by one; each
        forward may have one backward then. It can be opened again until the model or the adapter is moved. ``autocast``
        is that of the passes.
        """
        return nullcontext()

    @classmethod
    def require_any_classes(cls, config: Config) -> None:
        """Pass if an adapter of this config can be built and loaded with other classes than it was trained on, whose
        names the text tower reads.

        Raises:
            UserError: it has tensors for its own classes.
        """
        if any(getattr(config, name, False) for name in ("has_own_head", "class_specific", "of_each_class")):
            raise UserError(
                f"this '{cls.kind}' adapter has weights for each class that it was trained on, and none for others; "
                "train it on them, or take one whose classes are names alone, such as lora, full or coop"
            )

    # -- weights -------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; float32, all of them requiring a gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """What is saved: name -> a copy of the tensor, nothing of the frozen backbone.

        By default all parameters and all persistent buffers of this module.
        """
        return {name: tensor.clone() for name, tensor in self._own_tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``state`` of an adapter with the same config returned.

        Raises:
            UserError: missing, extra, misshapen or non-finite tensors; nothing is changed then.
        """
        own = self._own_tensors()
        require_matching_state(self.kind, own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _own_tensors(self) -> dict[str, Tensor]:
        """The parameters and persistent buffers themselves, detached: writing to one changes the adapter."""
        return {name: tensor.detach() for name, tensor in self.state_dict(keep_vars=True).items()}

    def detach(self, backbone: ClipBackbone) -> None:
        """Undo what ``build`` changed in ``backbone.model``; the adapter cannot be used afterwards."""

    def bypassed(self, backbone: ClipBackbone) -> AbstractContextManager[object]:
        """A context in which both towers of ``backbone`` compute what they did before ``build``, to the bit.

        Anchors take their zero-shot reference from it: once in a step, without a graph, and always from the output of
        the frozen part, so nothing before ``image_split`` has to be undone. Modules may be exchanged inside; no trained
        tensor is changed, and afterwards all is as it was. An adapter whose ``build`` changes nothing in
        ``backbone.model`` need not override it.
        """
        return nullcontext()

    # -- between zero-shot and trained ---------------------------------------------------------------------------

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """Pass if adapters of this config have weights w0 with which they classify as zero-shot CLIP does, and to which
        a straight line ``w0 + alpha (w1 - w0)`` leads from the trained weights w1. It is asked before anything is
        loaded.

        Raises:
            UserError: they have none; says why. Not overridden, this is so.
        """
        raise UserError(
            f"a '{cls.kind}' adapter has no zero-shot weights w0, so there is no w0 + alpha (w1 - w0) (WiSE-FT)"
        )

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        """w0: the values with which this adapter classifies as zero-shot CLIP does, for those of ``trainable`` that
        have to move. The weights of the model must be linear in these; the other tensors stay as they are trained.

        Raises:
            UserError: there is no such line in the tensors of this adapter; says what to do instead.
        """
        self.require_zero_shot_weights(self.config)
        raise NotImplementedError(f"{type(self).__name__} has zero-shot weights and does not say which")

    def interpolation(self, backbone: ClipBackbone, prompts: ClassPrompts) -> AbstractContextManager[MoveTo]:
        """A context that yields a function of alpha, which puts the classifier at ``w0 + alpha (w1 - w0)``.

        0 is zero-shot, 1 is the trained adapter to the bit, more goes beyond it. ``merged`` inside gives what is merged
        at that alpha. On leaving, all weights have the bits that they had before.

        Raises:
            UserError: as ``require_zero_shot_weights``; when called, an alpha that is negative or not finite.
        """
        self.require_zero_shot_weights(self.config)
        starts = self.zero_shot_tensors(backbone, prompts) | self._zero_shot_scale(backbone)
        return tensors_on_a_line(self.trainable(), starts)

    @torch.no_grad()
    def settle(self, backbone: ClipBackbone, prompts: ClassPrompts, alpha: float) -> None:
        """Put the tensors at ``w0 + alpha (w1 - w0)`` for good, so that ``state`` has them.

        Raises:
            UserError: as ``zero_shot_tensors``; an alpha that is negative or not finite. Nothing is changed then.
        """
        require_alpha(alpha)
        trained = self.trainable()
        starts = self.zero_shot_tensors(backbone, prompts) | self._zero_shot_scale(backbone)
        for name, start in starts.items():
            trained[name].copy_(wise_ft(start, trained[name], alpha))

    def _zero_shot_scale(self, backbone: ClipBackbone) -> dict[str, Tensor]:
        if self.trained_scale is None:
            return {}
        return {f"trained_scale.{name}": start for name, start in zero_shot_scale(backbone).items()}

    # -- the mean of several ---------------------------------------------------------------------------------------

    @classmethod
    def soup(
        cls, configs: Sequence[Config], states: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Config, dict[str, Tensor]]:
        """Config and state of the one adapter that is the mean of several of this kind on the same backbone.

        Not overridden: the mean of each tensor, and the first config. A kind whose weights are products of tensors
        overrides it.

        Raises:
            UserError: their settings or tensors differ, or this kind has no mean; says why.
        """
        require_same_shape(cls.kind, configs, states)
        return configs[0], mean_of_tensors(cls.kind, states)

    @classmethod
    def random_start(cls, config: Config) -> str:
        """What starts from random numbers and is not linear in what is computed, in words; empty: nothing is. The mean
        of two such adapters from different numbers need not be good at anything."""
        return ""

    # -- saving and exporting ------------------------------------------------------------------------------------

    def parts(self) -> Mapping[str, Adapter]:
        """The adapters that this one is made of, by name; each can be saved as itself. Not overridden: none."""
        return {}

    companion_names: ClassVar[tuple[str, ...]] = ()
    """Files for other programs that may lie in an adapter folder of this kind beside our own two."""

    def companion_files(self, backbone: ClipBackbone) -> dict[str, bytes]:
        """The files among ``companion_names`` that are written whenever this adapter is saved, by name."""
        return {}

    @classmethod
    def check_companion(cls, path: Path, config: Config, backbone: ClipBackbone) -> None:
        """Compare one of ``companion_names``, found in a folder that is being loaded, with what ``config`` means.

        The file may come from anybody; nothing in it may be acted upon.

        Raises:
            UserError: it says something else than ``config``.
        """

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """Files that ``export --to peft`` adds to the adapter folder for use without this package, by name.

        Args:
            class_features: computes the normalised class features (C, E), float32 on the CPU, in eval mode.
        """
        return {}

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        """At least so many numbers (elements of tensors) an adapter of this config holds for so many classes.

        It is asked before an adapter from a stranger is built: a config must not be able to ask for far more memory
        than the file beside it fills. 0 says nothing, which is right where the config and the backbone bound the size.
        """
        return 0

    def merged(self, backbone: ClipBackbone) -> nn.Module:
        """A copy of ``backbone.model`` with this adapter folded into its weights (computed in float32); the
        backbone itself stays as it is.

        Raises:
            UserError: this kind of adapter cannot be merged; says what to export instead.
        """
        raise UserError(f"a '{self.kind}' adapter has no weights of the backbone to merge into; use --to peft")

    def merged_weights(self, backbone: ClipBackbone) -> dict[str, Tensor]:
        """The weights of ``merged`` by their names, or some of them: at least those that differ from the frozen ones.
        An adapter on a half-precision backbone gives them as they were before they are rounded.

        Raises:
            UserError: as ``merged``.
        """
        return dict(self.merged(backbone).named_parameters())


def parameter_dtype(backbone: ClipBackbone) -> torch.dtype:
    """float32, or the backbone's own dtype where that is wider."""
    return torch.promote_types(backbone.dtype, torch.float32)


def cosine_logits(features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """CLIP's logits (B, C): scaled cosine similarity. Class features come normalised, image features do not. The class
    features may be those of each image, (B, C, E).

    In at least float32, also under autocast: bfloat16 would round logits near 30 to the next 0.125.
    """
    wide = torch.promote_types(features_BE.dtype, torch.float32)
    with torch.autocast(features_BE.device.type, enabled=False):
        normalised_BE = nn.functional.normalize(features_BE.to(wide), dim=-1)
        if class_features_CE.ndim == 3:
            logits_BC = scale.to(wide) * (class_features_CE.to(wide) @ normalised_BE[..., None])[..., 0]
        else:
            logits_BC = scale.to(wide) * normalised_BE @ class_features_CE.to(wide).T
        return logits_BC if bias is None else logits_BC + bias.to(wide)
