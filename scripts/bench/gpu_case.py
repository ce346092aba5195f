"""One case of the section for GPUs: every variant of one adapter on one model, timed side by side.

A variant that fails, for want of memory or otherwise, is an entry of its own and takes nothing with it.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from disam_peft.adapters.base import Autocast

from .compiled import compile_blocks, compiled
from .flops import Flops, count_flops
from .gpu_models import Case
from .kernels import Kernel, by_category, kernels_of, limited_by
from .measure import finish, ratios
from .pair import Pair
from .steps import Pinned, Step, difference

T = TypeVar("T")

OUT_OF_MEMORY = "out of memory"
COMPILED = ", compiled"
ROUND_SECONDS = 0.1
MOST_STEPS = 50
SMALL_BATCH = 16


@dataclass
class Result:
    """What is known of one variant.

    Attributes:
        problem: why it is not known; None for a variant that ran.
        seconds: of a step, in each round.
        peak_bytes: on the device, with this variant's model alone there.
        flops: that a step executes; a compiled step is taken to execute what the eager one does.
        kernels: number in a step.
        kernel_seconds: by category.
        over_sam, over_erm, over_eager: ratios of the times, round by round.
        first_seconds: of a compiled variant's first step, which compiles what no variant before it had in common.
        eager_difference: of its gradients from those of the eager one.
        missing: why operations or kernels are not known of a variant that runs.
    """

    case: str
    variant: str
    batch: int
    problem: str | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flops: Flops | None = None
    kernels: int | None = None
    kernel_seconds: dict[str, float] = field(default_factory=dict)
    limited_by: str = ""
    over_sam: list[float] = field(default_factory=list)
    over_erm: list[float] = field(default_factory=list)
    over_eager: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    eager_difference: float | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and self.problem is None else None


@dataclass(frozen=True)
class Agreement:
    """How far our gradients are from the peer's, the largest over SAM and ERM, with and without a store; on a few
    images, as ``steps.difference``.

    Attributes:
        wide: in float32.
        mixed: in mixed precision.
        rounding: the peer's own in mixed precision from its own in float32.
    """

    case: str
    wide: float
    mixed: float
    rounding: float


def mixed_precision(device: torch.device) -> Autocast:
    return partial(torch.autocast, device.type, torch.bfloat16)


def agreement(case: Case, pair: Pair, device: torch.device) -> Agreement:
    """Of the case's models, before anything was timed on them."""
    with _exact_float32():
        wide = _gradients(case, pair.steps(SMALL_BATCH, store=Pinned))
    mixed = _gradients(case, pair.steps(SMALL_BATCH, autocast=mixed_precision(device), store=Pinned))
    peers = ("sam", "erm")
    return Agreement(
        case.name,
        wide=_largest_difference(wide),
        mixed=_largest_difference(mixed),
        rounding=max(difference(mixed[name], wide[name]) for name in peers),
    )


Gradients = dict[str, torch.Tensor]


def _largest_difference(found: dict[str, Gradients]) -> float:
    """Of ours from the peer's of the same method."""
    return max(
        difference(gradients, found[method])
        for method in ("sam", "erm")
        for name, gradients in found.items()
        if name.startswith(f"our {method}")
    )


def _gradients(case: Case, steps: dict[str, Step]) -> dict[str, Gradients]:
    endings = ("", ", stored") if "our disam, stored" in case.variants else ("",)
    names = ["sam", "erm", *(f"our {method}{ending}" for method in ("sam", "erm") for ending in endings)]
    return {name: steps[name].gradients() for name in names}


@contextmanager
def _exact_float32() -> Iterator[None]:
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    matrices.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        matrices.allow_tf32, convolutions.allow_tf32 = before


def measure(
    case: Case, pair: Pair, batch_size: int, rounds: int, device: torch.device, backend: str = "inductor"
) -> list[Result]:
    """The case at one batch size: each variant alone first (operations, memory, kernels), then all in turns."""
    found = {name: Result(case.name, case.label(name), batch_size) for name in case.variants}
    found |= {
        f"{name}{COMPILED}": Result(case.name, f"{case.label(name)}{COMPILED}", batch_size) for name in case.compiled
    }
    results = list(found.values())
    steps = attempt(results, lambda: _steps(case, pair, batch_size, device, backend), device)
    if steps is None:
        return results
    profiles: dict[str, list[Kernel]] = {}
    for side in ("peer", "ours"):
        with _alone(pair, side, device):
            for name, result in found.items():
                if _side(name) == side:
                    run_alone = partial(_alone_measures, found, name, steps, device)
                    profiles[name] = attempt([result], run_alone, device) or []
    _time(found, steps, rounds, device)
    for name, result in found.items():
        if result.median is not None:
            result.limited_by = limited_by(profiles[name], result.median)
        references = (("over_sam", "sam"), ("over_erm", "erm"), ("over_eager", name.removesuffix(COMPILED)))
        for attribute, reference in references:
            other = found.get(reference)
            if other is not None and other is not result and other.problem is None and result.problem is None:
                setattr(result, attribute, ratios(result.seconds, other.seconds))
    return results


def _steps(case: Case, pair: Pair, batch_size: int, device: torch.device, backend: str) -> dict[str, Step]:
    steps = pair.steps(batch_size, autocast=mixed_precision(device), store=Pinned)
    if case.compiled:
        torch.compiler.reset()
        sides = {"peer": compile_blocks(pair.peer, backend), "ours": compile_blocks(pair.classifier, backend)}
        steps |= {f"{name}{COMPILED}": compiled(steps[name], sides[_side(name)]) for name in case.compiled}
    return steps


def _side(name: str) -> str:
    return "ours" if name.startswith("our ") else "peer"


def _alone_measures(found: dict[str, Result], name: str, steps: dict[str, Step], device: torch.device) -> list[Kernel]:
    """Fills in what one variant's own steps show, and returns its kernels."""
    result, step, eager = found[name], steps[name], name.removesuffix(COMPILED)
    start = time.perf_counter()
    gradients = step.gradients()  # a first step computes what later ones keep, class features for one
    finish(device)
    if eager == name:
        result.flops = _unless_it_fails(result, partial(count_flops, step.launched or step.run), device)
    else:
        result.first_seconds = time.perf_counter() - start
        result.flops = found[eager].flops
        result.eager_difference = difference(gradients, steps[eager].gradients())
    if device.type == "cuda":
        finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        step.run()
        finish(device)
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
    kernels = _unless_it_fails(result, partial(kernels_of, step.run, device), device) or []
    result.kernels, result.kernel_seconds = len(kernels), by_category(kernels)
    return kernels


def _time(found: dict[str, Result], steps: Mapping[str, Step], rounds: int, device: torch.device) -> None:
    """Rounds A B A B ..., each of so many steps that it can be told from noise, after one that does not count."""
    steps_of_round: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, result in found.items():
            if result.problem is not None:
                continue
            count = steps_of_round.get(name, 1)
            seconds = attempt([result], partial(_seconds_per_step, steps[name].run, count, device), device)
            if number == 0 and seconds is not None:
                steps_of_round[name] = max(1, min(MOST_STEPS, math.ceil(ROUND_SECONDS / seconds)))
            elif seconds is not None:
                result.seconds.append(seconds)


def _seconds_per_step(run: Callable[[], object], count: int, device: torch.device) -> float:
    finish(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    finish(device)
    return (time.perf_counter() - start) / count


@contextmanager
def _alone(pair: Pair, side: str, device: torch.device) -> Iterator[None]:
    """The other side's model waits on the CPU: a user has one of them."""
    other: nn.Module = pair.classifier if side == "peer" else pair.peer
    other.to("cpu")
    try:
        yield
    finally:
        other.to(device)


def attempt(results: Sequence[Result], action: Callable[[], T], device: torch.device) -> T | None:
    """What ``action`` returns; None where it fails, which becomes the results' problem instead of everybody's."""
    try:
        return action()
    except Exception as error:
        problem = _problem(error)
    # Behind the handler: the frames of a traceback hold what is to be given back.
    for result in results:
        result.problem = problem
    release(device)
    return None


def _unless_it_fails(result: Result, action: Callable[[], T], device: torch.device) -> T | None:
    """What a variant can be timed without: machines may forbid a profiler, and counting follows torch's inner names."""
    entry = Result(result.case, result.variant, result.batch)
    found = attempt([entry], action, device)
    if entry.problem is not None:
        result.missing.append(entry.problem)
    return found


def _problem(error: Exception) -> str:
    text = str(error).strip()
    # cuBLAS and cuDNN report what they could not allocate as any other error
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
        return OUT_OF_MEMORY
    return f"failed: {type(error).__name__}: {text.splitlines()[0] if text else ''}"


def release(device: torch.device) -> None:
    """Give back to the device what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # of a device that is broken: what fails next says so itself
            torch.cuda.empty_cache()
