"""Evaluate the adapters of finished runs again, on their own data or on others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from disam_peft.adapters.interpolation import require_alpha
from disam_peft.adapters.manifest import AdapterManifest, read_manifest
from disam_peft.adapters.registry import ADAPTERS
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.common import processes
from disam_peft.common.prediction_table import PREDICTIONS, write_predictions
from disam_peft.common.records import RAW, RESULTS, ResultRow, read_results, write_results
from disam_peft.config.evaluation_overrides import recipe_for_evaluation
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.evaluation.results import Evaluator, Identity, prediction_table, result_rows, write_sharpness
from disam_peft.experiments.run import Outcome
from disam_peft.experiments.run_folder import ADAPTER, RECIPE, find_runs, warn_if_unfinished
from disam_peft.experiments.seen_images import RunsImages
from disam_peft.training.accelerator import start_accelerator

EVALUATION = "evaluation.json"
EVALUATION_PREDICTIONS = "evaluation_predictions.parquet"
"""Of other data than the run's own, whose predictions stay in ``predictions.parquet``."""


def evaluate(
    folder: Path, overrides: Sequence[str] = (), *, sharpness: bool = False, alpha: float | None = None
) -> list[Outcome]:
    """Reload the adapters of finished runs and evaluate them again; by default on their own data, with the same
    numbers.

    Other data (``data.root=...``) are evaluated whole. Their rows say what the run had seen of them, by the content of
    the images: ``seen_training``, ``seen_validation``, ``unseen``, or ``unknown`` where that cannot be told. Writes
    ``evaluation.json`` beside ``results.json``, and ``predictions.parquet``, or ``evaluation_predictions.parquet`` for
    other data.

    Args:
        folder: a run, or a folder with runs at any depth.
        overrides: settings that ``recipe_for_evaluation`` accepts.
        sharpness: also measure sharpness, as the recipe says or by default, and write it as training would have.
        alpha: evaluate ``w0 + alpha (w1 - w0)``, w0 the zero-shot and w1 the trained weights (WiSE-FT). The rows say so
            in ``weights``, and predictions are written as those for other data are. Unset: the trained weights.

    Raises:
        UserError: no run in ``folder``; an override of what made the adapter; data with classes that the adapter does
            not know; sharpness asked for on other data than the run's own, or with an alpha; an adapter that another
            run trained, or that has no zero-shot weights.
    """
    if alpha is not None:
        require_alpha(alpha)
        if sharpness:
            raise UserError("sharpness is measured at the trained weights; evaluate without --alpha or --sharpness")
        for run in find_runs(folder):
            require_zero_shot_weights(run)
    outcomes = []
    for run in find_runs(folder):
        one = reload(run, overrides)
        recipe, classifier, splits = one.recipe, one.classifier, one.splits
        if sharpness and not one.is_own:
            raise UserError(
                "sharpness is measured on the run's own data, which those given here are not; evaluate without them, "
                "or without --sharpness"
            )
        with put_at(classifier, alpha):
            predictions = one.evaluator.predict_splits(classifier, splits, label=recipe.method.name)
        weights = one.weights if alpha is None else f"{one.weights}, alpha={alpha:g}"
        rows = result_rows(Identity.of_trained(recipe, weights, chosen=True), predictions)
        is_main = processes.is_main()
        if sharpness:
            write_sharpness(run, classifier, splits, recipe.evaluation, like=rows[-1], is_main=is_main)
        if is_main:
            write_results(run / EVALUATION, rows)
            classes = _class_names(one.manifest, classifier.class_names)
            of_the_run = one.is_own and alpha is None
            name = PREDICTIONS if of_the_run else EVALUATION_PREDICTIONS
            write_predictions(run / name, prediction_table(predictions, splits, classes))
            if of_the_run:  # evaluation.json is no longer of what an earlier evaluation left there
                (run / EVALUATION_PREDICTIONS).unlink(missing_ok=True)
        outcomes.append(Outcome(run, recipe.protocol.domain, rows, None))
    return outcomes


@dataclass(frozen=True)
class Reloaded:
    """A finished run that is ready to be evaluated again."""

    recipe: Recipe
    evaluator: Evaluator
    classifier: ClipClassifier
    manifest: AdapterManifest
    splits: dict[str, DomainDataset]
    is_own: bool
    """Whether ``splits`` are what the run was trained on, by the names that training gave them."""

    @property
    def weights(self) -> str:
        """Which weights selection chose, see ``ResultRow.weights``."""
        return str(self.manifest.trained_with.get("weights", RAW))


def reload(run: Path, overrides: Sequence[str]) -> Reloaded:
    """The classifier of a run with its adapter, and the data to evaluate it on.

    Raises:
        UserError: as ``evaluate``.
    """
    recipe = recipe_for_evaluation(run / RECIPE, overrides)
    warn_if_unfinished(run)
    accelerator = start_accelerator(recipe.train.mixed_precision, timeout_minutes=recipe.train.timeout_minutes)
    classifier = load_adapter(run / ADAPTER, device=accelerator.device, precision=recipe.backbone.precision)
    manifest = read_manifest(run / ADAPTER)
    require_own_adapter(manifest, recipe, run)
    images = RunsImages(run, load_recipe(run / RECIPE))
    with accelerator.main_process_first():
        splits, is_own = _splits(images, recipe, overrides, classifier.class_names)
    return Reloaded(recipe, Evaluator(recipe, accelerator.autocast), classifier, manifest, splits, is_own)


def require_zero_shot_weights(run: Path) -> None:
    """Pass if the adapter of a run lies on a line from zero-shot weights; loads neither model nor images.

    Raises:
        UserError: it has none; says why.
    """
    config = read_manifest(run / ADAPTER).config
    ADAPTERS[type(config)].require_zero_shot_weights(config)


@contextmanager
def put_at(classifier: ClipClassifier, alpha: float | None) -> Iterator[None]:
    """Inside, the classifier computes at this alpha; unset: with its trained weights."""
    if alpha is None:
        yield
        return
    with classifier.interpolation() as move_to:
        move_to(alpha)
        yield


def recorded_rows(run: Path) -> list[ResultRow]:
    """The rows that training wrote to the run's folder; none where it wrote none."""
    path = run / RESULTS
    return read_results(path) if path.is_file() else []


def _splits(
    images: RunsImages, recipe: Recipe, overrides: Sequence[str], known: tuple[str, ...]
) -> tuple[dict[str, DomainDataset], bool]:
    """What to evaluate on, by split, with labels that count in the classes ``known`` to the adapter; and whether it is
    what the run was trained on."""
    try:
        dataset = load(recipe.data)
    except UserError:
        if not overrides:
            raise
    else:
        own = images.own_splits(recipe, dataset)
        if own is not None and dataset.prompt_names == known:
            return own, True
        if not overrides:
            warnings.warn(
                f"{dataset.origin} is no longer what {images.run} was trained on: images, domains or classes were "
                "added, removed or changed. It is evaluated as other data are",
                stacklevel=3,
            )
    # The run's choice of domains, and how it made classes agree, were meant for its own data.
    told = {override.partition("=")[0] for override in overrides}
    ours, before = recipe.data, images.recipe.data
    classes_told = "data.classes" in told or ours.classes != before.classes
    domains_told = "data.domains" in told or ours.domains != before.domains
    whole = {"classes": "union", "domains": ours.domains if domains_told else None}
    dataset = load(ours.model_copy(update=whole))
    shared = _in_classes(known, dataset, only_known=classes_told and ours.classes == "intersection")
    return images.by_what_was_seen(shared), False


def require_own_adapter(manifest: AdapterManifest, recipe: Recipe, run: Path) -> None:
    """Pass if the adapter says of its training what the run's recipe says, or nothing."""
    told = manifest.trained_with
    of_recipe = told.get("recipe")
    of_recipe = of_recipe if isinstance(of_recipe, dict) else {}
    method = of_recipe.get("method")
    found: dict[str, tuple[Any, set[Any]]] = {
        "held_out": (told.get("held_out"), {recipe.protocol.held_out, recipe.protocol.domain}),
        "seed": (of_recipe.get("seed"), {recipe.seed}),
        "method.name": (method.get("name") if isinstance(method, dict) else None, {recipe.method.name}),
    }
    for name, (trained, ours) in found.items():
        if trained is not None and trained not in ours:
            raise UserError(
                f"{run / ADAPTER} was trained with {name}={trained!r}, but {RECIPE} beside it has "
                f"{' or '.join(sorted(map(repr, ours)))}: it is another run's adapter; copy the whole folder of the run"
            )


def _class_names(manifest: AdapterManifest, words: tuple[str, ...]) -> tuple[str, ...]:
    """The classes as the data call them that the adapter was trained on."""
    names = manifest.trained_with.get("classes")
    if isinstance(names, list) and len(names) == len(words):
        return tuple(map(str, names))
    return words


def _in_classes(known: tuple[str, ...], dataset: DomainDataset, *, only_known: bool) -> DomainDataset:
    """The same samples with labels that count in the classes ``known`` to the adapter, which may be more.

    Args:
        only_known: leave out samples of other classes; otherwise, and where nothing would be left, these are an error.
    """
    if dataset.prompt_names == known:
        return dataset
    label_of = np.array([known.index(name) if name in known else -1 for name in dataset.prompt_names])
    labels_N = label_of[dataset.labels]
    unknown = sorted({dataset.prompt_names[label] for label in dataset.labels[labels_N < 0]})
    if unknown and (not only_known or (labels_N < 0).all()):
        raise UserError(
            f"{dataset.origin} has classes that the adapter was not trained for: {', '.join(unknown[:10])} "
            f"(it knows {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}); map their names with "
            "data.class_names, or evaluate the classes that both have with data.classes=intersection"
        )
    if unknown:
        left_out = int((labels_N < 0).sum())
        warnings.warn(
            f"{left_out} of {len(dataset)} images are left out: the adapter does not know {', '.join(unknown[:10])}",
            stacklevel=4,
        )
    kept = np.flatnonzero(labels_N >= 0)
    return replace(dataset, labels=labels_N).select(kept)
