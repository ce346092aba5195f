"""Evaluate the adapters of finished runs again, on their own data or on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from disam_peft.adapters.manifest import read_manifest
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.common.records import RAW, RESULTS, ResultRow, read_results, write_results
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.evaluation.results import Evaluator, Identity, result_rows, write_sharpness
from disam_peft.experiments.build import split_data
from disam_peft.experiments.run import Outcome
from disam_peft.experiments.run_folder import ADAPTER, RECIPE, find_runs
from disam_peft.training.accelerator import start_accelerator

EVALUATION = "evaluation.json"


def evaluate(folder: Path, overrides: Sequence[str] = (), *, sharpness: bool = False) -> list[Outcome]:
    """Reload the adapter of a finished run and evaluate it again; by default on its own data, with the same numbers.

    With other data (``data.root=...``) that lack the held-out domain, every domain there is evaluated, as split
    ``given``. Writes ``evaluation.json`` beside ``results.json``.

    Args:
        sharpness: also measure sharpness, as the recipe says or by default, and write it as training would have.

    Raises:
        UserError: no run in ``folder``; data with classes that the adapter does not know; sharpness asked for on data
            without the held-out domain or without sources.
    """
    outcomes = []
    for run in find_runs(folder):
        recipe = load_recipe(run / RECIPE, overrides)
        accelerator = start_accelerator(recipe.train.mixed_precision, timeout_minutes=recipe.train.timeout_minutes)
        with accelerator.main_process_first():
            dataset = load(recipe.data)
        classifier = load_adapter(run / ADAPTER, device=accelerator.device)
        splits = _splits(run, recipe, _in_classes_of(classifier, dataset))
        if sharpness and "source_validation" not in splits:
            left_out = recipe.protocol.held_out
            beside = "" if left_out is None else f" and on {left_out!r}, which the run left out"
            raise UserError(
                f"sharpness is measured on the sources{beside}, but {dataset.origin} has "
                f"{', '.join(dataset.present_domains)}; evaluate on the run's own data, or "
                "without --sharpness"
            )
        evaluator = Evaluator(recipe, accelerator.autocast)
        predictions = evaluator.predict_splits(classifier, splits, label=recipe.method.name)
        weights = str(read_manifest(run / ADAPTER).trained_with.get("weights", RAW))
        rows = result_rows(Identity.of_trained(recipe, weights, chosen=True), predictions)
        is_main = accelerator.is_main_process
        if sharpness:
            write_sharpness(run, classifier, splits, recipe.evaluation, like=rows[-1], is_main=is_main)
        if is_main:
            write_results(run / EVALUATION, rows)
        outcomes.append(Outcome(run, recipe.protocol.held_out, rows, None))
    return outcomes


def recorded_rows(run: Path) -> list[ResultRow]:
    """The rows that training wrote to the run's folder; none where it wrote none."""
    path = run / RESULTS
    return read_results(path) if path.is_file() else []


def _splits(run: Path, recipe: Recipe, dataset: DomainDataset) -> dict[str, DomainDataset]:
    """What to evaluate on: the run's own splits where the data have them, else every sample as ``given``."""
    held_out, domains = recipe.protocol.held_out, dataset.present_domains
    if held_out is None:
        own = load_recipe(run / RECIPE).data == recipe.data
        return split_data(recipe, dataset).by_split() if own else {"given": dataset}
    if held_out in domains and len(domains) > 1:
        return split_data(recipe, dataset).by_split()
    return {"held_out" if domains == (held_out,) else "given": dataset}


def _in_classes_of(classifier: ClipClassifier, dataset: DomainDataset) -> DomainDataset:
    """The same samples with labels that count in the classifier's classes, which may be more."""
    known = classifier.class_names
    if dataset.prompt_names == known:
        return dataset
    unknown = sorted(set(dataset.prompt_names) - set(known))
    if unknown:
        raise UserError(
            f"{dataset.origin} has classes that the adapter was not trained for: {', '.join(unknown[:10])} "
            f"(it knows {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}); "
            "leave them out, or map their names with data.class_names"
        )
    label_of = np.array([known.index(name) for name in dataset.prompt_names])
    return replace(dataset, labels=label_of[dataset.labels])
