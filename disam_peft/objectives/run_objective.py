"""The objective of a run, with a warning for each setting that has no effect in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from disam_peft.config.objective import ObjectiveConfig
from disam_peft.objectives.anchors.adapter_term import AdapterTerm
from disam_peft.objectives.class_weights import class_weights
from disam_peft.objectives.objective import Objective


def build_objective(
    config: ObjectiveConfig,
    source_domains: Sequence[str],
    steps: int,
    *,
    adapter_term: AdapterTerm | None = None,
    labels_N: np.ndarray | Sequence[int] = (),
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> Objective:
    """The objective of a run, with a warning for each setting that has no effect in it.

    Args:
        source_domains: those that the training data holds.
        steps: of the run.
        adapter_term: what the adapter adds to the loss by itself.
        labels_N: the classes of the training samples, which index ``class_names``; for class weights.
        seed: of the run.

    Raises:
        UserError: class weights for a class that is not there.
    """
    weight_C = class_weights(config.loss, labels_N, class_names)
    objective = Objective(config, adapter_term=adapter_term, class_weight_C=weight_C, seed=seed)
    for penalty, built in zip(config.penalties, objective.penalties, strict=True):
        if len(source_domains) == 1 and penalty.is_zero_for_one_domain:
            warnings.warn(
                f"objective.penalties has {penalty.kind!r}, but there is one source domain ({source_domains[0]!r}): a "
                "penalty that compares domains is 0 then; add a domain, or remove the penalty",
                stacklevel=2,
            )
        if built.weight(steps - 1) != penalty.weight:
            warnings.warn(
                f"the penalty {penalty.kind!r} still has the weight {built.weight(steps - 1):g} in the last of "
                f"train.steps={steps} steps, and never weight={penalty.weight:g}; lower its anneal, or train longer",
                stacklevel=2,
            )
    return objective
