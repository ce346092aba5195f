"""A linear probe that is fitted in closed form, by ridge regression or linear discriminant analysis.

Shapes in this file: M training images, V images of validation, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.closed_form import ClosedFormHead, FeatureMoments, judge, lda_head, ridge_head
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import ClosedFormProbeConfig, takes_no_steps
from disam_peft.errors import UserError

SEARCHED = {
    "ridge": tuple(10.0 ** (power / 2) for power in range(-12, 3)),
    "lda": (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0),
}
"""Solver -> values of ``regularisation`` that are tried where none is set."""
_SOLVERS = {"ridge": ridge_head, "lda": lda_head}


class ClosedFormProbe(LinearProbeAdapter):
    """logits = scale * (weight_CE f / |f| + bias_C), where weight and bias are the closed form of the solver and the
    scale is part of both.

    The regularisation with the highest accuracy on source validation is taken (the mean over the domains; of equals the
    lower NLL decides), and with it the scale with the lowest NLL there, where the config does not say them. With
    ``trained: head`` the steps train weight and bias from there.
    """

    kind = "closed_form_probe"

    def __init__(self, config: ClosedFormProbeConfig, weight_CE: Tensor, bias_C: Tensor) -> None:
        Adapter.__init__(self)
        self.config = config
        self._settings = config
        self._fitted: dict[float, ClosedFormHead] = {}
        """Regularisation -> head, between ``fit_start`` and ``tune``."""
        if config.trained == "head":
            self.weight, self.bias = nn.Parameter(weight_CE), nn.Parameter(bias_C)
        else:
            self.register_buffer("weight", weight_CE)
            self.register_buffer("bias", bias_C)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> ClosedFormProbe:
        """Changes nothing in the backbone. The head is zero until ``fit_start``."""
        assert isinstance(config, ClosedFormProbeConfig)
        dtype, device = parameter_dtype(backbone), backbone.device
        weight_CE = torch.zeros(len(prompts.class_names), backbone.embed_dim, dtype=dtype, device=device)
        return cls(config, weight_CE, torch.zeros_like(weight_CE[:, 0]))

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> Mapping[str, float]:
        """Fit the head; the domains of the images do not matter."""
        config = self._settings
        features_ME = nn.functional.normalize(features_ME.to(self.weight.dtype), dim=-1)
        moments = FeatureMoments.of(features_ME, labels_M, len(self.weight))
        values = SEARCHED[config.solver] if config.regularisation is None else (config.regularisation,)
        self._fitted = {value: _SOLVERS[config.solver](moments, value) for value in values}
        if self.needs_tuning():
            return {}
        return self._take(values[0], config.scale or 1.0)

    def needs_tuning(self) -> bool:
        return self._settings.regularisation is None or self._settings.scale is None

    def tune(
        self, features_VE: Tensor, labels_V: Tensor, domains_V: Tensor, zero_shot_VC: Tensor
    ) -> Mapping[str, float]:
        """Choose regularisation and scale; zero-shot classification plays no part."""
        features_VE = nn.functional.normalize(features_VE.to(self.weight.dtype), dim=-1)
        judged = {
            value: judge(head.logits(features_VE), labels_V, domains_V, self._settings.scale)
            for value, head in self._fitted.items()
        }
        best = max(judged, key=lambda value: (judged[value].top1, -judged[value].nll))
        return self._take(best, judged[best].scale)

    def own_term(self) -> None:
        """Nothing: no prompts are samples here."""

    def _take(self, regularisation: float, scale: float) -> Mapping[str, float]:
        head = self._fitted[regularisation]
        self._fitted = {}
        self.weight.copy_(scale * head.weight_CE)
        self.bias.copy_(scale * head.bias_C)
        return {"regularisation": regularisation, "scale": scale}

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The zero-shot head, where the head is trained."""
        if takes_no_steps(config):
            raise UserError(
                f"a '{cls.kind}' adapter that is fitted and not trained has no way from zero-shot weights w0, so there "
                "is no w0 + alpha (w1 - w0) (WiSE-FT); train with adapter.trained=head"
            )
