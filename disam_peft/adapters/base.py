"""What is trained: the contract of every adapter.

Shapes in this file: B images, C classes, T templates, N = C * T prompts, L tokens, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from disam_peft.adapters.prompts import ClassPrompts, FrozenText, ensemble
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.errors import UserError

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context of a forward pass, as ``Accelerator.autocast`` does."""


def parameter_dtype(backbone: ClipBackbone) -> torch.dtype:
    """float32, or the backbone's own dtype where that is wider."""
    return torch.promote_types(backbone.dtype, torch.float32)


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
