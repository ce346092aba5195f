"""LoRA and every other method that the peft library attaches to single layers.

The classes here stand between ``peft`` and the contract of ``Adapter``: exact targets instead of suffix matching,
strict loading, merging into a float32 copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.interpolation import MoveTo, require_alpha, tensors_on_a_line, wise_ft
from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.adapters.peft.attaching import attach, require_exact, restore
from disam_peft.adapters.peft.lora_soup import lora_soup
from disam_peft.adapters.peft.methods import METHODS, find_method
from disam_peft.adapters.peft.norms import frozen_norms, widen_norms
from disam_peft.adapters.peft.peft_config import PEFT_CONFIG_NAME, peft_config_json, require_same_config
from disam_peft.adapters.peft.plan import method_name, plan
from disam_peft.adapters.peft.sparse import require_indices
from disam_peft.adapters.peft.targets import frozen_blocks, only_outside_blocks
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone, Target
from disam_peft.backbones.blocks import AFFINE
from disam_peft.common.strict_json import json_bytes
from disam_peft.config.base import Config
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import Notice, UserError

_AVERAGED = ", ".join(["lora", *(name for name, method in METHODS.items() if method.averages)])
_PREFIX = "base_model.model."  # what peft puts before a module's name in a checkpoint


class PeftAdapter(Adapter):
    """A method of peft on chosen towers, blocks and projections.

    Gradients are the derivatives of the loss, with one exception by design: DoRA holds its weight norm constant
    (Liu et al. 2024, arXiv 2402.09353, section 4.3).
    """

    kind = "peft"

    def __init__(self, config: Config, peft_model: nn.Module, peft_json: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.peft_model = peft_model
        self.peft_json = peft_json
        """The content of ``adapter_config.json`` for this adapter; JSON types only."""
        self._alpha = 1.0
        """Where the layers are blended at, see ``_blended_layers``."""

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        assert isinstance(config, LoraAdapterConfig | PeftAdapterConfig)
        return frozen_blocks(backbone, plan(config, backbone)[0], "image")

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> PeftAdapter:
        """Attach to ``backbone.model``; on any error the model is left as it was."""
        assert isinstance(config, LoraAdapterConfig | PeftAdapterConfig)
        targets, peft_config = plan(config, backbone)
        for tower, names in only_outside_blocks(targets).items():
            warnings.warn(
                f"in the {tower} tower of {backbone.config.name} nothing of its blocks is adapted, only "
                f"{', '.join(names)}",
                Notice,
                stacklevel=2,
            )
        # All that is read off the plain model comes first: attaching replaces its layers.
        image_split, text_split = (frozen_blocks(backbone, targets, tower) for tower in ("image", "text"))
        peft_json = peft_config_json(peft_config, backbone)
        before = {name: module for name, module in backbone.model.named_modules() if name}
        try:
            adapter = cls(config, attach(backbone, peft_config, config.seed), peft_json)
            layers = adapter._layers()
            require_exact({target.name for target in targets}, {name for name, _ in layers}, backbone)
            widen_norms(layers)
            adapter.begin(backbone, targets)
            if find_method(method_name(config)).affine and not peft_config.lora_dropout:
                for _, layer in layers:
                    setattr(layer, AFFINE, True)
        except BaseException:
            restore(backbone.model, before)
            raise
        adapter.image_split, adapter.text_split = image_split, text_split
        return adapter

    def begin(self, backbone: ClipBackbone, targets: list[Target]) -> None:
        """Give the weights another start than that of peft; called at the end of ``build``."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """By the names of the checkpoint, without peft's prefix."""
        return {_checkpoint_name(name): p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> PeftAdapter:
        """Dropout of the adapter's own layers follows ``mode``; the frozen layers inside them stay as they are."""
        self.training = mode
        for _, layer in self._layers():
            layer.training = mode
            for name, child in layer.named_children():
                if name != "base_layer":
                    child.train(mode)
        return self

    def state(self) -> dict[str, Tensor]:
        """The names that ``peft.PeftModel.from_pretrained`` expects."""
        self._require_unmerged()
        return {name: tensor.detach().clone() for name, tensor in self._own_tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        self._require_unmerged()
        own = self._own_tensors()
        require_matching_state(self.kind, own, state)
        require_indices(dict(self._layers()), state)
        scale = self._scale_tensors()
        set_peft_model_state_dict(self.peft_model, {name: state[name] for name in own if name not in scale})
        for name, tensor in scale.items():
            tensor.copy_(state[name])

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """The weights of the backbone."""

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        assert isinstance(self.config, LoraAdapterConfig | PeftAdapterConfig)
        name = method_name(self.config)
        method = find_method(name)
        if method.layers == "norm":
            return frozen_norms(self._layers(), self.trainable())
        if not method.linear_in:
            raise UserError(
                f"a '{name}' adapter cannot be written at another alpha: the weights of the model are not linear in "
                "its tensors, so w0 + alpha (w1 - w0) is no adapter of this kind; export merged weights (--to merged)"
            )
        return {
            name: torch.full_like(parameter, method.nothing_at)
            for name, parameter in self.trainable().items()
            if not set(method.linear_in).isdisjoint(name.split("."))
        }

    def interpolation(self, backbone: ClipBackbone, prompts: ClassPrompts) -> AbstractContextManager[MoveTo]:
        assert isinstance(self.config, LoraAdapterConfig | PeftAdapterConfig)
        method = find_method(method_name(self.config))
        if method.linear_in or method.layers == "norm":
            return super().interpolation(backbone, prompts)
        return self._blended_layers(backbone)

    @contextmanager
    def _blended_layers(self, backbone: ClipBackbone) -> Iterator[MoveTo]:
        """As ``interpolation``, for weights that are not linear in the tensors. Every layer is linear in its weights,
        so ``(1 - alpha)`` times the frozen layer's output and ``alpha`` times the adapted one's is the output of a
        layer with the interpolated weights."""
        self._require_unmerged()
        hooks: list[Any] = []

        def blend(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return wise_ft(layer.base_layer(*inputs), output, self._alpha)

        def move_to(alpha: float) -> None:
            require_alpha(alpha)
            self._alpha = alpha
            while hooks:
                hooks.pop().remove()
            if alpha != 1:
                hooks.extend(layer.register_forward_hook(blend) for _, layer in self._layers())

        with tensors_on_a_line(self.trainable(), self._zero_shot_scale(backbone)) as move_scale:

            def move_all(alpha: float) -> None:
                move_to(alpha)
                move_scale(alpha)

            try:
                yield move_all
            finally:
                move_to(1.0)

    def detach(self, backbone: ClipBackbone) -> None:
        restore(backbone.model, {name: layer.get_submodule("base_layer") for name, layer in self._layers()})

    @contextmanager
    def bypassed(self, backbone: ClipBackbone) -> Iterator[None]:
        # The plain layers stand in the places of the adapted ones. (peft's own switch leaves the adapted layer in the
        # way, with which a block may compute along another path, and takes requires_grad from the trained weights.)
        self._require_unmerged()
        layers = dict(self._layers())
        try:
            for name, layer in layers.items():
                backbone.model.set_submodule(name, layer.get_submodule("base_layer"))
            yield
        finally:
            for name, layer in layers.items():
                backbone.model.set_submodule(name, layer)

    def merged(self, backbone: ClipBackbone) -> nn.Module:
        plain = self._folded(backbone, torch.promote_types(backbone.dtype, torch.float32))
        as_loaded = {**backbone.base_parameters(), **dict(backbone.model.named_buffers())}
        for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
            # a copy of our own that nobody holds yet; only its dtype changes, which copy_ could not do
            tensor.data = tensor.data.to(as_loaded[name].dtype)
        if self.trained_scale is not None:
            self.trained_scale.write_into(plain)
        plain.requires_grad_(False)
        return plain.eval()

    def merged_weights(self, backbone: ClipBackbone) -> dict[str, Tensor]:
        return dict(self._folded(backbone, torch.float64).named_parameters())

    def _folded(self, backbone: ClipBackbone, dtype: torch.dtype) -> nn.Module:
        """A copy of the model with the adapter in its weights, computed in ``dtype``."""
        self._require_unmerged()
        backbone.require_float_weights("a merged checkpoint, or a LoRA that stands for another adapter,")
        whole = copy.deepcopy(self.peft_model)
        if dtype != backbone.dtype:
            whole.to(dtype)
        try:
            plain: nn.Module = whole.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        except ValueError as error:
            raise UserError(f"merging failed: {error}; the adapter's weights are not finite") from error
        base = backbone.base_parameters()
        for layer, _ in self._layers() if self._alpha != 1 else ():
            for part, parameter in plain.get_submodule(layer).named_parameters():
                start = base[f"{layer}.{part}"].detach().to(parameter.dtype)
                if not torch.equal(start, parameter):  # what did not change, as most biases, keeps its bits
                    with torch.no_grad():
                        parameter.copy_(wise_ft(start, parameter, self._alpha))
        return plain

    @classmethod
    def soup(
        cls, configs: Sequence[Config], states: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Config, dict[str, Tensor]]:
        """LoRA, exactly: ranks are concatenated. Of other methods those whose weights are linear in their tensors."""
        methods = {
            method_name(config) for config in configs if isinstance(config, LoraAdapterConfig | PeftAdapterConfig)
        }
        if methods == {"lora"}:
            return lora_soup(cls.kind, configs, states)
        for name in methods:
            if not find_method(name).averages:
                raise UserError(
                    f"'{name}' adapters cannot be averaged: the weights of the model are not linear in their tensors, "
                    f"so the mean of these is no mean of models; average runs of {_AVERAGED}"
                )
        return super().soup(configs, states)

    companion_names = (PEFT_CONFIG_NAME,)

    def companion_files(self, backbone: ClipBackbone) -> dict[str, bytes]:
        """For a transformers model, what ``peft.PeftModel.from_pretrained`` reads beside the tensors."""
        return {PEFT_CONFIG_NAME: json_bytes(self.peft_json)} if backbone.family == "transformers" else {}

    @classmethod
    def check_companion(cls, path: Path, config: Config, backbone: ClipBackbone) -> None:
        assert isinstance(config, LoraAdapterConfig | PeftAdapterConfig)
        require_same_config(path, peft_config_json(plan(config, backbone)[1], backbone))

    def _layers(self) -> list[tuple[str, nn.Module]]:
        """The adapted layers by their names in ``backbone.model``."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = list(self.peft_model.get_submodule("base_model.model").named_modules())
        adapted = {name for name, module in modules if isinstance(module, BaseTunerLayer)}
        return [(name, module) for name, module in modules if name in adapted]

    def _scale_tensors(self) -> dict[str, Tensor]:
        prefix = "trained_scale."
        return {} if self.trained_scale is None else self.trained_scale.state_dict(prefix=prefix)

    def _own_tensors(self) -> dict[str, Tensor]:
        return self._views() | self._scale_tensors()

    def _views(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LoRA tensor.*invalid shape.*lora_B.bias")  # a bias has one dim
            # "auto" would look the base model up on the hub to see whether its vocabulary was changed.
            return get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)

    def _require_unmerged(self) -> None:
        merged = [name for name, layer in self._layers() if getattr(layer, "merged", False)]
        if merged:
            raise UserError(
                f"the adapter is merged into the live model ({len(merged)} layers, first {merged[0]}); call "
                "peft's unmerge_adapter() first (export merges a copy, never the live model)"
            )


def _checkpoint_name(name: str) -> str:
    """``peft_model.base_model.model.visual.x.lora_A.default.weight`` -> ``visual.x.lora_A.weight``."""
    inner = name.removeprefix("peft_model.").removeprefix(_PREFIX)
    return ".".join(part for part in inner.split(".") if part != "default")
