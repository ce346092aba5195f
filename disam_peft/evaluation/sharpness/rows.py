"""The sharpness of a trained classifier as rows of records: on which samples it is measured, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.random import keyed_seed
from disam_peft.common.records import POOL_NAMES, LossSlice, ResultRow
from disam_peft.config.evaluation import SharpnessConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.evaluation.sharpness.measures import (
    extreme_eigenvalue,
    fixed_direction,
    gradient_variance,
    orthonormal,
    plane_losses,
    worst_loss,
)
from disam_peft.evaluation.sharpness.surface import LossSurface, classifier_surface


def sharpness_rows(
    classifier: ClipClassifier,
    parts: Mapping[str, DomainDataset],
    config: SharpnessConfig,
    like: ResultRow,
    *,
    batch_size: int = 64,
    workers: int | Literal["auto"] = 0,
) -> tuple[list[ResultRow], LossSlice | None]:
    """Measure the sharpness at the present weights, which have the same bits afterwards.

    Metrics: ``sample_loss`` (mean cross entropy of the sample), ``worst_loss_rho_R`` and ``sharpness_rho_R`` (their
    difference), ``gradient_norm``, ``hessian_max`` with ``hessian_residual`` (largest algebraic eigenvalue) and
    ``gradient_variance``. All of them depend on how the weights are scaled: compare methods on one adapter, not
    adapters. (DoRA holds its norms constant when it differentiates; its Hessian is of that gradient.)

    Args:
        parts: split -> its samples; the slice is of the split ``held_out``, or of the first one where nothing
            was held out.
        like: any row of the same classifier, for what the rows have in common.
    """
    rows, plane = [], None
    sliced = "held_out" if "held_out" in parts else next(iter(parts))
    was_training = classifier.training
    classifier.eval()
    try:
        # the fused attention kernels have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            for split, dataset in parts.items():
                sample = balanced_sample(dataset, config.samples, config.seed)
                surface = classifier_surface(classifier, sample, batch_size=batch_size, workers=workers)
                domains, n = sample.present_domains, len(sample)
                whole = len(domains) > 1
                name = POOL_NAMES["all"] if whole else domains[0]
                at = replace(like, split=split, domain=name, pooled="all" if whole else None, n=n)
                values, found = _measure(surface, config, sliced=split == sliced and config.slice_points > 0)
                rows += [replace(at, metric=metric, value=value) for metric, value in values.items()]
                if found is not None:
                    plane = replace(found, split=at.split, domain=at.domain, n=n)
    finally:
        classifier.train(was_training)
    return rows, plane


def balanced_sample(dataset: DomainDataset, count: int, seed: int) -> DomainDataset:
    """At most ``count`` samples, as many of every domain, one at least, chosen and shuffled by key and seed."""
    domains = np.unique(dataset.domain_ids)
    smallest = min(int((dataset.domain_ids == domain).sum()) for domain in domains)
    each = max(1, min(smallest, count // len(domains)))

    def rank(index: int) -> tuple[int, str]:
        return keyed_seed("sharpness", seed, dataset.keys[index]), dataset.keys[index]

    chosen: list[int] = []
    for domain in domains:
        chosen += sorted(np.flatnonzero(dataset.domain_ids == domain).tolist(), key=rank)[:each]
    return dataset.select(sorted(chosen, key=rank))


def _measure(
    surface: LossSurface, config: SharpnessConfig, *, sliced: bool
) -> tuple[dict[str, float | None], LossSlice | None]:
    values: dict[str, float | None] = {}
    loss, gradient_P = surface.loss_and_gradient()
    values["sample_loss"], values["gradient_norm"] = loss, float(gradient_P.norm())
    for rho in config.rhos:
        ball = worst_loss(surface, rho, config.ascent_steps)
        values[f"worst_loss_rho_{rho:g}"], values[f"sharpness_rho_{rho:g}"] = ball.worst, ball.difference
    largest = extreme_eigenvalue(surface, iterations=config.hessian_iterations, tolerance=config.hessian_tolerance)
    values["hessian_max"], values["hessian_residual"] = largest.value, largest.residual
    values["gradient_variance"] = gradient_variance(surface, config.gradient_group)
    if not sliced:
        return values, None
    names, plane = ["gradient", "top eigenvector"], (gradient_P, largest.vector_P)
    if config.slice_directions == "random":
        names = ["random", "random"]
        seed = 2 * config.seed + 10
        plane = (fixed_direction(gradient_P, seed), fixed_direction(gradient_P, seed + 1))
    grid = plane_losses(surface, *orthonormal(*plane), config.slice_radius, config.slice_points)
    losses: list[list[float | None]] = [list(row) for row in grid.losses]
    return values, LossSlice("", "", 0, names, list(config.rhos), grid.coordinates, losses)
