"""From nothing to a report: the small CLIP that ships with the package, on the benchmark that ships with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from disam_peft.common.files import output_folder
from disam_peft.common.records import ResultRow
from disam_peft.config.adapters import LastBlocks, LoraAdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig
from disam_peft.config.evaluation import EvaluationConfig, SharpnessConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.shapes import ShapesConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.experiments import run
from disam_peft.experiments.export_run import export_run
from disam_peft.report.page import Picture, build_report
from disam_peft.report.runs import read_runs

# a look at the measures in seconds; a study takes the defaults
SHARPNESS = SharpnessConfig(
    samples=48, ascent_steps=4, hessian_iterations=16, hessian_tolerance=0.05, gradient_group=2, slice_points=7
)
METHODS = ("erm", "sam", "disam")
STEPS, IMAGES_PER_CLASS = 150, 20
INTRODUCTION = (
    "DomainShapes has twelve shapes in six styles. A CLIP of 1.2 million parameters saw other drawings of them, under "
    "captions that mix up some of the names, as captions do. LoRA adapts it to five of the styles, with plain "
    "empirical risk minimization (ERM), sharpness-aware minimization (SAM) and DISAM; the sixth style is used for "
    "nothing but the numbers below.",
    "One seed, a minute of training and a model this small show how the pieces work together, not which method is "
    "better: differences of a few points are within what another seed would change.",
)


def demo(
    output: Path,
    held_out: str,
    *,
    steps: int = STEPS,
    images_per_class: int = IMAGES_PER_CLASS,
    say: Callable[[str], object] = print,
) -> list[ResultRow]:
    """Train and judge LoRA with every method; leave ``report.html``, ``domains.png``, ``runs/``, ``adapter/`` and
    ``features/``, which may go.

    Runs of an earlier demo in ``output`` are kept. Returns the rows of all runs.

    Raises:
        UserError: ``held_out`` is no domain; ``output`` holds a demo with other settings.
    """
    output_folder(output)
    recipes = [demo_recipe(output, method, held_out, steps, images_per_class) for method in METHODS]
    sheet = domain_sheet(load(recipes[0].data))
    (output / "domains.png").write_bytes(sheet)
    say(f"wrote {output / 'domains.png'}: the classes (columns) in the domains (rows)")
    rows = []
    for recipe in recipes:
        say(f"training LoRA with {recipe.method.name.upper()} on every domain but {held_out}")
        [outcome] = run.train(recipe)
        rows += outcome.rows
    if not (output / "adapter").exists():
        export_run(recipes[-1].folder(recipes[-1].protocol.domain), "peft", output / "adapter")
    picture = Picture("The classes (columns) in the domains (rows).", sheet)
    title = f"LoRA on a small CLIP, judged on {held_out}"
    runs = read_runs([output / "runs"])
    build_report(runs, output / "report.html", title=title, introduction=INTRODUCTION, pictures=[picture])
    return rows


def demo_recipe(
    output: Path, method: str, held_out: str, steps: int = STEPS, images_per_class: int = IMAGES_PER_CLASS
) -> Recipe:
    """What the demo runs; ``held_out`` may be ``all``."""
    return Recipe(
        name=f"demo-{method}",
        output=output / "runs",
        backbone=BackboneConfig(name="demo"),
        adapter=LoraAdapterConfig(blocks=LastBlocks(last=2), projections=["q", "v", "out", "fc1", "fc2"]),
        method=MethodConfig.model_validate({"name": method}),
        data=DataConfig(shapes=ShapesConfig(images_per_class=images_per_class)),
        augment=AugmentConfig(kind="none"),  # so that two of the four blocks run once per picture, for all methods
        features=FeatureConfig(store=True, folder=output / "features"),
        protocol=ProtocolConfig(held_out=held_out),
        train=TrainConfig(
            steps=steps,
            batch_size=60,
            learning_rate=2e-3,
            warmup_steps=min(10, steps - 1),
            log_every=5,
            log_ascent_cosine=method == "disam",  # of SAM it is 1
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
