"""Floating-point operations that a step executes, and what the device can do of them and copy in a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .measure import finish

# torch knows the formulas for its attention on GPUs alone. It hands over the arguments' shapes.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad_out, query, key, value, *_, **__: sdpa_backward_flop_count(grad_out, query, key, value)
    ),
}
MATRIX_SIZE = 8192
COPY_BYTES = 2**28


@dataclass(frozen=True)
class Flops:
    """What was executed, forward and backward, with and without a graph.

    Attributes:
        total: matrix products, convolutions and attention; whatever backward computes again counts again.
        attention: of it, in fused attention.
    """

    total: int
    attention: int


def count_flops(run: Callable[[], object]) -> Flops:
    """Of one eager call: inside compiled code nothing is counted."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    by_operator = counter.get_flop_counts().get("Global", {})
    attention = sum(count for operator, count in by_operator.items() if "attention" in str(operator))
    return Flops(sum(by_operator.values()), attention)


def matrix_rate(device: torch.device, size: int | None = None, rounds: int = 15) -> float:
    """Operations a second in a bfloat16 product of random square matrices, the median; what "share" is a share of."""
    if size is None:
        size = MATRIX_SIZE if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b, rounds, device)


def copy_rates(device: torch.device, size: int = COPY_BYTES, rounds: int = 5) -> dict[str, float]:
    """Bytes a second: copied within the device (each is read and written, and counts once), and to it."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    here = torch.zeros(size, dtype=torch.uint8)
    found = {"device to device": size / _median_seconds(lambda: other.copy_(there), rounds, device)}
    if device.type == "cuda":
        pinned = here.pin_memory()
        found["pinned memory to device"] = size / _median_seconds(
            lambda: there.copy_(pinned, non_blocking=True), rounds, device
        )
        found["pageable memory to device"] = size / _median_seconds(lambda: there.copy_(here), rounds, device)
    return found


def _median_seconds(run: Callable[[], object], rounds: int, device: torch.device, repeats: int = 5) -> float:
    for _ in range(3):
        run()
    seconds = []
    for _ in range(rounds):
        finish(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        finish(device)
        seconds.append((time.perf_counter() - start) / repeats)
    return statistics.median(seconds)
