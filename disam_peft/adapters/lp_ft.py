"""LP-FT: a linear probe first, then an adapter of the image tower from it, head and adapter together.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", arXiv 2202.10054.
Shapes in this file: B images, M training images, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from disam_peft.adapters.averaging import mean_of_tensors, require_same_shape
from disam_peft.adapters.base import Adapter
from disam_peft.adapters.clip_adapter import ClipAdapter
from disam_peft.adapters.full import FullAdapter
from disam_peft.adapters.interpolation import MoveTo
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.logistic_regression import fit_head
from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.adapters.peft.lora_adapter import LoraAdapter
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.adapters import (
    ClipAdapterConfig,
    FullConfig,
    LinearProbeConfig,
    LoraAdapterConfig,
    LpFtConfig,
    PeftAdapterConfig,
)
from disam_peft.config.base import Config
from disam_peft.errors import UserError

INNER: dict[type[Config], type[Adapter]] = {
    LoraAdapterConfig: LoraAdapter,
    PeftAdapterConfig: PeftAdapter,
    FullConfig: FullAdapter,
    ClipAdapterConfig: ClipAdapter,
}
"""What may stand under a head: config class -> adapter."""

Value = TypeVar("Value")
_INNER, _HEAD = "adapter.", "head."
"""What the names of tensors begin with."""


class LpFtAdapter(Adapter):
    """A linear head on the features of an adapted image tower.

    Before the first step, ``fit_start`` fits the head to the features of the training images, with the tower as it is
    then. The steps train both. The first logits of training are those of the fitted head.
    """

    kind = "lp_ft"

    def __init__(self, config: LpFtConfig, inner: Adapter, head: LinearProbeAdapter) -> None:
        super().__init__()
        self.config = config
        self.inner, self.head = inner, head
        self.image_split = inner.image_split

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        config = _checked(config)
        return INNER[type(config.adapter)].planned_image_split(config.adapter, backbone)

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> LpFtAdapter:
        config = _checked(config)
        of_head = LinearProbeConfig(bias=config.probe.bias)
        head = LinearProbeAdapter.build(of_head, backbone, prompts)
        if config.probe.init == "zeros":
            empty_CE, empty_C = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
            head = LinearProbeAdapter(of_head, empty_CE, empty_C)
        return cls(config, INNER[type(config.adapter)].build(config.adapter, backbone, prompts), head)

    def fit_start(self, features_ME: Tensor, labels_M: Tensor, domains_M: Tensor) -> Mapping[str, float]:
        """Fit the head; the domains of the images do not matter."""
        assert isinstance(self.config, LpFtConfig)
        probe = self.config.probe
        features_ME = self.inner.image_features(features_ME).to(self.head.weight.dtype)
        fitted = fit_head(
            nn.functional.normalize(features_ME, dim=-1),
            labels_M,
            self.head.weight,
            self.head.bias,
            train_bias=probe.bias,
            weight_decay=probe.weight_decay,
            steps=probe.steps,
        )
        self.head.weight.copy_(fitted.weight_CE)
        self.head.bias.copy_(fitted.bias_C)
        return {"training_loss": fitted.loss, "training_top1": fitted.top1, "probe_steps": fitted.steps}

    # -- the forward pass ----------------------------------------------------------------------------------------

    def image_features(self, features_BE: Tensor) -> Tensor:
        return self.inner.image_features(features_BE)

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return self.head.logits(features_BE, class_features_CE, scale, bias)

    @property
    def head_bias(self) -> Tensor | None:
        return self.head.head_bias

    # -- weights -------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Those of the adapter as ``adapter.NAME``, and the head's as ``head.weight`` and ``head.bias``."""
        return _joined(self.inner.trainable(), self.head.trainable())

    def state(self) -> dict[str, Tensor]:
        return _joined(self.inner.state(), self.head.state())

    def _own_tensors(self) -> dict[str, Tensor]:
        return _joined(self.inner._own_tensors(), self.head._own_tensors())

    def load_state(self, state: dict[str, Tensor]) -> None:
        require_matching_state(self.kind, self._own_tensors(), state)
        self.inner.load_state(_part(state, _INNER))
        self.head.load_state(_part(state, _HEAD))

    def detach(self, backbone: ClipBackbone) -> None:
        self.inner.detach(backbone)

    def bypassed(self, backbone: ClipBackbone) -> AbstractContextManager[object]:
        return self.inner.bypassed(backbone)

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        config = _checked(config)
        below = INNER[type(config.adapter)].expected_numbers(config.adapter, backbone, classes)
        return below + classes * backbone.embed_dim

    # -- between zero-shot and trained, and means ----------------------------------------------------------------

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The zero-shot head and the weights of the backbone, also for a head that started from zeros."""
        config = _checked(config)
        INNER[type(config.adapter)].require_zero_shot_weights(config.adapter)

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        self.require_zero_shot_weights(self.config)
        try:
            below = self.inner.zero_shot_tensors(backbone, prompts)
        except UserError as error:  # it would advise a merged checkpoint, in which the head has no place
            raise UserError(
                f"the '{self.inner.kind}' adapter below the head cannot be written at another alpha: the weights of "
                "the model are not linear in its tensors; disam-peft frontier and evaluate --alpha compute them "
                "without writing them, or train lora or full below the head"
            ) from error
        return _joined(below, self.head.zero_shot_tensors(backbone, prompts))

    def interpolation(self, backbone: ClipBackbone, prompts: ClassPrompts) -> AbstractContextManager[MoveTo]:
        self.require_zero_shot_weights(self.config)
        return self._both_moved(backbone, prompts)

    @contextmanager
    def _both_moved(self, backbone: ClipBackbone, prompts: ClassPrompts) -> Iterator[MoveTo]:
        with (
            self.inner.interpolation(backbone, prompts) as move_below,
            self.head.interpolation(backbone, prompts) as move_head,
        ):

            def move_to(alpha: float) -> None:
                move_below(alpha)
                move_head(alpha)

            yield move_to

    @classmethod
    def soup(
        cls, configs: Sequence[Config], states: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Config, dict[str, Tensor]]:
        """The mean of the heads, and the mean of the adapters below as their kind defines it."""
        checked = [_checked(config) for config in configs]
        below = [config.adapter for config in checked]
        if len(kinds := {type(config) for config in below}) > 1:
            raise UserError(
                f"'{cls.kind}' adapters of different kinds below the head "
                f"({', '.join(dict.fromkeys(config.kind for config in below))}) cannot be averaged"
            )
        heads = [_part(state, _HEAD) for state in states]
        require_same_shape(cls.kind, [LinearProbeConfig(bias=config.probe.bias) for config in checked], heads)
        found, state = INNER[kinds.pop()].soup(below, [_part(state, _INNER) for state in states])
        config = checked[0].model_copy(update={"adapter": found})
        return config, _joined(state, mean_of_tensors(cls.kind, heads))

    @classmethod
    def random_start(cls, config: Config) -> str:
        config = _checked(config)
        return INNER[type(config.adapter)].random_start(config.adapter)

    def merged(self, backbone: ClipBackbone) -> nn.Module:
        """
        Raises:
            UserError: always; a CLIP has no place for the head.
        """
        raise UserError(
            f"a '{self.kind}' adapter classifies by a head of its own, for which a checkpoint of CLIP has no place; "
            "use --to peft, which writes head and adapter for disam_peft.load_adapter"
        )


def _checked(config: Config) -> LpFtConfig:
    assert isinstance(config, LpFtConfig)
    return config


def _joined(below: Mapping[str, Value], head: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{_INNER}{name}": value for name, value in below.items()} | {
        f"{_HEAD}{name}": value for name, value in head.items()
    }


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
