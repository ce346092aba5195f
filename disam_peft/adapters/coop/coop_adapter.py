"""CoOp: the words around the class name are learned (Zhou et al. 2022, arXiv 2109.01134).

A prompt is [start] ctx_1 ... ctx_M name . [end]. Only the context vectors are trained; the embeddings of the name and
of the markers are frozen and looked up once. In a causal text tower, the tokens that all prompts share (the start
marker and a context that is the same for all classes) are computed once for all classes.

Shapes in this file: C classes, L tokens, M context tokens, W token width, E embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disam_peft.adapters.base import Adapter, Autocast
from disam_peft.adapters.class_features_file import class_features_file
from disam_peft.adapters.coop.class_chunks import plan_chunks
from disam_peft.adapters.coop.context_start import ContextStart, context_start
from disam_peft.adapters.prompts import ClassPrompts, FrozenText, ensemble
from disam_peft.backbones.added_tokens import DeepTokens
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.packed_prompts import PackedPrompts
from disam_peft.config.base import Config
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError


class CoOpAdapter(Adapter):
    """Context vectors (M, W), or (C, M, W) with one context per class; float32 also where the backbone is half.

    Args:
        context: their initial values.
        chunks: the classes in order. If there are several chunks, no activations are kept; backward computes the chunks
            again, one after the other.
    """

    kind = "coop"
    replaces_class_prompts = True

    @classmethod
    def random_start(cls, config: Config) -> str:
        assert isinstance(config, CoOpConfig)
        return "the context" if config.init is None else ""

    def __init__(self, config: CoOpConfig, context: Tensor, chunks: list[_Chunk]) -> None:
        super().__init__()
        self.config = config
        self.context = nn.Parameter(context)
        self._chunks = nn.ModuleList(chunks)
        self._replay: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def build(cls, config: Config, backbone: ClipBackbone, prompts: ClassPrompts) -> CoOpAdapter:
        """Changes nothing in the backbone.

        Raises:
            UserError: a prompt that does not fit the context length, or ``context_tokens`` unlike the initial words.
        """
        assert isinstance(config, CoOpConfig)
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)
        return cls.from_start(config, backbone, context_start(config, backbone, prompts.class_names, generator))

    @classmethod
    def from_start(cls, config: CoOpConfig, backbone: ClipBackbone, start: ContextStart) -> CoOpAdapter:
        """The adapter of prompts that are laid out already."""
        tokens_CL, first, behind = start.tokens_CL, start.first, start.first + start.length
        shared = first if config.class_specific else behind + start.kept
        plan = plan_chunks(backbone, tokens_CL, shared, config.memory_budget_gb)
        before_CSW, after_CLW = start.embeddings_CLW[:, :first], start.embeddings_CLW[:, behind:]
        chunks = [
            _Chunk(
                tokens_CL[part],
                before_CSW[part],
                after_CLW[part],
                backbone.pack_prompts(tokens_CL[part], shared),
                start.kept,
                plan.recomputed_blocks,
            )
            for part in plan.chunks
        ]
        return cls(config, start.context, chunks)

    @classmethod
    def require_zero_shot_weights(cls, config: Config) -> None:
        raise UserError(
            "a 'coop' adapter learns a prompt in place of the templates and has no zero-shot weights w0, so there is "
            "no w0 + alpha (w1 - w0) (WiSE-FT); evaluate it as it was trained"
        )

    @classmethod
    def expected_numbers(cls, config: Config, backbone: ClipBackbone, classes: int) -> int:
        assert isinstance(config, CoOpConfig)
        # At least one context token. A context for all classes is bounded by the prompt's length.
        return classes * backbone.token_width if config.class_specific else 0

    def exported_files(self, class_names: tuple[str, ...], class_features: Callable[[], Tensor]) -> dict[str, bytes]:
        """The class features (C, E) that the prompts came to."""
        return class_features_file(class_names, class_features())

    def class_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Normalised class features (C, E) of the learned prompts; the templates play no part."""
        return ensemble(self.prompt_features(backbone, text), templates=1)

    def prompt_features(self, backbone: ClipBackbone, text: FrozenText) -> Tensor:
        """Features (C, E) of the learned prompts, not normalised."""
        if self._replay is not None and torch.is_grad_enabled():
            return self._replay(self.context)
        return self.features_with(backbone, None)

    def features_with(self, backbone: ClipBackbone, deep: DeepTokens | None) -> Tensor:
        """As ``prompt_features``, where ``deep`` has what takes the place of the context in later blocks."""
        features = []
        for chunk, context in zip(self._chunks, self._contexts(), strict=True):
            run = partial(chunk, backbone, deep=deep)
            if len(self._chunks) > 1:
                # The frozen tower is in eval mode: there is no dropout whose random state would have to be kept.
                features.append(checkpoint(run, context, use_reentrant=False, preserve_rng_state=False))
            else:
                features.append(run(context))
        return torch.cat(features)

    def captured(self, backbone: ClipBackbone, autocast: Autocast) -> AbstractContextManager[object]:
        """Records the text side on a GPU if all classes go through the tower at once and nothing is recomputed.

        The prompts need many small kernels, always of the same shapes, and the host takes longer to launch them than
        the device takes to run them.
        """
        first, *more = (chunk for chunk in self._chunks if isinstance(chunk, _Chunk))
        if not self.context.is_cuda or first.packed is None or more or first.recomputed_blocks:
            return nullcontext()
        try:
            return _Replaying(self, _recorded(partial(first, backbone), self.context, autocast))
        except RuntimeError as error:  # no memory for it, or an operation that cannot be recorded
            warnings.warn(
                f"the prompts could not be recorded as CUDA graphs and are launched one by one, with the same result "
                f"but slower: {str(error).splitlines()[0]}",
                stacklevel=4,
            )
            return nullcontext()

    def _contexts(self) -> tuple[Tensor, ...]:
        """The context of each chunk."""
        if self.context.ndim == 2:
            return (self.context,) * len(self._chunks)
        counts: Any = [chunk.classes for chunk in self._chunks]
        return self.context.split(counts)


class _Chunk(nn.Module):
    """Some of the classes, which go through the text tower together.

    Args:
        before_CSW, after_CLW: embeddings of the tokens before the context and after it.
        packed: the layout of these prompts if the tower can run their shared tokens once, otherwise None.
        kept: tokens behind a context for all classes that all prompts share too.
    """

    tokens_CL: Tensor
    before_CSW: Tensor
    after_CLW: Tensor

    def __init__(
        self,
        tokens_CL: Tensor,
        before_CSW: Tensor,
        after_CLW: Tensor,
        packed: PackedPrompts | None,
        kept: int,
        recomputed_blocks: int,
    ) -> None:
        super().__init__()
        self.classes, self.packed, self.recomputed_blocks = len(tokens_CL), packed, recomputed_blocks
        self.kept = kept
        tensors = {"tokens_CL": tokens_CL, "before_CSW": before_CSW, "after_CLW": after_CLW}
        for name, tensor in tensors.items():
            # Not persistent, because they follow from the backbone and the class names. Copies, because a view would
            # keep the tensors of all classes in memory.
            self.register_buffer(name, tensor.clone(), persistent=False)

    def forward(self, backbone: ClipBackbone, context: Tensor, deep: DeepTokens | None = None) -> Tensor:
        """Context (M, W), or (C, M, W), to features (C, E), not normalised."""
        context, own = context.to(self.before_CSW.dtype), context.ndim == 3
        if self.packed is None:
            context_CMW = context if own else context.expand(self.classes, -1, -1)
            embeddings_CLW = torch.cat([self.before_CSW, context_CMW, self.after_CLW], dim=1)
            with nullcontext() if deep is None else deep.placed_in(backbone.blocks("text")):
                return backbone.encode_text_embeddings(embeddings_CLW, self.tokens_CL)
        prefix_PW, suffix_CLW = self.before_CSW[0], self.after_CLW
        if own:
            suffix_CLW = torch.cat([context, suffix_CLW], dim=1)
        else:
            prefix_PW = torch.cat([prefix_PW, context, suffix_CLW[0, : self.kept]])
            suffix_CLW = suffix_CLW[:, self.kept :]
        return backbone.encode_packed_prompts(
            prefix_PW, self.packed.pack(suffix_CLW), self.packed, self.recomputed_blocks, deep
        )


class _Replaying(AbstractContextManager[None]):
    """A context, to be opened as often as needed, in which the adapter replays its recording instead of computing."""

    def __init__(self, adapter: CoOpAdapter, replay: Callable[[Tensor], Tensor]) -> None:
        self._adapter, self._replay = adapter, replay

    def __enter__(self) -> None:
        self._adapter._replay = self._replay

    def __exit__(self, *_: object) -> None:
        self._adapter._replay = None


def _recorded(function: Callable[[Tensor], Tensor], context: Tensor, autocast: Autocast) -> Callable[[Tensor], Tensor]:
    """``function`` and its derivative, recorded as CUDA graphs for contexts of this shape and type.

    Each forward may have one backward, before the next forward, as in the passes of a step: both graphs use the same
    memory, and the next forward would overwrite what the backward needs.
    """
    kind = context.device.type
    with autocast():
        active, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # Without autocast's cache: it would hold what belongs to the graph's own memory.
    with torch.autocast(kind, dtype, enabled=active, cache_enabled=False):
        sample = context.detach().clone().requires_grad_()
        with warnings.catch_warnings():
            # torch warms up on one stream and records on another, and then warns of it
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
            graphed: Any = torch.cuda.make_graphed_callables(function, (sample,))

    def replay(context: Tensor) -> Tensor:
        # Multiplied by one, so that backward returns a tensor of its own and not the one that the next replay fills.
        output = graphed(1.0 * context)
        times: list[None] = []

        def once(gradient: Tensor) -> Tensor:
            if times:
                raise RuntimeError("what was recorded has one backward for each forward; compute it without captured()")
            times.append(None)
            return gradient

        output.register_hook(once)
        return output

    return replay
