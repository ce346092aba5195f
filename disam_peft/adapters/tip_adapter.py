"""Tip-Adapter and Tip-Adapter-F: a cache of training images beside zero-shot CLIP (arXiv 2207.09519).

Shapes in this file: M training images, N of them in the cache, B images, V images of validation, C classes, E width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, cosine_logits, parameter_dtype
from disam_peft.adapters.key_value_cache import cache_keys, cache_rows, search_factors, search_values, tip_adapter
from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.feature_adapters import TipAdapterConfig
from disam_peft.errors import UserError


class TipAdapter(Adapter):
    """logits = CLIP's + alpha * exp(-beta (1 - q K)) V, for the normalised feature q of an image.

    K are the features of ``shots`` training images of each class and domain, as evaluation sees them, normalised; V are
    their classes, one-hot. ``alpha`` and ``beta`` are chosen on source validation where the config does not say them,
    by the grid of the authors' code. With ``trained: keys`` the steps train K, which is not normalised again
    (Tip-Adapter-F); alpha and beta stay. CLIP's part has the scale of the backbone, which is the authors' 100 for the
    CLIPs of OpenAI.

    Buffers ``labels`` and ``domains`` (N,) say of each entry which class and domain its image has.
    """

    kind = "tip_adapter"
    keys: Tensor
    labels: Tensor
    domains: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, config: TipAdapterConfig, classes: int, like_E: Tensor) -> None:
        super().__init__()
        self.config = config
        self._settings, self._classes = config, classes
        for name, value in (("alpha", config.alpha), ("beta", config.beta)):
            self.register_buffer(name, like_E.new_tensor(1.0 if value is None else value))
        self._resize(0, like_E)

    def _resize(self, entries: int, like: Tensor) -> None:
        """Make an empty cache of so many entries, of the width, the type and on the device of ``like``."""
        keys_NE = like.new_zeros(entries, like.shape[-1])
        if self._settings.trained == "keys":
            self.keys = nn.Parameter(keys_NE)
        else:
            self.register_buffer("keys", keys_NE)
        for name in ("labels", "domains"):
            self.register_buffer(name, torch.zeros(entries, dtype=torch.int64, device=like.device))

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> TipAdapter:
        """Changes nothing in the backbone. The cache is empty until ``make_room``."""
        assert isinstance(config, TipAdapterConfig)
        like_E = torch.zeros(backbone.embed_dim, dtype=parameter_dtype(backbone), device=backbone.device)
        return cls(config, len(prompts.class_names), like_E)

    # -- the start -----------------------------------------------------------------------------------------------

    def _rows(self, labels_M: Tensor, domains_M: Tensor) -> Tensor:
        return cache_rows(labels_M, domains_M, self._settings.shots, self._settings.seed)

    def make_room(self, labels_M: Tensor, domains_M: Tensor) -> None:
        entries = len(self._rows(labels_M, domains_M))
        if entries != len(self.labels):
            self._resize(entries, self.keys.detach())

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> Mapping[str, float]:
        """Fill the cache."""
        self.make_room(labels_M, domains_M)
        rows_N = self._rows(labels_M, domains_M)
        self.keys.copy_(cache_keys(features_ME[rows_N].to(self.keys.dtype)[None]))
        self.labels.copy_(labels_M[rows_N])
        self.domains.copy_(domains_M[rows_N])
        cells = torch.unique(torch.stack([self.labels, self.domains]), dim=1).shape[1]
        return {"entries": len(rows_N), "cells": cells}

    def needs_tuning(self) -> bool:
        return self._settings.alpha is None or self._settings.beta is None

    def tune(
        self, features_VE: Tensor, labels_V: Tensor, domains_V: Tensor, zero_shot_VC: Tensor
    ) -> Mapping[str, float]:
        """Choose alpha, beta or both, see ``search_factors``."""
        config = self._settings
        searched = [search_values(*of) for of in zip(config.search_scale, config.search_step, strict=True)]
        betas = searched[0] if config.beta is None else [config.beta]
        alphas = searched[1] if config.alpha is None else [config.alpha]
        features_VE = nn.functional.normalize(features_VE.to(self.keys.dtype), dim=-1)
        found = search_factors(
            zero_shot_VC.to(self.keys.dtype),
            features_VE,
            self.keys.detach(),
            self._values(),
            labels_V,
            domains_V,
            alphas,
            betas,
        )
        self.alpha.fill_(found.alpha)
        self.beta.fill_(found.beta)
        return {"alpha": found.alpha, "beta": found.beta}

    # -- the forward pass ----------------------------------------------------------------------------------------

    def _values(self) -> Tensor:
        """The classes (N, C) of the entries, one-hot."""
        return nn.functional.one_hot(self.labels, self._classes).to(self.keys.dtype)

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Logits (B, C), in the precision of the keys also under autocast."""
        zero_shot_BC = cosine_logits(features_BE, class_features_CE, scale, bias)
        with torch.autocast(features_BE.device.type, enabled=False):
            normalised_BE = nn.functional.normalize(features_BE.to(self.keys.dtype), dim=-1)
            return tip_adapter(zero_shot_BC, normalised_BE, self.keys, self._values(), self.alpha, self.beta)

    # -- weights -------------------------------------------------------------------------------------------------

    def load_state(self, state: dict[str, Tensor]) -> None:
        """As for every adapter. The cache gets the number of entries that ``state`` has.

        Raises:
            UserError: also entries of classes or domains that there are not.
        """
        labels = state.get("labels")
        wanted = len(labels) if labels is not None and labels.dim() == 1 else len(self.labels)
        if wanted == len(self.labels):
            self._load_entries(state)
            return
        other = TipAdapter(self._settings, self._classes, self.keys.detach()[:0])
        other._resize(wanted, self.keys.detach())
        other._load_entries(state)  # here all that is wrong with it is found, before anything of this adapter changes
        self._resize(wanted, self.keys.detach())
        self._load_entries(state)

    def _load_entries(self, state: dict[str, Tensor]) -> None:
        require_matching_state(self.kind, self._own_tensors(), state)
        for name, limit in (("labels", self._classes), ("domains", 2**31)):
            numbers = state[name]
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
                raise UserError(
                    f"the tensors do not fit this '{self.kind}' adapter: {name} holds {int(numbers.min())} to "
                    f"{int(numbers.max())}, which are not from 0 to {limit - 1}; nothing was loaded"
                )
        super().load_state(state)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        raise UserError(
            "a 'tip_adapter' adds a cache to zero-shot classification and has no zero-shot weights w0, so there is no "
            "w0 + alpha (w1 - w0) (WiSE-FT); its adapter.alpha is the factor of the cache: set a smaller one"
        )

    @classmethod
    def soup(
        cls, configs: Sequence[Config], states: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Config, dict[str, Tensor]]:
        """
        Raises:
            UserError: always.
        """
        raise UserError(
            f"'{cls.kind}' adapters cannot be averaged: each has a cache of its own training images, whose entries do "
            "not correspond"
        )
