"""The part of a page about one held-out domain: curves, sharpness and mistakes of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from disam_peft.common.records import ExampleError
from disam_peft.report.drawing import Drawing, draw
from disam_peft.report.figures import cosine_curves, domain_curves, titles
from disam_peft.report.maps import LARGEST_MATRIX, confusion_maps, loss_planes
from disam_peft.report.result_tables import METHOD_TITLES, ComparisonTable, training_domains
from disam_peft.report.runs import RunRecord
from disam_peft.report.sharpness_tables import compare_sharpness


@dataclass(frozen=True)
class Group:
    """The runs of one held-out domain, backbone and adapter. Tables are over all seeds, figures of the first."""

    held_out: str | None
    about: str
    losses: Drawing | None
    weights: Drawing | None
    cosine: Drawing | None
    sharpness: ComparisonTable | None
    planes: Drawing | None
    confusion: Drawing | None
    errors: list[tuple[str, list[ExampleError]]]

    @property
    def training(self) -> str:
        """On which domains, in words."""
        return training_domains(self.held_out)

    @property
    def judged(self) -> str:
        """Which images the loss plane and the mistakes are of."""
        return "held-back images" if self.held_out is None else self.held_out

    @property
    def drawings(self) -> list[Drawing]:
        every = (self.losses, self.weights, self.cosine, self.planes, self.confusion)
        return [drawing for drawing in every if drawing is not None]


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The groups by held-out domain, backbone and adapter."""

    def place(run: RunRecord) -> tuple[str, str, str]:
        return run.trained.held_out or "", run.trained.backbone, run.trained.adapter

    members = groupby(sorted(runs, key=place), key=place)
    return [_group(number, list(found)) for number, (_, found) in enumerate(members, start=1)]


def _group(number: int, runs: list[RunRecord]) -> Group:
    row, order = runs[0].trained, list(METHOD_TITLES)
    seeds = sorted({run.trained.seed for run in runs})
    first = [run for run in runs if run.trained.seed == seeds[0]]
    shown = sorted(first, key=lambda run: order.index(run.trained.method))
    names = titles(shown)
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"figures of seed {seeds[0]}, the first of {len(seeds)}"
    tables = compare_sharpness(row for run in runs for row in run.sharpness)
    prefix = f"{number:02d}_{'all_domains' if row.held_out is None else row.held_out}"
    curves = [run for run in shown if run.steps]
    cosines = [run for run in curves if any(step.get("ascent_cosine") is not None for step in run.steps)]
    planes = [(name, plane) for name, run in zip(names, shown, strict=True) for plane in run.loss_slices]
    matrices = [
        (name if row.held_out is not None else f"{name}, {matrix.domain}", matrix)
        for name, run in zip(names, shown, strict=True)
        for matrix in run.confusions
        if len(matrix.classes) <= LARGEST_MATRIX
    ]
    return Group(
        held_out=row.held_out,
        about=f"{row.adapter} on {row.backbone}, {seed}",
        losses=draw(
            f"{prefix}_losses",
            "Loss of each source domain over the steps of training, a panel per method",
            partial(domain_curves, curves, "domain_loss", "loss"),
        )
        if curves
        else None,
        weights=draw(
            f"{prefix}_weights",
            "Weight of each source domain in the ascent direction over the steps, a panel per method",
            partial(domain_curves, curves, "domain_weight", "weight in the ascent"),
        )
        if curves
        else None,
        cosine=draw(
            f"{prefix}_cosine",
            "Cosine between the ascent direction and that of plain SAM over the steps",
            partial(cosine_curves, cosines),
        )
        if cosines
        else None,
        sharpness=tables[0] if tables else None,
        planes=draw(
            f"{prefix}_loss_planes",
            "Loss in a plane around the trained weights, a panel per method",
            partial(loss_planes, planes),
        )
        if planes
        else None,
        confusion=draw(
            f"{prefix}_confusion",
            f"Confusion matrix on {row.held_out or 'held-back images'}, a panel per method",
            partial(confusion_maps, matrices),
        )
        if matrices
        else None,
        errors=[(name, run.errors) for name, run in zip(names, shown, strict=True) if run.errors],
    )
