"""The job of ``disam-peft predict``: rows for many images, in order, over any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from disam_peft.common import processes
from disam_peft.common.progress import track
from disam_peft.inference.image_batches import batches
from disam_peft.inference.loaded_classifier import LoadedClassifier
from disam_peft.inference.prediction import Prediction
from disam_peft.inference.prediction_files import PredictionFile
from disam_peft.training.accelerator import start_accelerator


def predict_images(
    load: Callable[[Any], LoadedClassifier],
    paths: Sequence[str],
    *,
    output: Path | None,
    show: Callable[[Prediction], None],
    top: int = 5,
    threshold: float = 0.0,
    batch_size: int = 32,
    workers: int | Literal["auto"] = "auto",
    precision: str = "no",
    resume: bool = False,
) -> int:
    """Classify images, and write or show a row for each.

    Every batch has the same images however many processes there are, so that their rows are the same, too.

    Args:
        load: makes the classifier on a device.
        output: a file of rows; None: each row is shown.
        show: shows a row, in the main process.
        resume: go on with the draft of an ``output`` that is not complete.

    Returns:
        the number of images that could not be read.

    Raises:
        UserError: as ``PredictionFile`` and ``load_classifier``.
    """
    accelerator = start_accelerator(precision)
    classifier = load(accelerator.device)
    file, first = None, 0
    if output is not None:
        about = {
            "model": _identity(classifier),
            "classes": list(classifier.class_names),
            "images": hashlib.sha256("\0".join(paths).encode(errors="surrogateescape")).hexdigest(),
            "settings": {"top": top, "threshold": threshold, "batch_size": batch_size, "precision": precision},
        }
        file = PredictionFile(output, about, top=min(top, len(classifier.class_names)))
        begin = file.begin
        first = processes.on_main(lambda: begin(paths, resume=resume, batch_size=batch_size))
    given = batches(paths, classifier.classifier.backbone.image_transform, batch_size, first=first, workers=workers)
    errors = 0
    rows = classifier.classified(given, top=top, threshold=threshold, autocast=accelerator.autocast)
    total = -(-(len(paths) - first) // (batch_size * processes.world_size()))
    for round_ in track(_in_order(rows), "classifying", total=total):
        if not processes.is_main():
            continue
        if file is not None:
            file.add(round_)
        else:
            for row in round_:
                errors += row.error is not None
                show(row)
    return errors if file is None else processes.on_main(file.finish)


def _in_order(own: Iterator[list[Prediction]]) -> Iterator[list[Prediction]]:
    """The rows of one batch of every process, in the order of the images."""
    for rows in own:
        yield rows if processes.world_size() == 1 else [row for part in processes.from_all(rows) for row in part]


def _identity(classifier: LoadedClassifier) -> dict[str, Any]:
    """What the weights are: of the backbone, and of the adapter."""
    digest = hashlib.sha256()
    model = classifier.classifier
    tensors = {} if model.adapter is None else model.adapter.state()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().float().numpy().tobytes())
    return {
        "backbone": model.backbone.base_hash,
        "adapter": digest.hexdigest() if tensors else None,
        "templates": list(model.prompts.templates),
    }
