"""The weights of a backbone, which nobody trains: what they are, where they are, and how to tell whether they moved."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from disam_peft.backbones.fingerprint import Fingerprint, identity, weights_hash
from disam_peft.backbones.frozen_precision import FORMATS, QuantisedLinear, convert, is_quantised
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError


class FrozenWeights(ABC):
    """The part of ``ClipBackbone`` that knows weights alone; see there for the attributes."""

    _hash_of_converted: str | None = None

    model: nn.Module
    config: BackboneConfig
    base_hash: str
    fingerprint: Fingerprint

    def _freeze_weights(self) -> None:
        """Freeze, set eval mode, remember the weights and take their hash."""
        self.model.requires_grad_(False)
        self.model.eval()
        # Parameter objects, not copies: attaching an adapter renames them, but they stay the same objects.
        self._base = dict(self.model.named_parameters())
        self.base_hash = self.current_hash()

    def _convert_weights(self, layers: Iterable[str]) -> None:
        """To the precision of the config. Hash and fingerprint were taken before: they are those of the weights that
        were loaded, whatever they are rounded to. Only the formats of numbers say that, and so the identity.

        Args:
            layers: names of the Linear layers in the blocks.
        """
        precision = self.config.precision
        if precision == "float32":
            return
        convert(self.model, layers, precision, self.config.name)
        self._base = dict(self.model.named_parameters())
        self.fingerprint["number formats"] = list(FORMATS[precision])
        self._hash_of_converted = weights_hash(self._stored())

    @property
    def is_quantised(self) -> bool:
        """Whether layers of the blocks have no float weights."""
        return is_quantised(self.config.precision)

    def require_float_weights(self, what: str) -> None:
        """
        Args:
            what: what needs them, as the subject of a sentence.

        Raises:
            UserError: the weights are quantised.
        """
        if self.is_quantised:
            raise UserError(
                f"{what} needs float weights, and those of {self.config.name} are {self.config.precision}; set "
                "backbone.precision to float32 or bfloat16 (load_adapter and export take another precision than that "
                "of the training where it is named)"
            )

    @property
    def identity(self) -> str:
        """sha256, hex, over weights and fingerprint: equal exactly if equal inputs give equal features and logits."""
        return identity({"weights": self.base_hash, **self.fingerprint})

    def current_hash(self) -> str:
        """sha256 of the base weights as they are now: ``base_hash`` for as long as nobody touched them."""
        if self._hash_of_converted is None:
            return weights_hash(self._hashed_weights())
        found = weights_hash(self._stored())
        return self.base_hash if found == self._hash_of_converted else found

    def _stored(self) -> dict[str, Tensor]:
        """All frozen weights as they are kept, with the scales of those that are quantised."""
        quantised = [(name, one) for name, one in self.model.named_modules() if isinstance(one, QuantisedLinear)]
        # An adapter around a layer renames it.
        scales = {f"{name.replace('.base_layer', '')}.scale": one.get_buffer("scale") for name, one in quantised}
        return {**self._base, **scales}

    def _hashed_weights(self) -> Mapping[str, Tensor]:
        return self._base  # some families hash them in the form in which their library has them

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The frozen weights by the names they had at load, whatever adapters are attached by now."""
        return dict(self._base)

    @property
    def device(self) -> torch.device:
        return next(iter(self._base.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """That of activations in the towers."""
        return next(p.dtype for p in self._base.values() if p.is_floating_point() and p.numel() > 1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the model; returns self."""
        self.model.to(device=device, dtype=dtype)
        return self
