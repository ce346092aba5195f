"""The kernels of a step on the device, and what they say about what limits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import finish

Kernel = tuple[str, float]
"""Name and seconds."""

IDLE = 0.2
"""A device that idles for more of a step waits for its host."""
MENTIONED = 0.1

MATRIX, ATTENTION, SMALL, HOST_COPY, OTHER = (
    "matrix products",
    "attention",
    "element-wise, norms, copies",
    "copies from the host",
    "other kernels",
)
# In this order: names hold parts of other names (fmha_cutlass..., triton_poi_fused_..._flash_attention_...).
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (HOST_COPY, ("memcpy htod", "memcpy dtoh")),
    (SMALL, ("triton_poi", "triton_red", "triton_per")),
    (ATTENTION, ("flash", "fmha", "attention", "sdpa")),
    (
        MATRIX,
        ("gemm", "gemv", "cutlass", "nvjet", "xmma", "cublas", "splitk", "sm80_", "sm90_", "triton_tem", "convolve"),
    ),
    (
        SMALL,
        (
            "elementwise",
            "reduce",
            "layer_norm",
            "layernorm",
            "gammabeta",
            "softmax",
            "copy",
            "cat",
            "index",
            "gather",
            "scatter",
            "memcpy",
            "memset",
            "fill",
            "multi_tensor",
            "nchwtonhwc",
            "nhwctonchw",
            "transpose",
            "triton_",
        ),
    ),
)


def kernels_of(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Every kernel and copy of one call, as the profiler saw it on the device; none where there is no GPU."""
    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        finish(device)
    events: Any = found.events()
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def category(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in PARTS if any(part in lower for part in parts)), OTHER)


def by_category(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Seconds of each category, most first."""
    found: dict[str, float] = {}
    for name, seconds in kernels:
        kind = category(name)
        found[kind] = found.get(kind, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def limited_by(kernels: Sequence[Kernel], wall_seconds: float) -> str:
    """What a step of so many seconds spends its time on.

    Args:
        kernels: of one step; one after another, as on a single stream.
        wall_seconds: of a step that was not profiled, since a profiler slows the host.
    """
    if not kernels:
        return "not measured"
    busy = sum(seconds for _, seconds in kernels)
    idle = max(0.0, 1 - busy / wall_seconds)
    if idle > IDLE:
        return f"the host: device idle {100 * idle:.0f} % of the step, {len(kernels)} kernels"
    shares = {kind: seconds / busy for kind, seconds in by_category(kernels).items()}
    largest = next(iter(shares))
    return ", ".join(
        f"{kind} {100 * share:.0f} %" for kind, share in shares.items() if share >= MENTIONED or kind == largest
    )
