"""From a classifier to what a run records of it: rows of results, mistakes, sharpness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import evaluation_store
from disam_peft.common.records import (
    CONFUSION,
    ERRORS,
    LOSS_SLICE,
    POOL_NAMES,
    RAW,
    SHARPNESS,
    ResultRow,
    write_list,
    write_results,
)
from disam_peft.config.evaluation import EvaluationConfig, SharpnessConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.evaluation.metrics import NOT_FINITE, metrics_of_domains, pooled_metrics
from disam_peft.evaluation.mistakes import confident_errors, confusion
from disam_peft.evaluation.predict import Predictions, predict
from disam_peft.evaluation.sharpness.rows import sharpness_rows


@dataclass(frozen=True)
class Identity:
    """What all rows of one classifier have in common. The fields are those of ``ResultRow``."""

    backbone: str
    adapter: str
    method: str
    held_out: str | None
    seed: int
    weights: str = RAW
    chosen: bool | None = None

    @classmethod
    def of_zero_shot(cls, recipe: Recipe) -> Identity:
        """The recipe's pretrained model, before an adapter was trained."""
        return cls(_backbone_label(recipe), "none", "zero_shot", recipe.protocol.held_out, recipe.seed)

    @classmethod
    def of_trained(cls, recipe: Recipe, weights: str = RAW, *, chosen: bool) -> Identity:
        """The recipe's model with its trained adapter; ``weights`` and ``chosen`` as in ``ResultRow``."""
        model = (_backbone_label(recipe), recipe.adapter.kind, recipe.method.name)
        return cls(*model, recipe.protocol.held_out, recipe.seed, weights, chosen)


def _backbone_label(recipe: Recipe) -> str:
    """Name and pretrained tag, as they stand in tables."""
    name, tag = recipe.backbone.name, recipe.backbone.pretrained
    return name if tag is None else f"{name}:{tag}"


@dataclass(frozen=True)
class Evaluator:
    """Predicts with every classifier of a run in the same way, so that their numbers can be compared.

    Attributes:
        recipe: its ``evaluation`` and ``features`` say how predictions are computed.
        autocast: makes the context of a forward pass, for example ``accelerator.autocast``.
    """

    recipe: Recipe
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def predict(self, classifier: ClipClassifier, dataset: DomainDataset, description: str) -> Predictions:
        """The predictions for one data set, from a feature store where the recipe asks for one.

        Raises:
            UserError: an empty data set, or labels that the classifier has no class for.
        """
        config, features, store = self.recipe.evaluation, self.recipe.features, None
        if features.store:
            store = evaluation_store(classifier, dataset, features, autocast=self.autocast, workers=config.workers)
        return predict(classifier, dataset, config, store=store, autocast=self.autocast, description=description)

    def predict_splits(
        self, classifier: ClipClassifier, splits: Mapping[str, DomainDataset], label: str
    ) -> dict[str, Predictions]:
        """The predictions for several data sets, by split. ``label`` names the classifier in the progress bar."""
        return {
            split: self.predict(classifier, dataset, f"{label}: {split.replace('_', ' ')}")
            for split, dataset in splits.items()
        }


def result_rows(identity: Identity, predictions: Mapping[str, Predictions]) -> list[ResultRow]:
    """Every metric of every domain of every split, and its ``mean`` and ``worst`` over the domains of the split. Where
    logits are not finite a warning says so, and the metrics are None.

    Args:
        predictions: split -> what the classifier predicted there.
    """
    rows = []
    for split, found in predictions.items():
        by_domain = metrics_of_domains(found)
        for domain, values in by_domain.items():
            n = int((found.domains_N == found.domain_names.index(domain)).sum())
            like = ResultRow(**asdict(identity), split=split, domain=domain, metric="", value=None, n=n)
            rows += [replace(like, metric=metric, value=value) for metric, value in values.items()]
            if NOT_FINITE in values:
                warnings.warn(
                    f"the logits of {identity.method} are not finite for {values[NOT_FINITE]:.0f} of {n} images of "
                    f"{domain!r} ({split.replace('_', ' ')}): no metric is defined there (n/a)",
                    stacklevel=2,
                )
        for pool, values in pooled_metrics(by_domain).items():
            of_pool = replace(like, domain=POOL_NAMES[pool], pooled=pool, n=len(by_domain))
            rows += [replace(of_pool, metric=metric, value=value) for metric, value in values.items()]
    return rows


def write_mistakes(
    folder: Path, predictions: Predictions, target: DomainDataset, classes: tuple[str, ...], config: EvaluationConfig
) -> None:
    """Write ``confusion.json`` and ``errors.json`` for the held-out domain ``target``."""
    write_list(folder / CONFUSION, [confusion(predictions, name, classes) for name in target.present_domains])
    write_list(folder / ERRORS, confident_errors(predictions, target, classes, config.example_errors))


def write_sharpness(
    folder: Path,
    classifier: ClipClassifier,
    splits: Mapping[str, DomainDataset],
    config: EvaluationConfig,
    *,
    like: ResultRow,
    is_main: bool,
) -> None:
    """Measure the sharpness on every split, and write ``sharpness.json`` and ``loss_slice.json``.

    Every process measures the same, and the main one writes, so that no process waits at a barrier for minutes.

    Args:
        splits: split -> its samples; the slice of the loss is drawn on ``held_out``, or on the first split where
            nothing was held out.
        like: any row of the same classifier.
    """
    rows, plane = sharpness_rows(
        classifier,
        splits,
        config.sharpness or SharpnessConfig(),
        like,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    if is_main:
        write_results(folder / SHARPNESS, rows)
        write_list(folder / LOSS_SLICE, [] if plane is None else [plane])
