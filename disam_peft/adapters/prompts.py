"""Class names in sentences (prompts), and the class features that the text tower makes of them.

Shapes in this file: C classes, T templates, N = C * T prompts, L tokens, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone
from disam_peft.backbones.families import imagenet_templates
from disam_peft.config.prompts import IMAGENET, PromptConfig
from disam_peft.errors import UserError

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
    """The output of the frozen part of the text tower for the class prompts, computed once per classifier.

    Attributes:
        tokens_NL: token ids of every class in every template, the templates of a class side by side.
        templates: T.
        hidden: output of the text tower's frozen trunk for these tokens, which are the tokens themselves where its stem
            is trained; None where the whole tower is frozen.
        features_CE: normalised class features, as in zero-shot classification; None where ``hidden`` is set, or where
            the adapter has prompts of its own.
    """

    tokens_NL: Tensor
    templates: int
    hidden: Tensor | None
    features_CE: Tensor | None


def prompt_templates(config: PromptConfig) -> tuple[str, ...]:
    """The templates that the ``prompts`` setting of a recipe means."""
    if config.templates == IMAGENET:
        return imagenet_templates()
    return (config.templates,) if isinstance(config.templates, str) else tuple(config.templates)


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


def ensemble(features_NE: Tensor, templates: int) -> Tensor:
    """CLIP's prompt ensemble: normalise, average over the templates of a class, normalise again. (N, E) -> (C, E),
    in at least float32."""
    mean_CE = normalised(features_NE).unflatten(0, (-1, templates)).mean(dim=1)
    return nn.functional.normalize(mean_CE, dim=-1)


def text_trunk(backbone: ClipBackbone, tokens_NL: Tensor, blocks: int) -> Tensor:
    """``ClipBackbone.text_trunk`` in chunks of prompts, padded to the longest; the tokens where no stem is frozen."""
    if blocks == BEFORE_STEM:
        return tokens_NL
    chunks = [backbone.text_trunk(chunk, blocks) for chunk in tokens_NL.split(_PROMPTS_AT_ONCE)]
    longest = max(chunk.shape[1] for chunk in chunks)
    return torch.cat([nn.functional.pad(chunk, (0, 0, 0, longest - chunk.shape[1])) for chunk in chunks])


def zero_shot_features(backbone: ClipBackbone, tokens_NL: Tensor, templates: int) -> Tensor:
    """Normalised class features (C, E) of the text tower as it is now, computed in chunks of prompts."""
    return ensemble(prompt_features(backbone, tokens_NL), templates)


def prompt_features(backbone: ClipBackbone, tokens_NL: Tensor) -> Tensor:
    """Features (N, E) of every prompt, not normalised, computed in chunks of prompts."""
    return torch.cat([backbone.encode_text(chunk) for chunk in tokens_NL.split(_PROMPTS_AT_ONCE)])


def normalised(features_NE: Tensor) -> Tensor:
    """Features of length 1, in at least float32."""
    return nn.functional.normalize(features_NE.to(torch.promote_types(features_NE.dtype, torch.float32)), dim=-1)
