"""TaskRes: a trained residual on the class features (Yu et al. 2023, "Task Residual for Tuning Vision-Language Models",
arXiv 2211.10277).

Shapes in this file: C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.class_features_file import class_features_file
from disam_peft.adapters.prompts import ClassPrompts, FrozenText
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import TaskResConfig


def task_residual(class_features_CE: Tensor, residual_CE: Tensor, alpha: float) -> Tensor:
    """``t + alpha x`` (C, E), normalised, for class features t and the residual x (section 3.2 of the paper)."""
    return nn.functional.normalize(class_features_CE + alpha * residual_CE, dim=-1)


class TaskResAdapter(Adapter):
    """CLIP's logits with the class features ``t + alpha x``; x is trained and starts at 0, which is zero-shot CLIP.

    The formula is the paper's. t is the ensemble of the templates as zero-shot classification uses it, of length 1, so
    that ``alpha`` and the learning rate count in that length. (The authors' code, geekyutao/TaskRes, takes the mean of
    features that are not normalised.)
    """

    kind = "task_res"

    def __init__(self, config: TaskResConfig, residual_CE: Tensor) -> None:
        super().__init__()
        self.config = config
        self._alpha = config.alpha
        self.residual = nn.Parameter(residual_CE)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> TaskResAdapter:
        """Changes nothing in the backbone."""
        assert isinstance(config, TaskResConfig)
        shape = (len(prompts.class_names), backbone.embed_dim)
        return cls(config, torch.zeros(shape, dtype=parameter_dtype(backbone), device=backbone.device))

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E), in the precision of the residual also under autocast."""
        assert text.features_CE is not None  # the text tower is frozen
        with torch.autocast(self.residual.device.type, enabled=False):
            return task_residual(text.features_CE.to(self.residual.dtype), self.residual, self._alpha)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """A residual of 0. What alpha moves on a straight line is the residual, before the normalisation."""

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        return {"residual": torch.zeros_like(self.residual)}

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        return classes * backbone.embed_dim

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """The class features (C, E) with the residual."""
        return class_features_file(class_names, class_features())
