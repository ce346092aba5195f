"""Is the demo CLIP worth fine-tuning? LoRA with plain ERM, the demo's settings, each domain held out in turn.

    python scripts/judge_demo_clip.py

Writes finetuning.json beside the weights and puts the table into the README there. Two seeds, and two settings (the
demo's own, and half its learning rate), so that the gain does not hang on one lucky choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_checkpoint import FINETUNING, PRETRAINING, write_readme

from disam_peft.common.records import ResultRow
from disam_peft.config.shapes import DOMAINS
from disam_peft.experiments import run
from disam_peft.experiments.demo import IMAGES_PER_CLASS, demo_recipe

RATES = (1.0, 0.5)
"""Learning rates, as multiples of the demo's."""
FOLDER = Path(__file__).parents[1] / "disam_peft/backbones/demo"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cells = []
    for rate in RATES:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                cells.append(_cell(Path(scratch), rate, seed))
            print(json.dumps(cells[-1]), flush=True)
    record = {
        "command": "python scripts/judge_demo_clip.py",
        "weights": json.loads((FOLDER / PRETRAINING).read_text(encoding="utf-8"))["sha256"],
        "cells": cells,
    }
    (FOLDER / FINETUNING).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_readme(FOLDER)


def _cell(scratch: Path, rate: float, seed: int) -> dict[str, Any]:
    """Accuracies in percent of one setting and seed."""
    recipe = demo_recipe(scratch, "erm", "all")
    recipe = recipe.model_copy(
        update={
            "seed": seed,
            "train": recipe.train.model_copy(update={"learning_rate": rate * recipe.train.learning_rate}),
        }
    )
    outcomes = {outcome.held_out: outcome.rows for outcome in run.train(recipe)}
    domains = {}
    for domain in DOMAINS:
        rows = outcomes[domain]
        domains[domain] = {
            "zero_shot": _accuracy(rows, "zero_shot", "held_out", domain),
            "erm": _accuracy(rows, "erm", "held_out", domain),
            "erm_on_source_validation": _accuracy(rows, "erm", "source_validation", "mean"),
        }
    mean = {key: round(statistics.mean(one[key] for one in domains.values()), 1) for key in domains[DOMAINS[0]]}
    train = recipe.train
    settings: dict[str, Any] = {
        "learning_rate": train.learning_rate,
        "steps": train.steps,
        "batch_size": train.batch_size,
    }
    settings |= {"adapter": recipe.adapter.model_dump(), "images_per_class": IMAGES_PER_CLASS}
    return {"seed": seed, **settings, "held_out": {**domains, "mean": mean}}


def _accuracy(rows: Sequence[ResultRow], method: str, split: str, domain: str) -> float:
    [value] = [
        r.value or 0.0 for r in rows if (r.method, r.split, r.domain, r.metric) == (method, split, domain, "top1")
    ]
    return round(100 * value, 1)


if __name__ == "__main__":
    main()
