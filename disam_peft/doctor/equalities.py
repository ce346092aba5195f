"""Checks of the step in one process: results that must be equal, bit for bit or up to rounding.

Shapes in this file: B samples, P numbers that are trained.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from disam_peft.doctor.check_result import CheckResult, differing, failed, largest_relative, measured
from disam_peft.doctor.subject import Subject

RESTORED = "a step gives the weights back"
INTERRUPTED = "so does one that breaks off"
ERM = "rho 0 is ERM"
SAM = "lambda 0 is SAM"
ACCUMULATED = "micro-batches equal the whole batch"
NUMBERS = "numbers that differ, of {}, float32"

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference of a gradient from the same one computed in another order, relative to its largest number."""


class _Interruption(Exception):
    """Raised inside a step, to interrupt it."""


def restoring(subject: Subject) -> CheckResult:
    """The weights after a step and an update with learning rate 0 must be the weights before it, although pass 2 saw
    perturbed ones."""
    subject.use(torch.float32)
    before_P, loss, moved = subject.weights(), subject.losses(), []

    def watched() -> Tensor:
        moved.append(differing(subject.weights(), before_P))
        return loss()

    subject.disam().backward(watched, subject.domains_B)
    torch.optim.SGD(subject.params, lr=0.0, momentum=0.9).step()
    subject.gradient()
    return _bits(RESTORED, subject, before_P, perturbed=len(moved) == 2 and moved[1] > 0)


def restoring_after_an_exception(subject: Subject) -> CheckResult:
    """The weights must also be restored where pass 2 raises an exception."""
    subject.use(torch.float32)
    before_P, loss, moved = subject.weights(), subject.losses(), []

    def failing() -> Tensor:
        moved.append(differing(subject.weights(), before_P))
        if len(moved) == 2:
            raise _Interruption
        return loss()

    with suppress(_Interruption):
        subject.disam().backward(failing, subject.domains_B)
    subject.gradient()
    return _bits(INTERRUPTED, subject, before_P, perturbed=len(moved) == 2 and moved[1] > 0)


def _bits(check: str, subject: Subject, before_P: Tensor, *, perturbed: bool) -> CheckResult:
    if not perturbed:
        return failed(check, "pass 2 saw the weights of pass 1: nothing was perturbed")
    return measured(check, NUMBERS.format(len(before_P)), differing(subject.weights(), before_P), 0)


def erm(subject: Subject) -> CheckResult:
    """The gradient at rho 0 must be that of the mean loss, bit for bit."""
    subject.use(torch.float32)
    subject.disam(rho=0.0).backward(subject.losses(), subject.domains_B)
    found_P = subject.gradient()
    subject.losses()().mean().backward()
    return measured(ERM, NUMBERS.format(len(found_P)), differing(found_P, subject.gradient()), 0)


def sam(subject: Subject) -> CheckResult:
    """The gradient at lambda 0 must be the one that is computed here from SAM's formula (arXiv 2010.01412), bit for
    bit."""
    subject.use(torch.float32)
    disam = subject.disam(variance_weight=0.0, adaptive=False, descent="sam")
    disam.rho_factors = {}
    disam.backward(subject.losses(), subject.domains_B)
    found_P = subject.gradient()

    loss, before_P = subject.losses(), subject.weights()
    loss().mean().backward()
    gradient_P = subject.gradient()
    _set(subject, before_P + gradient_P * (disam.rho / gradient_P.norm()))
    loss().mean().backward()
    _set(subject, before_P)
    return measured(SAM, NUMBERS.format(len(found_P)), differing(found_P, subject.gradient()), 0)


def accumulating(subject: Subject) -> CheckResult:
    """The gradient from micro-batches, in both modes, against that from the whole batch."""
    subject.use(subject.exact_dtype)
    disam, domains_B = subject.disam(), subject.domains_B
    disam.backward(subject.losses(), domains_B)
    wanted_P, errors = subject.gradient(), []
    mixed = list(torch.arange(len(domains_B), device=subject.device).tensor_split(3))
    of_one_domain = [(domains_B == domain).nonzero()[:, 0] for domain in domains_B.unique()]
    for mode, micro_batches in (("two_phase", mixed), ("per_domain", of_one_domain)):
        losses = [subject.losses(of) for of in micro_batches]
        disam.backward_accumulated(losses, [domains_B[of] for of in micro_batches], mode=mode)  # type: ignore[arg-type]
        errors.append(largest_relative(subject.gradient(), wanted_P))
    what = f"difference of gradients in both modes, relative, {subject.precision}"
    return measured(ACCUMULATED, what, max(errors), ROUNDING[subject.exact_dtype])


@torch.no_grad()
def _set(subject: Subject, weights_P: Tensor) -> None:
    params = subject.params
    for p, part in zip(params, weights_P.split([p.numel() for p in params]), strict=True):
        p.copy_(part.view_as(p))
