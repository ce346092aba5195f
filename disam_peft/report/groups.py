"""The part of a page about one held-out domain: curves, sharpness and mistakes of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from disam_peft.common.records import ExampleError
from disam_peft.report.configurations import Configuration, configurations, data_titles
from disam_peft.report.drawing import Drawing, draw
from disam_peft.report.figures import cosine_curves, domain_curves, titles
from disam_peft.report.frontier_figure import frontier_curves
from disam_peft.report.held_out_tables import best_by_source_validation
from disam_peft.report.maps import LARGEST_MATRIX, confusion_maps, loss_planes
from disam_peft.report.reliability import reliability, reliability_curves
from disam_peft.report.result_tables import METHOD_TITLES, ComparisonTable, training_domains
from disam_peft.report.runs import RunRecord
from disam_peft.report.sharpness_tables import sharpness_by_title

SHOWN = 6
"""Configurations of one group whose curves, maps and mistakes are shown."""


@dataclass(frozen=True)
class Group:
    """The runs of one data set, held-out domain, backbone and adapter, or the best of them where there are many. Tables
    are over all seeds, figures of the first."""

    held_out: str | None
    about: str
    selected: str
    """How the configurations were chosen that are shown; empty where all are."""
    losses: Drawing | None
    weights: Drawing | None
    cosine: Drawing | None
    sharpness: ComparisonTable | None
    planes: Drawing | None
    confusion: Drawing | None
    reliability: Drawing | None
    frontier: Drawing | None
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
        every = (self.losses, self.weights, self.cosine, self.planes, self.confusion, self.reliability, self.frontier)
        return [drawing for drawing in every if drawing is not None]


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The groups by held-out domain, backbone, adapter and data."""
    found = configurations(runs)
    of_data = data_titles(found)
    members: dict[tuple[str, bool, str, str, str], list[Configuration]] = {}
    for one in found:
        for held_out in sorted({run.trained.held_out for run in one.runs}, key=lambda name: (name is None, name)):
            part = one.without(held_out)
            if part is not None:
                place = (held_out or "", held_out is None, one.backbone, one.adapter, one.data.identity)
                members.setdefault(place, []).append(part)
    return [_group(number, members[place], of_data[place[-1]]) for number, place in enumerate(sorted(members), start=1)]


def _group(number: int, members: list[Configuration], data: str) -> Group:
    order = list(METHOD_TITLES)
    chosen = best_by_source_validation(members, SHOWN)
    chosen = sorted(chosen, key=lambda one: order.index(one.method))
    row = chosen[0].runs[0].trained
    seeds = sorted({run.trained.seed for one in chosen for run in one.runs})
    shown = [min(one.runs, key=lambda run: run.trained.seed) for one in chosen]
    of_all = titles([min(one.runs, key=lambda run: run.trained.seed) for one in members])
    names = [of_all[members.index(one)] for one in chosen]
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"figures of seed {seeds[0]}, the first of {len(seeds)}"
    if len({run.trained.seed for run in shown}) > 1:
        seed = f"figures of the first of the seeds {', '.join(map(str, seeds))} that each configuration has"
    named = zip(names, chosen, strict=True)
    tables = sharpness_by_title(
        [(name, run.sharpness_settings, run.sharpness) for name, one in named for run in one.runs]
    )
    selected = (
        f"{len(chosen)} of {len(members)} configurations are shown, of each method those with the highest accuracy on "
        "source validation; the tables above have all of them"
    )
    prefix = f"{number:02d}_{'all_domains' if row.held_out is None else row.held_out}"
    curves = [(name, run) for name, run in zip(names, shown, strict=True) if run.steps]
    cosines = [(name, run) for name, run in curves if any(step.get("ascent_cosine") is not None for step in run.steps)]
    planes = [(name, plane) for name, run in zip(names, shown, strict=True) for plane in run.loss_slices]
    # another evaluation may have left predictions for other data, which have other splits
    judged = ("held_out",) if row.held_out is not None else ("test", "source_validation")
    bins = []
    for name, run in zip(names, shown, strict=True):
        found = [] if run.predictions is None else [reliability(run.predictions, split) for split in judged]
        bins += [(name, of_split) for of_split in found if of_split][:1]
    matrices = [
        (name if row.held_out is not None else f"{name}, {matrix.domain}", matrix)
        for name, run in zip(names, shown, strict=True)
        for matrix in run.confusions
        if len(matrix.classes) <= LARGEST_MATRIX
    ]
    lines = [(name, run.frontier) for name, run in zip(names, shown, strict=True)]
    frontiers = [(name, [line]) for name, line in lines if line is not None]
    return Group(
        held_out=row.held_out,
        about=f"{row.adapter} on {row.backbone}, {f'{data}, ' if data else ''}{seed}",
        selected=selected if len(chosen) < len(members) else "",
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
        reliability=draw(
            f"{prefix}_reliability",
            "Share of right predictions over their confidence, a line per method; dotted: equal",
            partial(reliability_curves, bins),
        )
        if bins
        else None,
        frontier=draw(
            f"{prefix}_frontier",
            "Accuracy against accuracy on source validation, and accuracy, likelihood and calibration over alpha, from "
            "zero-shot to trained weights, a line per method",
            partial(frontier_curves, frontiers),
        )
        if frontiers
        else None,
        errors=[(name, run.errors) for name, run in zip(names, shown, strict=True) if run.errors],
    )
