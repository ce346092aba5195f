"""Checks of the precisions that the device has."""

from __future__ import annotations

import math
from typing import Literal

import torch

from disam_peft.doctor.check_result import CheckResult, differing, measured, unavailable
from disam_peft.doctor.subject import Subject
from disam_peft.errors import UserError
from disam_peft.training.accelerator import check_precision

RECAST = "autocast casts anew for pass 2"
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"bf16": 0.3, "fp16": 0.1}
"""Length of a gradient's difference from the one in float32, relative to that one's."""
SCALES = (2.0**14, 2.0**10, 2.0**6, 2.0**2)

Precision = Literal["no", "bf16", "fp16"]


def name_of(precision: Precision) -> str:
    return {"no": "a step in fp32", "bf16": "a step in bf16", "fp16": "a step in fp16 with a scaler"}[precision]


def lacking(precision: Precision, device: torch.device) -> str | None:
    """The reason why the device does not have this precision; None where it has it."""
    try:
        check_precision(precision, device)
    except UserError as error:
        return str(error).removeprefix(f"train.mixed_precision={precision}").strip(" :")
    return None


def stepping(subject: Subject, precision: Precision) -> CheckResult:
    """The gradient of a step in this precision: finite, and near the one in float32 (fp32: near that in float64)."""
    check = name_of(precision)
    reason = lacking(precision, subject.device)
    if reason is not None:
        return unavailable(check, reason)
    if precision == "no" and subject.exact_dtype == torch.float32:
        finite = torch.isfinite(_step(subject.use(torch.float32), "no"))
        return measured(check, "numbers of the gradient that are not finite", int((~finite).sum()), 0)
    wanted_P = _step(subject.use(torch.float64 if precision == "no" else torch.float32), "no")
    found_P = _step(subject.use(torch.float32), precision)
    distance = float((found_P - wanted_P).norm() / wanted_P.norm())
    against = "float64" if precision == "no" else "float32"
    limit = 1e-3 if precision == "no" else LIMITS[precision]
    return measured(check, f"distance of the gradient from that in {against}, relative", distance, limit)


def _step(subject: Subject, precision: Precision) -> torch.Tensor:
    """The gradient of a step, (P,), NaN where it is not finite."""
    few, domains_B = subject.few, subject.domains_B[subject.few]
    losses = subject.losses(few, autocast=DTYPES[precision])
    gradient_P = subject.weights() * math.nan
    for scale in SCALES if precision == "fp16" else (1.0,):  # a scaler that meets an overflow backs off
        scaler = torch.amp.GradScaler(subject.device.type, init_scale=scale, enabled=precision == "fp16")
        disam = subject.disam(backward=lambda loss, scaler=scaler: scaler.scale(loss).backward())
        report = disam.backward(losses, domains_B)
        gradient_P = subject.gradient() / scale
        if bool(report.is_finite & torch.isfinite(gradient_P).all()):
            return gradient_P
    return gradient_P * math.nan


def recasting(subject: Subject) -> CheckResult:
    """One autocast around both passes, as a user's loop may have it, against the same without a cache, bit for bit.

    Autocast keeps its casts of the weights until its block ends. Served to pass 2 they would be those of the
    unperturbed weights, and the step plain SGD, with nothing to be seen.
    """
    precision: Precision = "bf16" if lacking("bf16", subject.device) is None else "fp16"
    few, dtype = subject.use(torch.float32).few, DTYPES[precision]
    # a tenth of the weights' norm: more than half precision rounds away
    disam, found = subject.disam(rho=0.1 * float(subject.weights().norm())), []
    for cached in (True, False):
        with torch.autocast(subject.device.type, dtype=dtype, cache_enabled=cached):
            disam.backward(subject.losses(few, autocast=dtype, outside=True), subject.domains_B[few])
        found.append(subject.gradient())
    return measured(RECAST, f"numbers that differ, of {len(found[0])}, {precision}", differing(*found), 0)
