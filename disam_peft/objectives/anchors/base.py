"""The contract of an anchor.

Shapes in this file: B samples of a micro-batch.

How to add an anchor
--------------------
An anchor is one file, one config class, one line in a table, and its test.

1. *The config class*, in ``config/anchors.py``: ``kind: Literal["name"] = "name"`` and the settings. Add it to
   ``AnchorConfig``, the union of all anchors. There are two kinds of them:

   - A ``SampleAnchor`` has a distance for each sample. It becomes part of the loss of that sample, for DISAM's variance
     over domains too, and needs nothing more to be exact over micro-batches and processes. Its config is a
     ``BaseAnchorConfig``.
   - A ``ModelAnchor`` has one distance, in which no sample takes part. It counts once in a step, however many
     micro-batches and processes there are. Its config is a ``BaseModelAnchorConfig``.

2. *The file*, ``objectives/anchors/name_anchor.py``: a pure function of tensors, and the class that calls it. What
   zero-shot classification makes of the same images is in ``outputs.zero_shot``, without a graph.
3. *The line*, in ``ANCHORS`` of ``objectives/objective.py``: ``NameAnchorConfig: NameAnchor``.
4. *The test*: ``tests/unit/objectives/test_anchors.py`` drives every member of the table with every method and over
   unequal micro-batches; add the values and gradients of yours, against its formula written out another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from disam_peft.objectives.base import Outputs


class SampleAnchor:
    """A distance of each sample, which is added to its loss.

    Args:
        config: its settings, of the class that stands beside it in ``ANCHORS``.
    """

    needs_features: bool = False
    """Whether it reads ``Outputs.features``."""
    needs_zero_shot: bool = True
    """Whether it reads ``Outputs.zero_shot``."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, outputs: Outputs) -> Tensor:
        """The distances (B,), without the weight, with a graph."""
        raise NotImplementedError(f"{type(self).__name__} must say what the distances are")


class ModelAnchor:
    """A distance in which no sample takes part: it is added to the objective once in a step.

    Args:
        config: its settings, of the class that stands beside it in ``ANCHORS``.
    """

    needs_zero_shot: bool = False
    """Whether it reads ``Outputs.zero_shot``."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def value(self, outputs: Outputs) -> Tensor:
        """The distance, shape (), without the weight, with a graph. The same for every micro-batch of a pass."""
        raise NotImplementedError(f"{type(self).__name__} must say what the distance is")

    def remember_start(self, params: Sequence[Tensor]) -> None:
        """Called with the trained tensors where a run begins, before its first step; not after a resume."""

    def state_dict(self) -> dict[str, Any]:
        """What ``remember_start`` has kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""


Anchor = SampleAnchor | ModelAnchor
