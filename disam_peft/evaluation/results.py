"""From a classifier to what a run records of it: rows of results, mistakes, sharpness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import evaluation_store
from disam_peft.common.prediction_table import PredictionTable
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
from disam_peft.common.run_images import size_as_content
from disam_peft.config.adapters import adapter_label
from disam_peft.config.evaluation import EvaluationConfig, SharpnessConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.evaluation.metrics import NOT_FINITE, metrics_of_domains, pooled_metrics, undefined_samples
from disam_peft.evaluation.mistakes import confident_errors, confusion
from disam_peft.evaluation.predict import Predictions, predict_states
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
        return cls(_backbone_label(recipe), "none", "zero_shot", recipe.protocol.domain, recipe.seed)

    @classmethod
    def of_trained(cls, recipe: Recipe, weights: str = RAW, *, chosen: bool) -> Identity:
        """The recipe's model with its trained adapter; ``weights`` and ``chosen`` as in ``ResultRow``."""
        model = (_backbone_label(recipe), adapter_label(recipe.adapter), recipe.method.name)
        return cls(*model, recipe.protocol.domain, recipe.seed, weights, chosen)


def _backbone_label(recipe: Recipe) -> str:
    """Name and pretrained tag, as they stand in tables."""
    name, tag, precision = recipe.backbone.name, recipe.backbone.pretrained, recipe.backbone.precision
    label = name if tag is None else f"{name}:{tag}"
    return label if precision == "float32" else f"{label} ({precision})"


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
        return self.predict_states(classifier, dataset, [lambda: None], description)[0]

    def predict_states(
        self,
        classifier: ClipClassifier,
        dataset: DomainDataset,
        states: Sequence[Callable[[], object]],
        description: str,
    ) -> list[Predictions]:
        """The same with each of several states of the classifier, see ``predict.predict_states``."""
        config, features, store = self.recipe.evaluation, self.recipe.features, None
        if features.store:
            store = evaluation_store(classifier, dataset, features, autocast=self.autocast, workers=config.workers)
        return predict_states(
            classifier, dataset, states, config, store=store, autocast=self.autocast, description=description
        )

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


def prediction_table(
    predictions: Mapping[str, Predictions], splits: Mapping[str, DomainDataset], classes: tuple[str, ...]
) -> PredictionTable:
    """What was predicted for every image of every split, to be read without torch.

    Args:
        predictions, splits: by split; both have the same images in the same order.
        classes: the names of the classifier's classes.
    """
    found: dict[str, list[Any]] = {field.name: [] for field in fields(PredictionTable)}
    for split, of_split in predictions.items():
        dataset = splits[split]
        known = (~undefined_samples(of_split.logits_NC)).tolist()
        probability_NC = of_split.logits_NC.double().softmax(dim=1)
        highest_N, predicted_N = probability_NC.max(dim=1)
        of_label_N = probability_NC.gather(1, of_split.labels_N[:, None])[:, 0]
        sizes = dataset.sizes_and_times[0].tolist()
        found["key"] += dataset.keys
        found["content"] += dataset.hashes if dataset.hashes is not None else map(size_as_content, sizes)
        found["domain"] += [of_split.domain_names[number] for number in of_split.domains_N.tolist()]
        found["split"] += [split] * len(dataset)
        found["label"] += [classes[label] for label in of_split.labels_N.tolist()]
        found["predicted"] += _where(known, [classes[number] for number in predicted_N.tolist()])
        found["label_probability"] += _where(known, of_label_N.tolist())
        found["predicted_probability"] += _where(known, highest_N.tolist())
    return PredictionTable(**{name: tuple(values) for name, values in found.items()})


def _where(known: list[bool], values: list[Any]) -> list[Any]:
    return [value if is_known else None for is_known, value in zip(known, values, strict=True)]


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
