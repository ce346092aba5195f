"""The section for GPUs as Markdown and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .gpu_case import Agreement, Result
from .kernels import MATRIX

COLUMNS = (
    "case",
    "variant",
    "batch",
    "ms a step",
    "min - max",
    "images/s",
    "peak GB",
    "TFLOP a step",
    "TFLOP/s",
    "of the matrix rate",
    "bound ms",
    "/ naive SAM",
    "/ plain ERM",
    "limited by",
)
AGREEMENT_COLUMNS = ("gradients: ours from the peer's", "float32", "bf16 autocast", "the peer's own, bf16 from float32")
COMPILED_COLUMNS = ("compiled blocks", "batch", "first step", "time / eager", "gradients from the eager ones")


@dataclass
class Section:
    """What was measured on one model.

    Attributes:
        matrix_rate: operations a second of the device, taken just before.
        left_out: what the minutes did not suffice for.
    """

    model: str
    matrix_rate: float
    results: list[Result] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Tables of times, of gradients and of compiled blocks, as far as there are any."""
        parts = [f"### {self.model}", f"bf16 matrix rate of the device: {self.matrix_rate / 1e12:.3g} TFLOP/s"]
        parts.append(_table(COLUMNS, [row(result, self.matrix_rate) for result in self.results]))
        if self.agreements:
            columns = (
                "gradients: ours from the peer's",
                "float32",
                "bf16 autocast",
                "the peer's own, bf16 from float32",
            )
            parts.append(_table(columns, [_agreement_row(one) for one in self.agreements]))
        compiled = [result for result in self.results if result.first_seconds is not None]
        if compiled:
            parts.append(_table(COMPILED_COLUMNS, [_compiled_row(one) for one in compiled]))
        if self.left_out:
            parts.append("Left out, as the minutes were used up: " + "; ".join(self.left_out) + ".")
        return "\n\n".join(parts)


def row(result: Result, matrix_rate: float) -> list[str]:
    """The cells of ``COLUMNS``; those that are not known are empty."""
    known = {"case": result.case, "variant": result.variant, "batch": str(result.batch)}
    seconds = result.median
    if seconds is None:
        known["limited by"] = f"**{result.problem or 'not timed'}**"
    else:
        known |= {
            "ms a step": f"{1e3 * seconds:.4g}",
            "min - max": f"{1e3 * min(result.seconds):.4g} - {1e3 * max(result.seconds):.4g}",
            "images/s": f"{result.batch / seconds:.4g}",
            "limited by": result.limited_by + _within_products(result, matrix_rate),
        }
        known |= {
            column: f"{median(values):.3g}"
            for column, values in (("/ naive SAM", result.over_sam), ("/ plain ERM", result.over_erm))
            if values
        }
    if result.peak_bytes is not None:
        known["peak GB"] = f"{result.peak_bytes / 1e9:.3g}"
    if result.flops is not None:
        known["TFLOP a step"] = f"{result.flops.total / 1e12:.3g}"
        bound = result.flops.total / matrix_rate
        known["bound ms"] = f"{1e3 * bound:.3g}"
        if seconds is not None:
            known["TFLOP/s"] = f"{result.flops.total / seconds / 1e12:.3g}"
            known["of the matrix rate"] = f"{100 * bound / seconds:.3g} %"
    return [known.get(column, "") for column in COLUMNS]


def _within_products(result: Result, matrix_rate: float) -> str:
    """How fast the kernels of matrix products alone are: narrow ones do not reach the rate of a large square one."""
    seconds = result.kernel_seconds.get(MATRIX, 0.0)
    if result.flops is None or seconds == 0:
        return ""
    products = result.flops.total - result.flops.attention
    return f" (products at {100 * products / seconds / matrix_rate:.0f} % of the rate)"


def line(result: Result, matrix_rate: float) -> str:
    """The row for whoever watches."""
    return " | ".join(cell or "-" for cell in row(result, matrix_rate))


def save(path: Path, facts: dict[str, Any], sections: Sequence[Section]) -> None:
    """All raw numbers; whole at any time, whenever the run ends."""
    content = {**facts, "sections": [asdict(section) for section in sections]}
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _agreement_row(one: Agreement) -> list[str]:
    return [one.case, *(f"{value:.0e}" for value in (one.wide, one.mixed, one.rounding))]


def _compiled_row(one: Result) -> list[str]:
    return [
        f"{one.case}: {one.variant}",
        str(one.batch),
        _or_empty(one.first_seconds, lambda value: f"{value:.3g} s"),
        f"{median(one.over_eager):.3g}" if one.over_eager else "",
        _or_empty(one.eager_difference, lambda value: f"{value:.0e}"),
    ]


def _or_empty(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
