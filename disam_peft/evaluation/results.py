"""What a run records besides its results: what was taken for what, the surest errors, the sharpness."""

from __future__ import annotations

from pathlib import Path

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.records import CONFUSION, ERRORS, LOSS_SLICE, SHARPNESS, ResultRow, write_list, write_results
from disam_peft.config.evaluation import EvaluationConfig, SharpnessConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.evaluation.mistakes import confident_errors, confusion
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.sharpness.rows import sharpness_rows


def write_mistakes(
    folder: Path, predictions: Predictions, target: DomainDataset, classes: tuple[str, ...], config: EvaluationConfig
) -> None:
    """Write ``confusion.json`` and ``errors.json`` for the held-out domain ``target``."""
    write_list(folder / CONFUSION, [confusion(predictions, name, classes) for name in target.present_domains])
    write_list(folder / ERRORS, confident_errors(predictions, target, classes, config.example_errors))


def write_sharpness(
    folder: Path,
    classifier: ClipClassifier,
    validation: DomainDataset,
    target: DomainDataset,
    config: EvaluationConfig,
    *,
    like: ResultRow,
    is_main: bool,
) -> None:
    """Measure on source validation and on the held-out domain; write ``sharpness.json`` and ``loss_slice.json``.

    Every process measures the same, and the main one writes: nobody waits at a barrier for minutes.

    Args:
        like: any row of the same classifier.
    """
    rows, plane = sharpness_rows(
        classifier,
        {"source_validation": validation, "held_out": target},
        config.sharpness or SharpnessConfig(),
        like,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    if is_main:
        write_results(folder / SHARPNESS, rows)
        write_list(folder / LOSS_SLICE, [] if plane is None else [plane])
