"""The term that the method of an adapter adds to the loss by itself, such as the pull of CLAP or the texts of a
cross-modal probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from disam_peft.objectives.anchors.base import ModelAnchor
from disam_peft.objectives.base import Outputs


@dataclass(frozen=True)
class TermSettings:
    """What an anchor has a config for, of a term that no recipe lists: it belongs to the adapter."""

    kind: str
    in_ascent: bool
    weight: float = 1.0
    """Always 1: the term has its factor in it."""


class AdapterTerm(ModelAnchor):
    """A function of the adapter's tensors alone, which counts once in a step.

    Args:
        kind: of the adapter; the name under which records show the term.
        compute: gives the term, shape (), with a graph.
        in_ascent: whether the perturbation of sam and disam climbs it too.
    """

    def __init__(self, kind: str, compute: Callable[[], Tensor], *, in_ascent: bool = True) -> None:
        super().__init__(TermSettings(kind, in_ascent))
        self._compute = compute

    def value(self, outputs: Outputs) -> Tensor:
        return self._compute()
