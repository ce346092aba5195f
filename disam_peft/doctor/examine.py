"""Runs all checks in order, as far as a limit of time allows."""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from disam_peft import __version__
from disam_peft.common.progress import track
from disam_peft.config.adapters import adapter_label
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.shapes import ShapesConfig
from disam_peft.doctor import derivatives, equalities, precision
from disam_peft.doctor.check_result import CheckResult, failed, unavailable
from disam_peft.doctor.subject import Subject, build_subject
from disam_peft.doctor.two_processes import PROCESSES, TwoProcesses

SECONDS = 40.0
"""The default limit of time. Together with Python's imports it is within a minute."""
BOOT = 15.0
"""Seconds that two processes take to import everything, beside their gradients."""
HALF = 6.0
"""How much longer half precision takes on CPUs without instructions for it."""

PACKAGES = ("torch", "open_clip_torch", "transformers", "peft", "accelerate")
"""Packages whose versions are reported."""


@dataclass(frozen=True)
class Check:
    """A claim, the function that examines it, and how many gradients of the batch that takes."""

    name: str
    gradients: float
    run: Callable[[Subject], CheckResult]


@dataclass(frozen=True)
class Examination:
    """Everything that was found. ``failed`` is the number of checks that failed."""

    environment: dict[str, str]
    subject: str
    findings: tuple[CheckResult, ...]
    seconds: float

    @property
    def failed(self) -> int:
        return sum(finding.verdict == "failed" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON types only; what is not finite is null there, and its verdict ``failed``."""
        findings = [asdict(finding) for finding in self.findings]
        for finding in findings:
            if finding["measured"] is not None and not math.isfinite(finding["measured"]):
                finding["measured"] = None
        return {**asdict(self), "findings": findings}


def checks(subject: Subject) -> list[Check]:
    """The checks in the order of the table: the quick ones first, since those behind may have no time left."""
    exact = 4.0 if subject.exact_dtype == torch.float64 else 1.0
    part = len(subject.domains_B[subject.few]) / len(subject.domains_B)
    half = part * (HALF if subject.device.type == "cpu" else 1.0)

    def cost(name: precision.Precision) -> float:
        return 0.0 if precision.lacking(name, subject.device) else 2 * half + 2 * part

    return [
        Check(equalities.RESTORED, 2, equalities.restoring),
        Check(equalities.INTERRUPTED, 1, equalities.restoring_after_an_exception),
        Check(equalities.ERM, 2, equalities.erm),
        Check(equalities.SAM, 4, equalities.sam),
        Check(derivatives.DERIVATIVES, exact * (1 + (26 if subject.quick else 6) / 3), derivatives.derivatives),
        Check(derivatives.MERGED, exact, derivatives.merging),
        Check(equalities.ACCUMULATED, 7 * exact, equalities.accumulating),
        Check(precision.name_of("no"), 2 * part * (1 + exact), partial(precision.stepping, precision="no")),
        Check(precision.name_of("bf16"), cost("bf16"), partial(precision.stepping, precision="bf16")),
        Check(precision.name_of("fp16"), cost("fp16"), partial(precision.stepping, precision="fp16")),
        Check(precision.RECAST, 4 * half, precision.recasting),
    ]


def examine(recipe: Recipe, *, seconds: float = SECONDS, device: torch.device | None = None) -> Examination:
    """Examine the recipe's backbone, adapter and method on this machine, on synthetic data.

    A check that would not fit into what is left of ``seconds`` is not run, and says so.

    Raises:
        UserError: the recipe's backbone or adapter cannot be built.
    """
    start = time.monotonic()
    device = device or this_device()
    findings: list[CheckResult] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM weights.*")  # good enough here
        subject = build_subject(recipe, device)

    def left() -> float:
        return seconds - (time.monotonic() - start)

    # seconds of a gradient; more once others use this machine, the two processes for one
    pace, done, begun = subject.seconds, 0.0, time.monotonic()
    needed = BOOT + 8 * subject.seconds
    ranks = TwoProcesses.start(recipe, subject.exact_dtype) if needed < left() else None
    try:
        with _repeatable(device):
            for check in track(checks(subject), "checking"):
                estimate = check.gradients * pace
                if estimate > left():
                    findings.append(_too_long(check.name, estimate))
                    continue
                findings.append(_run(check, subject))
                done += check.gradients
                pace = max(subject.seconds, (time.monotonic() - begun) / max(1.0, done))
        findings.append(_too_long(PROCESSES, needed) if ranks is None else ranks.finding(max(5.0, left())))
    finally:
        if ranks is not None:
            ranks.stop()
    label = f"{recipe.backbone.name}, {adapter_label(recipe.adapter)}, {recipe.method.name}"
    return Examination(environment(device), label, tuple(findings), time.monotonic() - start)


def this_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def environment(device: torch.device) -> dict[str, str]:
    """Names and versions, as text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"disam_peft": __version__, "python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    return found | {
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({name})",
        "cores": f"{cores}, torch uses {torch.get_num_threads()}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def demo_recipe() -> Recipe:
    """LoRA on the small CLIP that comes with the package."""
    return Recipe(
        name="doctor",
        backbone=BackboneConfig(name="demo"),
        adapter=LoraAdapterConfig(),
        data=DataConfig(shapes=ShapesConfig()),
        protocol=ProtocolConfig(held_out="painting"),
    )


def _run(check: Check, subject: Subject) -> CheckResult:
    try:
        with _weights_kept(subject):
            return check.run(subject)
    except Exception as error:  # the others can still be examined
        return failed(check.name, f"{type(error).__name__}: {error}")


@contextmanager
def _weights_kept(subject: Subject) -> Iterator[None]:
    """Restore the weights after a check, so that the next one starts from the same ones whatever happened."""
    subject.use(torch.float32)
    kept = [p.detach().clone() for p in subject.params]
    try:
        yield
    finally:
        subject.use(torch.float32).gradient()
        with torch.no_grad():
            for p, before in zip(subject.params, kept, strict=True):
                p.copy_(before)


def _too_long(check: str, seconds: float) -> CheckResult:
    return unavailable(check, f"would take about {seconds:.0f} s more here; --seconds gives more time")


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    """The fastest attention kernels of GPUs add up in another order every time. This context uses one that does not."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)
