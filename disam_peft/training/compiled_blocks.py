"""Transformer blocks through torch.compile, for the steps of a run and for nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.errors import UserError

# Blocks share their code, and each kind of block is a graph of its own: frozen and adapted ones, with and without a
# graph, in either tower, and with any number of samples after the second.
GRAPHS = 64


class CompiledBlocks:
    """Blocks that run compiled inside of ``with``, and as they are outside: validations, stores and exports then have
    the numbers that they have without it.

    Each kind of block is compiled once, the first time it runs. The function is the same up to rounding.

    Args:
        backend: of torch.compile.

    Raises:
        UserError: on leaving, where torch could not compile.
    """

    def __init__(self, blocks: Sequence[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
        self._blocks: Sequence[Any] = blocks
        self._calls = []
        self._limit: Any = None
        for block in self._blocks:
            block.compile(backend=backend)
            # There is no public way to switch it off again.
            self._calls.append(block._compiled_call_impl)
            block._compiled_call_impl = None

    @classmethod
    def of(cls, classifier: ClipClassifier) -> CompiledBlocks:
        """Those of the image tower, and of the text tower where it is trained."""
        blocks = classifier.backbone.blocks("image")
        if classifier.adapter is not None and classifier.adapter.text_split is not None:
            blocks = [*blocks, *classifier.backbone.blocks("text")]
        if not blocks:
            warnings.warn(
                f"train.compile=true does nothing for {classifier.backbone.config.name}: its image tower has no "
                "transformer blocks",
                stacklevel=3,
            )
        return cls(blocks)

    def __enter__(self) -> None:
        self._limit = torch._dynamo.config.patch(recompile_limit=GRAPHS)
        self._limit.__enter__()
        for block, call in zip(self._blocks, self._calls, strict=True):
            block._compiled_call_impl = call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._blocks:
            block._compiled_call_impl = None
        self._limit.__exit__(kind, error, trace)
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            cause = getattr(error, "inner_exception", error)
            first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise UserError(
                f"train.compile=true, but torch could not compile the model here: {first}; it needs a C++ compiler, "
                "and Triton on a GPU. Set train.compile=false: the result is the same, only slower"
            ) from error
