"""Training the weights of the towers themselves, all of them or a part."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, parameter_dtype
from disam_peft.adapters.manifest import MAX_TENSOR_BYTES
from disam_peft.adapters.peft.targets import block_indices, tower_blocks
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import BEFORE_STEM, ClipBackbone, TowerName, TowerParameter
from disam_peft.backbones.blocks import STANDS_FOR
from disam_peft.config.base import Config
from disam_peft.config.full_adapter import FullConfig
from disam_peft.errors import UserError

_FROZEN = "weights_before_training"
"""Name of a module of ``backbone.model`` that keeps the frozen weights while trained ones stand in their places."""

_KEY_BIAS = re.compile(r"k_proj\.bias$|^text_model\..*\.self\.key\.bias$")
"""It adds the same number to every score of a query, which the softmax takes away again."""

_TOKEN_TABLE = re.compile(r"token_embedding\b|word_embeddings\b")

_WIDE = "_unrounded"


class FullAdapter(Adapter):
    """Float32 copies of weights of the towers, trained in the places of the frozen ones.

    The frozen weights stay what they are, beside the model. A backbone in half precision computes with the trained
    weights rounded to its own precision, as it did with its own, so that training starts at zero-shot, bit for bit.
    The copies have the names of the frozen weights (``ClipBackbone.base_parameters``) and are saved as they are, not as
    differences: a difference in float32 would not always give back the same weights.
    """

    kind = "full"

    def __init__(self, config: FullConfig, trained: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.config = config
        for name, parameter in trained.items():
            _register(self, name, parameter)

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        assert isinstance(config, FullConfig)
        return _split(backbone, chosen_parameters(config, backbone), "image")

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        assert isinstance(config, FullConfig)
        base = backbone.base_parameters()
        return sum(base[one.name].numel() for one in _of_all(chosen_parameters(config, backbone)))

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> FullAdapter:
        """Put the copies in the places of the frozen weights; on any error the model is left as it was."""
        assert isinstance(config, FullConfig)
        chosen, base = chosen_parameters(config, backbone), backbone.base_parameters()
        dtype = parameter_dtype(backbone)
        names = [one.name for one in _of_all(chosen)]
        _require_file_size(names, base, dtype)
        adapter = cls(config, {name: nn.Parameter(base[name].detach().to(dtype, copy=True)) for name in names})
        adapter.image_split, adapter.text_split = (_split(backbone, chosen, tower) for tower in ("image", "text"))
        frozen = nn.Module()
        for name in names:
            _register(frozen, name, base[name])
        backbone.model.add_module(_FROZEN, frozen)  # in the model, so that they move with it
        adapter._put_in(backbone)
        return adapter

    def detach(self, backbone: ClipBackbone) -> None:
        self._put_back(backbone)
        del backbone.model._modules[_FROZEN]

    def _weights(self) -> dict[str, nn.Parameter]:
        """The trained weights of the towers."""
        return {name: p for name, p in self.trainable().items() if not name.startswith("trained_scale.")}

    def _put_back(self, backbone: ClipBackbone) -> None:
        for place in reversed(_places(backbone, self._weights())):  # each undoes the class that it gave its module
            place.set(place.frozen)

    def _put_in(self, backbone: ClipBackbone) -> None:
        for place in _places(backbone, self._weights()):
            place.set(place.trained)

    @contextmanager
    def bypassed(self, backbone: ClipBackbone) -> Iterator[None]:
        self._put_back(backbone)
        try:
            yield
        finally:
            self._put_in(backbone)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The weights of the backbone."""

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        base = backbone.base_parameters()
        return {name: base[name].detach().to(trained.dtype) for name, trained in self._weights().items()}

    @torch.no_grad()
    def merged(self, backbone: ClipBackbone) -> nn.Module:
        with self.bypassed(backbone):
            plain = copy.deepcopy(backbone.model)
        del plain._modules[_FROZEN]
        places = dict(plain.named_parameters())
        for name, trained in self._weights().items():
            places[name].copy_(trained)  # rounded where the backbone is in half precision
        if self.trained_scale is not None:
            self.trained_scale.write_into(plain)
        return plain

    def merged_weights(self, backbone: ClipBackbone) -> dict[str, Tensor]:
        return dict(self._weights())

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """
        Raises:
            UserError: always; peft has no format for it.
        """
        raise UserError(
            "a 'full' adapter is the weights of the model itself, for which peft has no format; use --to merged, which "
            "writes a checkpoint that the model's own library loads, or --to lora for the nearest LoRA of a rank"
        )


def chosen_parameters(config: FullConfig, backbone: ClipBackbone) -> dict[TowerName, list[TowerParameter]]:
    """The weights that a config trains, for each of its towers, in the order of the model; touches nothing.

    Raises:
        UserError: blocks or parts that a tower does not have, or a tower of which nothing is chosen.
    """
    chosen: dict[TowerName, list[TowerParameter]] = {}
    for tower in dict.fromkeys(config.towers):
        is_chosen = _rule(config, backbone, tower)
        parameters = backbone.tower_parameters(tower)
        chosen[tower] = [one for one in parameters if not _KEY_BIAS.search(one.name) and is_chosen(one)]
        if not chosen[tower]:
            parts = ", ".join(dict.fromkeys(one.part for one in parameters))
            raise UserError(
                f"the settings choose nothing of the {tower} tower of {backbone.config.name} (it has: {parts}); choose "
                f"more of it, or leave {tower} out of towers"
            )
    return chosen


def _rule(config: FullConfig, backbone: ClipBackbone, tower: TowerName) -> Callable[[TowerParameter], bool]:
    """Which weights of a tower are trained."""
    count = tower_blocks(backbone, tower)
    blocks, norms, biases = (
        [] if some == "none" else block_indices(backbone, tower, some)
        for some in (config.blocks, config.norms, config.biases)
    )
    everything = config.blocks == "all"
    if count == 0 and (config.projection is not None or config.stem is not None):
        raise UserError(
            f"the {tower} tower of {backbone.config.name} has no separate stem and projection; leave out stem and "
            "projection and use blocks: all, norms: all or biases: all"
        )
    stem = everything if config.stem is None else config.stem
    projection = everything if config.projection is None else config.projection

    def is_chosen(one: TowerParameter) -> bool:
        is_bias = one.name.rpartition(".")[2].endswith("bias")
        if one.part in ("whole", "stem") and (
            (one.is_norm and config.norms == "all") or (is_bias and config.biases == "all")
        ):
            return True
        if one.part == "whole":
            return everything
        if one.part == "stem":
            return config.token_embedding if _TOKEN_TABLE.search(one.name) else stem
        block = count - 1 if one.block is None else one.block  # what follows the blocks counts as the last one
        if is_bias and block in biases:
            return True
        if one.part == "projection":
            return projection
        return block in blocks or (one.is_norm and block in norms)

    return is_chosen


def _split(backbone: ClipBackbone, chosen: dict[TowerName, list[TowerParameter]], tower: TowerName) -> int | None:
    """Where the frozen part of a tower ends."""
    if tower not in chosen:
        return None
    parts = {one.part for one in chosen[tower]}
    if "whole" in parts:
        return 0
    if "stem" in parts:
        return BEFORE_STEM
    return min((one.block for one in chosen[tower] if one.block is not None), default=tower_blocks(backbone, tower))


def _of_all(chosen: dict[TowerName, list[TowerParameter]]) -> list[TowerParameter]:
    return [one for parameters in chosen.values() for one in parameters]


def _require_file_size(names: Sequence[str], base: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
    size = sum(base[name].numel() for name in names) * dtype.itemsize
    if size > MAX_TENSOR_BYTES:
        raise UserError(
            f"the trained weights would take {size} bytes, and an adapter's file holds at most {MAX_TENSOR_BYTES}; "
            "choose fewer blocks, for example blocks: {last: 4}"
        )


@dataclass(frozen=True)
class _Place:
    """Where one weight stands in the model."""

    name: str
    owner: nn.Module
    frozen: nn.Parameter
    trained: nn.Parameter

    def set(self, parameter: nn.Parameter) -> None:
        """Let the model compute with ``parameter``, rounded to the precision of the frozen weight."""
        leaf = self.name.rpartition(".")[2]
        owner: Any = self.owner
        wide = parameter.dtype != self.frozen.dtype
        if wide:
            owner.__class__ = _rounding(type(owner), leaf, self.frozen.dtype)
        elif leaf not in owner._parameters:
            owner.__class__ = type(owner).__bases__[0]
        key = leaf + _WIDE if wide else leaf
        held = {key if name in (leaf, leaf + _WIDE) else name: one for name, one in owner._parameters.items()}
        owner._parameters.clear()
        owner._parameters.update({**held, key: parameter})  # in the order in which they were


def _rounding(kind: type[nn.Module], leaf: str, dtype: torch.dtype) -> type[nn.Module]:
    """The class ``kind`` with a parameter that is kept in a wider type and rounded whenever it is used."""
    if (kind, leaf, dtype) not in _ROUNDING:

        def rounded(self: nn.Module) -> Tensor:
            wide = self._parameters[leaf + _WIDE]
            assert wide is not None
            return wide.to(dtype)

        stands_for = getattr(kind, STANDS_FOR, kind)
        _ROUNDING[kind, leaf, dtype] = type(kind.__name__, (kind,), {leaf: property(rounded), STANDS_FOR: stands_for})
    return _ROUNDING[kind, leaf, dtype]


_ROUNDING: dict[tuple[type[nn.Module], str, torch.dtype], type[nn.Module]] = {}


def _places(backbone: ClipBackbone, trained: dict[str, nn.Parameter]) -> list[_Place]:
    base = backbone.base_parameters()
    return [
        _Place(name, backbone.model.get_submodule(name.rpartition(".")[0]), base[name], parameter)
        for name, parameter in trained.items()
    ]


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, in modules that are made for it."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(leaf, parameter)
