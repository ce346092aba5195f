"""CLAP: class-adaptive linear probing (Silva-Rodriguez et al. 2024, "A Closer Look at the Few-Shot Adaptation of Large
Vision-Language Models", arXiv 2312.12730).

Shapes in this file: M training images, C classes, E embedding width, T templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, cosine_logits, parameter_dtype
from disam_peft.adapters.class_features_file import class_features_file
from disam_peft.adapters.prompts import ClassPrompts, FrozenText, ensemble, fill_templates, prompt_features
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import ClapConfig


def clap_penalty(weight_CE: Tensor, start_CE: Tensor, strength_C: Tensor) -> Tensor:
    """``mean_c lambda_c ||w_c - t_c||^2``, shape (), for the weights w, their start t and the strengths lambda (the
    mean over the classes is that of the authors' code, jusiro/CLAP)."""
    return (strength_C * (weight_CE - start_CE).square().sum(dim=1)).mean()


def clap_strengths(zero_shot_MC: Tensor, labels_M: Tensor) -> Tensor:
    """``lambda_c`` (C,): the mean zero-shot probability of class c over its own images.

    A class without images has 1, the most there can be. (The authors' code divides by 0 there.)
    """
    of_own_M = zero_shot_MC.softmax(dim=1).gather(1, labels_M[:, None])[:, 0]
    sum_C = of_own_M.new_zeros(zero_shot_MC.shape[1]).index_add(0, labels_M, of_own_M)
    count_C = labels_M.bincount(minlength=len(sum_C))
    return torch.where(count_C > 0, sum_C / count_C.clamp(min=1), torch.ones_like(sum_C))


class ClapAdapter(Adapter):
    """CLIP's logits with a trained weight for each class in the place of its features, and a term in the objective that
    pulls each weight to where it started, the harder the better zero-shot CLIP knows the class.

    The weights start in the direction of the class features, so that the first logits are those of zero-shot CLIP, and
    with the length of what the text tower gives (the mean over the templates, before any normalisation). In that length
    count the term and the learning rate, as in the authors' code. The strengths ``clap_strengths`` are computed once,
    from the training images as evaluation sees them, and stay.
    """

    kind = "clap"
    strength: Tensor
    start: Tensor

    def __init__(self, config: ClapConfig, start_CE: Tensor, scale: float) -> None:
        super().__init__()
        self.config = config
        self._penalty, self._scale, self.own_term_in_ascent = config.penalty, scale, config.in_ascent
        self.weight = nn.Parameter(start_CE.clone())
        self.register_buffer("start", start_CE, persistent=False)  # it follows from the backbone and the prompts
        self.register_buffer("strength", torch.ones_like(start_CE[:, 0]))

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> ClapAdapter:
        """Changes nothing in the backbone."""
        assert isinstance(config, ClapConfig)
        templates = len(prompts.templates)
        with torch.no_grad():
            features_NE = prompt_features(backbone, backbone.tokenize(fill_templates(prompts)))
            features_NE = features_NE.to(parameter_dtype(backbone))
            length_C1 = features_NE.unflatten(0, (-1, templates)).mean(dim=1).norm(dim=1, keepdim=True)
            start_CE = length_C1 * ensemble(features_NE, templates)
        return cls(config, start_CE, float(backbone.logit_scale))

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> Mapping[str, float]:
        """Set the strengths. The domains of the images do not matter."""
        scale = self.start.new_tensor(self._scale)
        start_CE = nn.functional.normalize(self.start, dim=-1)
        self.strength.copy_(clap_strengths(cosine_logits(features_ME, start_CE, scale, None), labels_M))
        found = {"least": self.strength.min(), "mean": self.strength.mean(), "most": self.strength.max()}
        return {f"{name}_strength": float(value) for name, value in found.items()}

    def own_term(self) -> Tensor:
        return self._penalty * clap_penalty(self.weight, self.start, self.strength)

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """The weights (C, E), normalised, in their own precision also under autocast."""
        return nn.functional.normalize(self.weight, dim=-1)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The start. What alpha moves on a straight line are the weights, before the normalisation."""

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        return {"weight": self.start.clone()}

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        return classes * (backbone.embed_dim + 1)

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """The weights (C, E), normalised, as class features."""
        return class_features_file(class_names, class_features())
