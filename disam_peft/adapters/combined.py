"""Several adapters at once, each at a place of its own: the towers, the image features, the classes.

Shapes in this file: B images, C classes, N prompts, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from disam_peft.adapters.base import Adapter, Autocast
from disam_peft.adapters.clip_adapter import ClipAdapter
from disam_peft.adapters.coop.coop_adapter import CoOpAdapter
from disam_peft.adapters.full import FullAdapter
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.peft.lora_adapter import LoraAdapter
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.prompts import ClassPrompts, FrozenText
from disam_peft.adapters.several_parts import SeveralParts
from disam_peft.adapters.task_res import TaskResAdapter
from disam_peft.adapters.tower_prompts.visual_prompts import VisualPromptsAdapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import CombinedConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig, LinearProbeConfig, TaskResConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig, VisualPromptsConfig
from disam_peft.errors import UserError

PARTS: dict[type[Config], type[Adapter]] = {
    LoraAdapterConfig: LoraAdapter,
    PeftAdapterConfig: PeftAdapter,
    FullConfig: FullAdapter,
    VisualPromptsConfig: VisualPromptsAdapter,
    ClipAdapterConfig: ClipAdapter,
    CoOpConfig: CoOpAdapter,
    TaskResConfig: TaskResAdapter,
    LinearProbeConfig: LinearProbeAdapter,
}
"""What may be a part, in the order in which an image passes them: config class -> adapter."""


class CombinedAdapter(SeveralParts):
    """Every part changes what it changes alone: weights in the towers, the features behind them, class features or the
    head. Context that is learned goes through the text tower as another part changes it."""

    kind = "combined"

    @classmethod
    def part_configs(cls, config: Config) -> dict[str, Config]:
        assert isinstance(config, CombinedConfig)
        order = list(PARTS)
        return {part.kind: part for part in sorted(config.parts, key=lambda part: order.index(type(part)))}

    @classmethod
    def part_class(cls, config: Config) -> type[Adapter]:
        return PARTS[type(config)]

    @classmethod
    def with_part_configs(cls, config: Config, parts: Mapping[str, Config]) -> Config:
        return config.model_copy(update={"parts": list(parts.values())})

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> CombinedAdapter:
        """What changes the towers comes last, so that an error leaves them as they were."""
        assert isinstance(config, CombinedConfig)
        planned = cls.part_configs(config)
        built = {name: cls.part_class(part).build(part, backbone, prompts) for name, part in reversed(planned.items())}
        adapter = cls(config, {name: built[name] for name in planned})
        adapter.replaces_class_prompts = adapter._text.replaces_class_prompts
        return adapter

    @property
    def _text(self) -> Adapter:
        """The part that gives class features."""
        parts = self.parts().values()
        own = (part for part in parts if isinstance(part, CoOpAdapter | TaskResAdapter))
        of_tower = (part for part in parts if part.text_split is not None)
        return next(own, None) or next(of_tower, None) or next(iter(parts))

    @property
    def _head(self) -> Adapter | None:
        return next((part for part in self.parts().values() if isinstance(part, LinearProbeAdapter)), None)

    # -- the forward pass ----------------------------------------------------------------------------------------

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        return self._text.class_features(backbone, text)

    def prompt_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        return self._text.prompt_features(backbone, text)

    def has_prompt_features(self) -> bool:
        return self._text.has_prompt_features()

    def logits(self, features_BE: Tensor, class_features_CE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if self._head is None:
            return super().logits(features_BE, class_features_CE, scale, bias)
        return self._head.logits(features_BE, class_features_CE, scale, bias)

    @property
    def head_bias(self) -> Tensor | None:
        return None if self._head is None else self._head.head_bias

    def captured(self, backbone: ClipBackbone, autocast: Autocast) -> AbstractContextManager[object]:
        """That of the prompts, unless the text tower is trained: a recording has the context as its only weights."""
        return nullcontext() if self.text_split is not None else self._text.captured(backbone, autocast)

    # -- exporting -----------------------------------------------------------------------------------------------

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """The class features, where a part changes them; those of all parts together."""
        has_own = isinstance(self._text, CoOpAdapter | TaskResAdapter)
        return self._text.exported_files(class_names, class_features) if has_own else {}

    def merged(self, backbone: ClipBackbone) -> nn.Module:
        """
        Raises:
            UserError: always, since each part would be merged as itself; says how.
        """
        names = list(self.parts())
        raise UserError(
            f"{' and '.join(names)} have no common checkpoint of CLIP: only what is in the towers has weights to merge "
            f"into. Use --to peft, which writes each part into a folder of its own; FOLDER/{names[0]} is then merged "
            "by disam_peft.export_merged(TO, disam_peft.load_adapter(FOLDER/"
            f"{names[0]}))"
        )
