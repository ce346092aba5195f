"""Checks of the model: its gradient is the derivative of its loss, and merging changes no logit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from disam_peft.backbones.with_model import with_model
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.doctor.check_result import CheckResult, largest_relative, measured, unavailable
from disam_peft.doctor.subject import Subject
from disam_peft.errors import UserError
from disam_peft.export.merged import TOLERANCE

DERIVATIVES = "gradients are derivatives"
MERGED = "merged equals unmerged"
FLOAT32_STEPS = (3e-3, 3e-4, 1e-4)
"""By how much of itself a central difference moves the loss to each side."""


def derivatives(subject: Subject) -> CheckResult:
    """Autograd against central differences: along a direction through all tensors, and through single ones.

    A direction is the gradient's own plus half a random one, so that nothing of what is compared is near zero. In
    float64 the step is 1e-6 and the limit 1e-5. In float32 the limit is 3 %, and each direction is tried with several
    steps, of which the best counts: the largest moves the loss by 1/300 of itself, far above its rounding, and smaller
    ones are for functions with kinks (ReLU), which are straight lines only over short distances. A gradient that is
    wrong by a factor, or lacks a term, is off by more with every step. Single tensors are those with the largest
    gradients then.
    """
    config = subject.classifier.adapter.config if subject.classifier.adapter is not None else None
    if getattr(config, "method", None) == "dora":
        return unavailable(
            DERIVATIVES, "by design DoRA's gradient holds its weight norms constant (arXiv 2402.09353, 4.3)"
        )
    exact = subject.use(subject.exact_dtype).exact_dtype == torch.float64
    loss, params = subject.losses(), subject.params
    loss().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    subject.gradient()
    whole = torch.cat([g.reshape(-1) for g in gradients]).norm()
    chosen = _chosen_tensors(gradients, 12 if exact and subject.quick else 2, largest=not exact)
    generator, errors = torch.Generator().manual_seed(1), []
    for members in [list(range(len(params))), *[[place] for place in chosen]]:
        direction = _direction([gradients[i] for i in members], generator)
        analytic = sum(float((gradients[i] * d).sum()) for i, d in zip(members, direction, strict=True))
        unit = 1.0 if exact else float(loss().detach().sum()) / max(abs(analytic), 1e-3 * float(whole))
        moved = [params[i] for i in members]
        differences = [
            _difference(loss, moved, direction, step * unit) for step in ((1e-6,) if exact else FLOAT32_STEPS)
        ]
        errors.append(min(abs(found - analytic) / max(abs(found), 1e-4 * float(whole)) for found in differences))
    what = f"relative error along 1 + {len(chosen)} directions, {subject.precision}"
    return measured(DERIVATIVES, what, max(errors), 1e-5 if exact else 3e-2)


def _chosen_tensors(gradients: list[Tensor], count: int, *, largest: bool) -> list[int]:
    places = list(range(len(gradients)))
    if len(places) <= 1:
        return []
    if largest:  # the others would drown in rounding
        return sorted(places, key=lambda i: -float(gradients[i].norm()))[:count]
    if len(places) <= count:
        return places
    return sorted({round(k * (len(places) - 1) / (count - 1)) for k in range(count)})


def _direction(gradients: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    randoms = [torch.randn(g.shape, generator=generator).to(g) for g in gradients]
    lengths = [float(torch.cat([t.reshape(-1) for t in of]).norm()) for of in (gradients, randoms)]
    along = 1 / lengths[0] if lengths[0] > 0 else 0.0
    return [g * along + r * (0.5 / lengths[1]) for g, r in zip(gradients, randoms, strict=True)]


@torch.no_grad()
def _difference(loss: Callable[[], Tensor], moved: list[Tensor], direction: list[Tensor], step: float) -> float:
    """Central difference of the summed loss; the weights are copied back."""
    kept, values = [p.clone() for p in moved], []
    for sign in (1, -1):
        for p, before, d in zip(moved, kept, direction, strict=True):
            p.copy_(before + sign * step * d)
        values.append(float(loss().double().sum()))
    for p, before in zip(moved, kept, strict=True):
        p.copy_(before)
    return (values[0] - values[1]) / (2 * step)


@torch.no_grad()
def merging(subject: Subject) -> CheckResult:
    """Logits of a merged copy against those of the live model; the limit in float32 is that of the export."""
    subject.use(subject.exact_dtype)
    classifier = subject.classifier
    assert classifier.adapter is not None
    try:
        merged = classifier.adapter.merged(classifier.backbone)
    except UserError as error:
        return unavailable(MERGED, str(error).split("; ")[0])
    plain = with_model(classifier.backbone, merged)
    merged_logits_BC = ClipClassifier(plain, None, classifier.prompts)(subject.pixels())
    difference = largest_relative(merged_logits_BC, classifier.logits(subject.frozen()))
    limit = 1e-10 if subject.exact_dtype == torch.float64 else TOLERANCE
    return measured(MERGED, f"difference of logits, relative to the largest, {subject.precision}", difference, limit)
