"""Folders of runs with all their records, without training: for the report of many runs.

``python -m tests.helpers.synthetic_runs FOLDER 100`` writes a hundred, to be looked at.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from disam_peft.common.prediction_table import PredictionTable, write_predictions
from disam_peft.common.records import (
    Confusion,
    ExampleError,
    ResultRow,
    append_event,
    write_list,
    write_results,
)
from disam_peft.common.run_images import RunImages, write_images
from disam_peft.config.recipe import Recipe, save_recipe

DOMAINS = ("art", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar")


def images(content: str = "0", part: str = "training") -> RunImages:
    """Eight images; others for another ``content``."""
    number = range(8)
    return RunImages(
        key=tuple(f"{DOMAINS[i % 4]}/dog/{i}.png" for i in number),
        content=tuple(f"{content}{i:063d}" for i in number),
        domain=tuple(DOMAINS[i % 4] for i in number),
        class_name=("dog",) * 8,
        part=(part,) * 8,
        size=(100,) * 8,
        class_words={name: name for name in CLASSES},
    )


def predictions(held_out: str) -> PredictionTable:
    """Forty images of the held-out domain, of which thirty are right, and ten of a source."""
    confidence = tuple(0.25 + 0.015 * i for i in range(50))
    right = [i % 4 != 0 for i in range(50)]
    return PredictionTable(
        key=tuple(f"{i}.png" for i in range(50)),
        content=tuple(f"{i:064d}" for i in range(50)),
        domain=(held_out,) * 40 + ("cartoon",) * 10,
        split=("held_out",) * 40 + ("source_validation",) * 10,
        label=("dog",) * 50,
        predicted=tuple("dog" if is_right else "guitar" for is_right in right),
        label_probability=tuple(p if is_right else 0.1 for p, is_right in zip(confidence, right, strict=True)),
        predicted_probability=confidence,
    )


def write_run(
    folder: Path,
    *,
    method: str = "disam",
    held_out: str = "sketch",
    seed: int = 0,
    value: float = 0.5,
    zero_shot: float = 0.25,
    recorded: RunImages | None = None,
    details: bool = False,
    rho: float = 0.05,
    **settings: Any,
) -> Path:
    """A finished run.

    Args:
        value, zero_shot: accuracy on the held-out domain.
        recorded: None: no record of the images, as version 0.1.
        details: also curves, confusion and mistakes.
        settings: groups of the recipe, such as ``train={"steps": 5}``.
    """
    values = {
        "name": folder.parent.name,
        "output": folder.parent.parent,
        "seed": seed,
        "backbone": {"name": "demo"},
        "adapter": {"kind": "lora"},
        "data": {"root": "images"},
        "method": {"name": method, "rho": rho},
        "protocol": {"held_out": held_out},
        **settings,
    }
    recipe = Recipe.model_validate(values)
    folder.mkdir(parents=True)
    save_recipe(recipe, folder / "recipe.yaml")
    if recorded is not None:
        write_images(folder / "images.parquet", recorded)
    name, tag = recipe.backbone.name, recipe.backbone.pretrained
    backbone = name if tag is None else f"{name}:{tag}"
    rows = []
    for kind, adapter, accuracy in (("zero_shot", "none", zero_shot), (method, recipe.adapter.kind, value)):
        like = (backbone, adapter, kind, held_out, seed)
        chosen = None if kind == "zero_shot" else True
        for metric, number in (("top1", accuracy), ("nll", 1 - accuracy)):
            rows.append(ResultRow(*like, "held_out", held_out, metric, number, 40, chosen=chosen))
            rows.append(ResultRow(*like, "source_validation", "mean", metric, number, 3, "raw", "mean", chosen))
    write_results(folder / "results.json", rows)
    for step in range(0, 100, 5) if details else (1, 10):
        sources = [domain for domain in DOMAINS if domain != held_out]
        losses = {domain: 2.0 / (1 + step / (10 + 5 * place)) for place, domain in enumerate(sources)}
        weights = {domain: 0.3 + 0.03 * place for place, domain in enumerate(sources)}
        event = {"step": step, "loss": sum(losses.values()) / 3, "domain_loss": losses, "domain_weight": weights}
        append_event(folder / "metrics.jsonl", "step", **event, ascent_cosine=0.9)
    if details:
        counts = [[i, j, 9 if i == j else 1] for i in range(4) for j in range(4)]
        write_list(folder / "confusion.json", [Confusion(held_out, list(CLASSES), counts)])
        write_predictions(folder / "predictions.parquet", predictions(held_out))
        errors = [ExampleError(f"{held_out}/dog/{i}.png", "dog", "guitar", 0.9, "") for i in range(12)]
        write_list(folder / "errors.json", errors)
    return folder


def write_many(folder: Path, count: int, *, seeds: int = 2) -> None:
    """``count`` runs of a sweep: methods, ranks, learning rates, two held-out domains, some seeds."""
    draw = random.Random(0)
    number = 0
    for learning_rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3):
        for rank in (2, 4, 8, 16):
            for method in ("erm", "sam", "disam"):
                for held_out in ("sketch", "art"):
                    for seed in range(seeds):
                        if number == count:
                            return
                        number += 1
                        write_run(
                            folder / f"lora-{method}-{rank}-{learning_rate:g}-{seed}" / held_out,
                            method=method,
                            held_out=held_out,
                            seed=seed,
                            value=0.4 + 0.4 * draw.random(),
                            zero_shot=0.3 if held_out == "sketch" else 0.5,
                            recorded=images(),
                            details=True,
                            adapter={"kind": "lora", "rank": rank},
                            train={"learning_rate": learning_rate},
                        )


if __name__ == "__main__":
    write_many(Path(sys.argv[1]), int(sys.argv[2]))
