"""Which state of a run is kept: named rules over source validation, and the best state so far.

A rule is a pure function. Only metrics of *source* domains ever reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.selection import SelectionConfig
from disam_peft.errors import UserError
from disam_peft.training.averages.weight_averages import RAW, WeightAverages

MetricsByDomain = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        score: decides; a larger tuple is better, compared from its first number on.
        numbers: what is recorded of it.
        loss: the mean over the source domains of their mean cross entropy, for the averages that need it; None: it is
            not known.
    """

    score: tuple[float, ...]
    numbers: Mapping[str, float]
    loss: float | None = None

    @property
    def words(self) -> str:
        """The number that one looks at: the accuracy where it is known, else what decides."""
        if "mean_top1" in self.numbers:
            return f"validation {100 * self.numbers['mean_top1']:.1f} %"
        return f"validation {self.score[0]:.4g}" if self.score else ""

    @classmethod
    def of(cls, value: Any) -> Validation:
        """From what a user's ``validate`` returned: a Validation, a number, or a list or (named) tuple of numbers."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (tuple, list)):
            score = tuple(float(number) for number in value)
            names = getattr(value, "_fields", [f"score_{number}" for number in range(len(score))])
            return cls(score, dict(zip(names, score, strict=True)))
        return cls((float(value),), {"score": float(value)})


def source_validation(metrics: MetricsByDomain, metric: str) -> tuple[float, ...]:
    """Mean over the source domains, so that a large domain does not outvote a small one. Equals are told apart by the
    other metric."""
    accuracy, likelihood = _over_domains(metrics, lambda values: sum(values) / len(values))
    return (accuracy, likelihood) if metric == "accuracy" else (likelihood, accuracy)


def worst_source(metrics: MetricsByDomain, metric: str) -> tuple[float, ...]:
    """The worst source domain. Equals are told apart by the other metric, of its own worst domain."""
    accuracy, likelihood = _over_domains(metrics, min)
    return (accuracy, likelihood) if metric == "accuracy" else (likelihood, accuracy)


Rule = Callable[[MetricsByDomain, str], tuple[float, ...]]

RULES: dict[str, Rule] = {
    "source_validation": source_validation,
    "worst_source": worst_source,
}
"""Name in ``selection.rule`` -> score of a state from the metrics of each source domain; a larger score is better."""


def validation(config: SelectionConfig, metrics: MetricsByDomain) -> Validation:
    """The metrics of a state on source validation, judged by the rule of a recipe. The number that decides is recorded
    as ``score``; the others say how the usual rules would have judged.

    Args:
        metrics: source domain -> ``top1`` and ``nll`` at least, without pooled rows.
    """
    mean_top1, negative_nll = source_validation(metrics, "accuracy")
    worst_top1, worst_negative_nll = worst_source(metrics, "accuracy")
    score = RULES[config.rule](metrics, config.metric)
    numbers = {
        "score": score[0],
        "mean_top1": mean_top1,
        "negative_nll": negative_nll,
        "worst_top1": worst_top1,
        "worst_negative_nll": worst_negative_nll,
    }
    return Validation(score, numbers, loss=-negative_nll)


def _over_domains(metrics: MetricsByDomain, pool: Callable[[list[float]], float]) -> tuple[float, float]:
    """Accuracy and negative NLL, each pooled over domains; of both, more is better."""
    return pool([values["top1"] for values in metrics.values()]), pool([-values["nll"] for values in metrics.values()])


@dataclass(frozen=True)
class KeptState:
    """The best state of the weights, or of one average of them.

    Attributes:
        step: number of optimizer steps after which it was reached.
        score: of its validation; None where nobody validated.
        tensors: the adapter's tensors by name, on the device.
    """

    step: int
    score: tuple[float, ...] | None
    tensors: dict[str, Tensor]


class BestStates:
    """Validates the weights and each of their averages when told to, and remembers the best state of each.

    Args:
        validate: scores the present state of the classifier on held-back source data, see ``Validation.of``; None:
            nobody validates, and the last state is kept.
        on_best: called in a state that is better than all before it, of whatever weights, to save it. It is told
            their name, ``raw`` or the name of the average.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        averages: WeightAverages,
        validate: Callable[[], Any] | None,
        on_best: Callable[[str], None] | None,
    ) -> None:
        self._classifier, self._averages = classifier, averages
        self._validate, self._on_best = validate, on_best
        self._best: dict[str, KeptState] = {}
        self.chosen = RAW
        """The weights whose state is the best of all so far; of equals the one that was found first."""

    def offer(self, step: int) -> dict[str, Validation]:
        """Validate the state after ``step``, with the weights themselves and with each average in their place that is
        judged there. The averages learn the loss of the weights themselves before they are judged.

        Raises:
            UserError: an average needs that loss, and the validation does not tell it.
        """
        found: dict[str, Validation] = {}
        if self._validate is None:
            return found
        for weights in (RAW, *self._averages.judged(step)):
            with self._averages.in_place_of_weights(weights):
                found[weights] = Validation.of(self._validate())
                self._classifier.train()
                self._keep_if_better(weights, step, found[weights].score)
            if weights == RAW:
                self._averages.validated(step, found[RAW].loss)
        return found

    def is_best(self, weights: str, step: int) -> bool:
        """Whether the best state of all so far is that of ``weights`` after ``step``."""
        return weights == self.chosen and weights in self._best and self._best[weights].step == step

    def _keep_if_better(self, weights: str, step: int, score: tuple[float, ...]) -> None:
        before, overall = self._best.get(weights), self._best.get(self.chosen)
        if before is None or is_better(score, before.score):
            self._best[weights] = KeptState(step, score, _copies(self._classifier))
            if overall is None or is_better(score, overall.score):
                self.chosen = weights
                if self._on_best is not None:
                    self._on_best(weights)

    @torch.no_grad()
    def finish(self, last_step: int, *, announce: bool) -> dict[str, KeptState]:
        """Put the classifier into the best state of all, in eval mode; give the best states of all weights.

        Args:
            announce: let ``on_best`` save it once more.
        """
        self._classifier.eval()
        for weights in (RAW, *self._averages.names):
            if weights not in self._best:  # nobody validated
                with self._averages.in_place_of_weights(weights):
                    self._best[weights] = KeptState(last_step, None, _copies(self._classifier))
        put_into(self._classifier, self._best[self.chosen])
        if announce and self._on_best is not None and self._best[self.chosen].score is not None:
            self._on_best(self.chosen)
        return dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        # scores as tensors: JSON has no infinity
        states = {
            weights: {
                "step": state.step,
                "score": torch.tensor(state.score, dtype=torch.float64),
                "tensors": dict(state.tensors),
            }
            for weights, state in self._best.items()
        }
        return {"chosen": self.chosen, "states": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the tensors are those of another adapter, or of averages that this run does not have.
        """
        here = self._classifier.adapter_tensors()
        for weights, saved in state["states"].items():
            if weights not in (RAW, *self._averages.names) or not same_tensors(here, saved["tensors"]):
                raise UserError(f"its best state of the weights {weights!r} is not one of this adapter and recipe")
        device = self._classifier.backbone.device
        self._best = {
            weights: KeptState(
                int(saved["step"]),
                tuple(saved["score"].tolist()),
                {name: tensor.to(device) for name, tensor in saved["tensors"].items()},
            )
            for weights, saved in state["states"].items()
        }
        self.chosen = state["chosen"]


@torch.no_grad()
def put_into(classifier: ClipClassifier, state: KeptState) -> None:
    """Give the classifier's adapter the tensors of this state."""
    for name, tensor in classifier.adapter_tensors().items():
        tensor.copy_(state.tensors[name])


def same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether both have tensors of the same names, shapes and types."""
    return {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


def _copies(classifier: ClipClassifier) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in classifier.adapter_tensors().items()}


def is_better(score: tuple[float, ...] | None, than: tuple[float, ...] | None) -> bool:
    """A number that is NaN is worse than any other."""
    if score is None or than is None:
        return than is None and score is not None
    return comparable(score) > comparable(than)


def comparable(score: tuple[float, ...]) -> tuple[float, ...]:
    """The score with minus infinity for NaN, which compares with nothing."""
    return tuple(-math.inf if math.isnan(number) else number for number in score)
