"""From nothing to a report: the small CLIP that ships with the package, on the benchmark that ships with it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from disam_peft.common.files import output_folder
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig
from disam_peft.config.evaluation import EvaluationConfig, SharpnessConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.shapes import ShapesConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.experiments import run
from disam_peft.experiments.export_run import export_run
from disam_peft.report.page import Picture, build_report
from disam_peft.report.run_measures import run_measures, zero_shot_measures
from disam_peft.report.runs import RunRecord, read_runs

# a look at the measures in seconds; a study takes the defaults
SHARPNESS = SharpnessConfig(
    samples=48, ascent_steps=4, hessian_iterations=16, hessian_tolerance=0.05, gradient_group=2, slice_points=7
)
STEPS, IMAGES_PER_CLASS = 400, 20
_ANCHOR = {"anchors": [{"kind": "logits", "weight": 1}]}
ARMS: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "erm": ("ERM", {"name": "erm"}, {}),
    "sam": ("SAM", {"name": "sam", "rho": 0.2}, {}),
    "disam": ("DISAM", {"name": "disam", "rho": 0.2, "variance_weight": 0.3}, {}),
    "anchor": ("ERM + anchor", {"name": "erm"}, _ANCHOR),
}
"""Name -> title, ``method`` and ``objective``. The values are those of ``recipes/studies/c_methods.yaml``."""
INTRODUCTION = (
    "DomainShapes has twelve shapes in six styles. A CLIP of 1.2 million parameters saw other drawings of them, under "
    "captions that mix up some of the names, as captions do. LoRA adapts it to five of the styles until it has learnt "
    "them: with plain empirical risk minimization (ERM), sharpness-aware minimization (SAM), DISAM, and ERM with an "
    "anchor to the zero-shot predictions. The sixth style is used for nothing but the numbers below.",
)

SINGLE_RUNS: Final = {
    ("sam", "erm"): (0.1, -7.1, 4.2),
    ("disam", "sam"): (0.1, -1.7, 5.8),
    ("anchor", "erm"): (3.7, -0.8, 10.0),
}
"""Differences of accuracy in points between two arms of ``recipes/studies/c_methods.yaml``: mean, least and largest of
all pairs of runs that share a seed and a held-out domain."""
PAIRS: Final = 30
MISLEADING = (
    f"One seed can mislead. In {PAIRS} pairs of runs that differ in the method alone, with pictures of their own and "
    "six styles held out in turn (recipes/studies/c_methods.yaml), the differences in accuracy were, in points: "
    + "; ".join(
        f"{ARMS[first][0]} minus {ARMS[second][0]} {low:+.1f} to {high:+.1f}, on average {mean:+.1f}"
        for (first, second), (mean, low, high) in SINGLE_RUNS.items()
    )
    + "."
)


@dataclass(frozen=True)
class DemoLine:
    """One arm on the held-out domain.

    Attributes:
        gradients: of a batch that training computed; None of the zero-shot model.
    """

    arm: str
    accuracy: float
    nll: float
    ece: float
    gradients: int | None


def demo(
    output: Path,
    held_out: str,
    *,
    steps: int = STEPS,
    images_per_class: int = IMAGES_PER_CLASS,
    say: Callable[[str], object] = print,
) -> list[DemoLine]:
    """Train and judge LoRA in every arm; leave ``report.html``, ``domains.png``, ``runs/``, ``adapter/`` (of the run
    that is best on source validation) and ``features/``, which may go.

    Runs of an earlier demo in ``output`` are kept. Returns the zero-shot model and every arm on the held-out domain.

    Raises:
        UserError: ``held_out`` is no domain; ``output`` holds a demo with other settings.
    """
    output_folder(output)
    recipes = {arm: demo_recipe(output, arm, held_out, steps, images_per_class) for arm in ARMS}
    sheet = domain_sheet(load(recipes["erm"].data))
    (output / "domains.png").write_bytes(sheet)
    say(f"wrote {output / 'domains.png'}: the classes (columns) in the domains (rows)")
    for arm, recipe in recipes.items():
        say(f"training LoRA with {ARMS[arm][0]} on every domain but {held_out}")
        run.train(recipe)
    runs = {arm: RunRecord(recipe.folder(recipe.protocol.domain)) for arm, recipe in recipes.items()}
    best = max(runs, key=lambda arm: _on_sources(runs[arm]))
    if not (output / "adapter").exists():
        export_run(runs[best].folder, "peft", output / "adapter")
    say(f"exported {output / 'adapter'}: {ARMS[best][0]}, the best on held-back images of the five sources")
    picture = Picture("The classes (columns) in the domains (rows).", sheet)
    title = f"LoRA on a small CLIP, judged on {held_out}"
    introduction = (*INTRODUCTION, MISLEADING)
    build_report(
        read_runs([output / "runs"]),
        output / "report.html",
        title=title,
        introduction=introduction,
        pictures=[picture],
    )
    zero_shot = zero_shot_measures(runs["erm"])
    return [
        _line("zero-shot", zero_shot | {"gradients": None}),
        *(_line(ARMS[arm][0], run_measures(record)) for arm, record in runs.items()),
    ]


def _on_sources(record: RunRecord) -> tuple[float, float]:
    """Accuracy on source validation, and the negative NLL that decides between equals."""
    measures = run_measures(record)
    return measures["source_top1"] or 0.0, -(measures["source_nll"] or 0.0)


def _line(title: str, measures: Mapping[str, float | None]) -> DemoLine:
    accuracy, nll, ece = (measures[name] for name in ("top1", "nll", "ece"))
    assert (
        accuracy is not None and nll is not None and ece is not None
    )  # the held-out domain of DomainShapes has images
    gradients = measures["gradients"]
    return DemoLine(title, accuracy, nll, ece, None if gradients is None else int(gradients))


def demo_recipe(
    output: Path, arm: str, held_out: str, steps: int = STEPS, images_per_class: int = IMAGES_PER_CLASS
) -> Recipe:
    """What the demo runs: the recipe of the studies, with one of ``ARMS``; ``held_out`` may be ``all``."""
    _, method, objective = ARMS[arm]
    return Recipe(
        name=f"demo-{arm}",
        output=output / "runs",
        backbone=BackboneConfig(name="demo"),
        adapter=LoraAdapterConfig(blocks=LastBlocks(last=2), projections=["q", "v", "out", "fc1", "fc2"]),
        method=MethodConfig.model_validate(method),
        objective=ObjectiveConfig.model_validate(objective),
        data=DataConfig(shapes=ShapesConfig(images_per_class=images_per_class)),
        augment=AugmentConfig(kind="none"),  # so that two of the four blocks run once per picture, for all arms
        features=FeatureConfig(store=True, folder=output / "features"),
        protocol=ProtocolConfig(held_out=held_out),
        train=TrainConfig(
            steps=steps,
            batch_size=40,
            learning_rate=2e-3,
            warmup_steps=min(10, steps - 1),
            validate_every=min(20, steps),
            log_every=5,
            log_ascent_cosine=arm == "disam",  # of SAM it is 1
        ),
        evaluation=EvaluationConfig(sharpness=SHARPNESS),
    )


def domain_sheet(dataset: DomainDataset, *, cell: int = 64) -> bytes:
    """A PNG with one image of each class (columns) in each domain (rows)."""
    sheet = Image.new("RGB", (cell * len(dataset.classes), cell * len(dataset.domains)), "white")
    for row in range(len(dataset.domains)):
        for column in range(len(dataset.classes)):
            found = np.flatnonzero((dataset.domain_ids == row) & (dataset.labels == column))
            if len(found):
                sheet.paste(dataset.image(int(found[0])).resize((cell, cell)), (cell * column, cell * row))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
