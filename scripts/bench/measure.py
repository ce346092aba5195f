"""Interleaved timing, ratios and the table that is printed."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        values: one per round that counts.
        target: the most that the median should be; None where none was set.
        difference: of the gradients, see ``steps.difference``; None where no gradients are compared.
        rounding: that of the peer's float32 gradient from the float64 gradient: what float32 itself is worth here.
        unit: empty for ratios.
    """

    what: str
    values: Sequence[float]
    target: float | None = None
    difference: float | None = None
    rounding: float | None = None
    unit: str = ""


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    cold_rounds: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, A B A B ..., after ``cold_rounds`` that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(cold_rounds + rounds):
        for name, run in variants.items():
            finish(device)
            start = clock()
            run()
            finish(device)
            if number >= cold_rounds:
                seconds[name].append(clock() - start)
    return seconds


def ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """Round by round: what slows the machine down for a while slows both."""
    return [a / b for a, b in zip(ours, other, strict=True)]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| what | median | smallest | largest | target | gradient difference | float32 rounding of the peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, low, high = (_number(pick(row.values), row.unit) for pick in (statistics.median, min, max))
        target = "" if row.target is None else f"<= {_number(row.target, row.unit)}"
        errors = ("" if value is None else f"{value:.0e}" for value in (row.difference, row.rounding))
        lines.append(f"| {row.what} | {median} | {low} | {high} | {target} | {' | '.join(errors)} |")
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    parts = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    threads = torch.get_num_threads()
    return ", ".join(
        [*parts, _processor(), f"{os.cpu_count()} cores", f"{threads} threads", f"torch {torch.__version__}"]
    )


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".rstrip()


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
