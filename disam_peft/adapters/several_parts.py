"""An adapter that is made of several others, each of which does in a forward pass what it would do alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.interpolation import MoveTo
from disam_peft.adapters.matching_state import require_matching_state
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.base import Config
from disam_peft.errors import UserError

Value = TypeVar("Value")


class SeveralParts(Adapter):
    """The parts by name, in the order in which an image passes them. The tensors of a part are called ``PART.NAME``.

    Splits, features and weights are those of the parts together. What gives class features and logits is for the
    subclass to say.
    """

    def __init__(self, config: Config, parts: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.config = config
        self._parts = nn.ModuleDict(parts)
        self.image_split = _first([part.image_split for part in self.parts().values()])
        self.text_split = _first([part.text_split for part in self.parts().values()])

    @classmethod
    @abstractmethod
    def part_configs(cls, config: Config) -> dict[str, Config]:
        """The config of each part, by the names of the parts."""

    @classmethod
    @abstractmethod
    def part_class(cls, config: Config) -> type[Adapter]:
        """The class of the part that has this config."""

    @classmethod
    @abstractmethod
    def with_part_configs(cls, config: Config, parts: Mapping[str, Config]) -> Config:
        """``config`` with other configs of the same parts."""

    def parts(self) -> Mapping[str, Adapter]:
        return {name: part for name, part in self._parts.items() if isinstance(part, Adapter)}

    @classmethod
    def _planned(cls, config: Config) -> list[tuple[type[Adapter], Config]]:
        return [(cls.part_class(part), part) for part in cls.part_configs(config).values()]

    @classmethod
    def planned_image_split(cls, config: Config, backbone: ClipBackbone) -> int | None:
        return _first([kind.planned_image_split(part, backbone) for kind, part in cls._planned(config)])

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        return sum(kind.expected_numbers(part, backbone, classes) for kind, part in cls._planned(config))

    @classmethod
    def require_any_classes(cls, config: Config) -> None:
        for kind, part in cls._planned(config):
            kind.require_any_classes(part)

    def image_features(self, features_BE: Tensor) -> Tensor:
        for part in self.parts().values():
            features_BE = part.image_features(features_BE)
        return features_BE

    def own_term(self) -> Tensor | None:
        terms = [term for part in self.parts().values() if (term := part.own_term()) is not None]
        return torch.stack(terms).sum() if terms else None

    # -- weights -------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        return _joined({name: part.trainable() for name, part in self.parts().items()})

    def state(self) -> dict[str, Tensor]:
        return _joined({name: part.state() for name, part in self.parts().items()})

    def _own_tensors(self) -> dict[str, Tensor]:
        return _joined({name: part._own_tensors() for name, part in self.parts().items()})

    def load_state(self, state: dict[str, Tensor]) -> None:
        require_matching_state(self.kind, self._own_tensors(), state)
        for name, part in self.parts().items():
            part.load_state(_of_part(state, name))

    def detach(self, backbone: ClipBackbone) -> None:
        for part in self.parts().values():
            part.detach(backbone)

    @contextmanager
    def bypassed(self, backbone: ClipBackbone) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts().values():
                stack.enter_context(part.bypassed(backbone))
            yield

    # -- between zero-shot and trained, and means ----------------------------------------------------------------

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        """Those of every part."""
        for kind, part in cls._planned(config):
            kind.require_zero_shot_weights(part)

    def zero_shot_tensors(self, backbone: ClipBackbone, prompts: ClassPrompts) -> dict[str, Tensor]:
        self.require_zero_shot_weights(self.config)
        return _joined({name: part.zero_shot_tensors(backbone, prompts) for name, part in self.parts().items()})

    def interpolation(self, backbone: ClipBackbone, prompts: ClassPrompts) -> AbstractContextManager[MoveTo]:
        self.require_zero_shot_weights(self.config)
        return self._all_moved(backbone, prompts)

    @contextmanager
    def _all_moved(self, backbone: ClipBackbone, prompts: ClassPrompts) -> Iterator[MoveTo]:
        with ExitStack() as stack:
            moves = [stack.enter_context(part.interpolation(backbone, prompts)) for part in self.parts().values()]

            def move_to(alpha: float) -> None:
                for move in moves:
                    move(alpha)

            yield move_to

    @classmethod
    def soup(
        cls, configs: Sequence[Config], states: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Config, dict[str, Tensor]]:
        """The mean of every part, as its kind defines it."""
        of_each = [cls.part_configs(config) for config in configs]
        kinds = [" and ".join(getattr(part, "kind", "") for part in parts.values()) for parts in of_each]
        if len(different := list(dict.fromkeys(kinds))) > 1:
            raise UserError(f"'{cls.kind}' adapters of different parts ({', '.join(different)}) cannot be averaged")
        found: dict[str, Config] = {}
        means: dict[str, Mapping[str, Tensor]] = {}
        for name in of_each[0]:
            theirs, own = [parts[name] for parts in of_each], [_of_part(state, name) for state in states]
            found[name], means[name] = cls.part_class(theirs[0]).soup(theirs, own)
        return cls.with_part_configs(configs[0], found), _joined(means)

    @classmethod
    def random_start(cls, config: Config) -> str:
        return ", ".join(filter(None, (kind.random_start(part) for kind, part in cls._planned(config))))


def _first(splits: Sequence[int | None]) -> int | None:
    """Where the frozen part of a tower ends that several adapters change."""
    return min((split for split in splits if split is not None), default=None)


def _joined(parts: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    return {f"{name}.{key}": value for name, own in parts.items() for key, value in own.items()}


def _of_part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
