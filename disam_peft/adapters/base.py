"""What is trained: the contract of every adapter.

Shapes in this file: B images, C classes, T templates, N = C * T prompts, L tokens, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from disam_peft.backbones.base import ClipBackbone
from disam_peft.config import Config
from disam_peft.errors import UserError

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context of a forward pass, as ``Accelerator.autocast`` does."""

_PROMPTS_AT_ONCE = 256  # bounds the memory of an ensemble of 80 templates over many classes


@dataclass(frozen=True)
class ClassPrompts:
    """What the classes are called and how a sentence about them is made."""

    class_names: tuple[str, ...]
    """Names as they stand in a sentence ("polar bear"), one per label."""
    templates: tuple[str, ...]
    """Sentences with one ``{}`` each; several are averaged as in CLIP's prompt ensemble."""


@dataclass(frozen=True)
class FrozenText:
    """The part of the text tower's work that training cannot change, computed once per classifier.

    Attributes:
        tokens_NL: token ids of every class in every template, the templates of a class side by side.
        templates: T.
        hidden: output of the text tower's frozen trunk for these tokens; None where the whole tower is frozen.
        features_CE: normalised class features, as in zero-shot classification; None where ``hidden`` is set, or where
            the adapter has prompts of its own.
    """

    tokens_NL: Tensor
    templates: int
    hidden: Tensor | None
    features_CE: Tensor | None


def fill_templates(prompts: ClassPrompts) -> list[str]:
    """Every class name in every template, the templates of a class side by side: N sentences.

    Plain replacement, never ``str.format``: a brace in a class name is a brace.

    Raises:
        UserError: a template without exactly one ``{}``, no template, no class, or an empty class name.
    """
    if not prompts.templates:
        raise UserError("no prompt template given; use for example 'a photo of a {}.'")
    for template in prompts.templates:
        if template.count("{}") != 1:
            raise UserError(
                f"template {template!r} needs exactly one {{}} where the class name goes, e.g. 'a photo of a {{}}.'"
            )
    if not prompts.class_names:
        raise UserError("no classes to build prompts for")
    for label, name in enumerate(prompts.class_names):
        if not name.strip():
            raise UserError(f"the name of class {label} is empty; give it one in the class-name override file")
    return [template.replace("{}", name) for name in prompts.class_names for template in prompts.templates]


def parameter_dtype(backbone: ClipBackbone) -> torch.dtype:
    """float32, or the backbone's own dtype where that is wider."""
    return torch.promote_types(backbone.dtype, torch.float32)


def ensemble(features_NE: Tensor, templates: int) -> Tensor:
    """CLIP's prompt ensemble: normalise, average over the templates of a class, normalise again. (N, E) -> (C, E),
    in at least float32."""
    wide = torch.promote_types(features_NE.dtype, torch.float32)
    normalised_NE = nn.functional.normalize(features_NE.to(wide), dim=-1)
    mean_CE = normalised_NE.unflatten(0, (-1, templates)).mean(dim=1)
    return nn.functional.normalize(mean_CE, dim=-1)


def text_trunk(backbone: ClipBackbone, tokens_NL: Tensor, blocks: int) -> Tensor:
    """``ClipBackbone.text_trunk`` in chunks of prompts, padded to the longest."""
    chunks = [backbone.text_trunk(chunk, blocks) for chunk in tokens_NL.split(_PROMPTS_AT_ONCE)]
    longest = max(chunk.shape[1] for chunk in chunks)
    return torch.cat([nn.functional.pad(chunk, (0, 0, 0, longest - chunk.shape[1])) for chunk in chunks])


def zero_shot_features(backbone: ClipBackbone, tokens_NL: Tensor, templates: int) -> Tensor:
    """Normalised class features (C, E) of the text tower as it is now, computed in chunks of prompts."""
    chunks = tokens_NL.split(_PROMPTS_AT_ONCE)
    return ensemble(torch.cat([backbone.encode_text(chunk) for chunk in chunks]), templates)


def cosine_logits(features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """CLIP's logits (B, C): scaled cosine similarity. Class features come normalised, image features do not.

    In at least float32, also under autocast: bfloat16 would round logits near 30 to the next 0.125.
    """
    wide = torch.promote_types(features_BE.dtype, torch.float32)
    with torch.autocast(features_BE.device.type, enabled=False):
        normalised_BE = nn.functional.normalize(features_BE.to(wide), dim=-1)
        logits_BC = scale.to(wide) * normalised_BE @ class_features_CE.to(wide).T
        return logits_BC if bias is None else logits_BC + bias.to(wide)


def require_matching_state(kind: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the ones of this adapter.

    Raises:
        UserError: missing, extra, misshapen, non-float or non-finite tensors; lists expected against found.
    """
    faults = [f"missing {name} {tuple(expected[name].shape)}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected {name} {tuple(found[name].shape)}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        wanted, tensor = expected[name], found[name]
        if tensor.shape != wanted.shape:
            faults.append(f"{name} expected shape {tuple(wanted.shape)}, found {tuple(tensor.shape)}")
        elif tensor.is_floating_point() != wanted.is_floating_point():
            faults.append(f"{name} expected dtype {wanted.dtype}, found {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise UserError(
            f"the tensors do not fit this '{kind}' adapter ({len(expected)} expected, {len(found)} found): {shown}. "
            "Nothing was loaded; use the config that the tensors were trained with"
        )


class Adapter(nn.Module, ABC):
    """A trainable part on a frozen backbone.

    An adapter is built once (``build``), which may change modules inside ``backbone.model``; its parameters are
    float32 and are the only ones that require a gradient. The classifier asks it for features and logits, and
    asks it where the frozen part of each tower ends, so that the frozen part need not run in both passes.
    """

    kind: ClassVar[str]
    config: Config

    image_split: int | None = None
    """Leading blocks of the image tower that this adapter leaves frozen; None: the whole tower is frozen."""

    text_split: int | None = None
    """The same for the text tower; None: it is frozen for the class prompts, whose features are computed once.
    (A text prompt trains none of the tower and replaces the class prompts: it overrides ``class_features``.)"""

    replaces_class_prompts: ClassVar[bool] = False
    """``class_features`` has prompts of its own: those of the templates need never run."""

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        """The ``image_split`` that ``build`` will give; asked before, for building changes the tower. None unless a
        kind of adapter says otherwise.

        Raises:
            UserError: as ``build``, for modules that this backbone does not have.
        """
        return None

    @classmethod
    @abstractmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> Adapter:
        """Attach to ``backbone``.

        Raises:
            UserError: the config asks for something that this backbone does not have.
        """

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; float32, all of them requiring a gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What is saved: name -> tensor, nothing of the frozen backbone."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Strict: missing, extra, misshapen or non-finite tensors raise UserError and change nothing."""

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E), with a graph where the text side is trained."""
        if text.features_CE is not None:
            return text.features_CE
        assert text.hidden is not None and self.text_split is not None  # FrozenText holds one or the other
        return ensemble(backbone.text_head(text.hidden, text.tokens_NL, self.text_split), text.templates)

    def captured(self, backbone: ClipBackbone, autocast: Autocast) -> AbstractContextManager[object]:
        """Records this adapter's text side on a GPU, where that pays. While what is returned is open, passes with a
        gradient replay it: the same kernels, which the host need not launch one by one. It can be opened again, until
        the model or the adapter is moved; each forward has one backward then. ``autocast`` is that of the passes."""
        return nullcontext()

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Image features (not normalised) against class features: logits (B, C)."""
        return cosine_logits(features_BE, class_features_CE, scale, bias)

    def detach(self, backbone: ClipBackbone) -> None:
        """Undo what ``build`` changed in ``backbone.model``; the adapter cannot be used afterwards."""

    def merged(self, backbone: ClipBackbone) -> nn.Module:
        """A copy of ``backbone.model`` with this adapter folded into its weights (computed in float32); the
        backbone itself stays as it is.

        Raises:
            UserError: this kind of adapter cannot be merged; says what to export instead.
        """
        raise UserError(f"a '{self.kind}' adapter has no weights of the backbone to merge into; use --to peft")
