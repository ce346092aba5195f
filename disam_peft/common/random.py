"""Randomness made from a key, so that a choice depends on what it is for and not on what was drawn before it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order; the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_uniforms(count: int, *parts: int | str) -> np.ndarray:
    """(count,) float64, uniform on [0, 1), from the key alone: no generator has to be set up for a few numbers."""
    import numpy as np

    stream = hashlib.shake_128("/".join(map(str, parts)).encode()).digest(8 * count)
    return (np.frombuffer(stream, dtype="<u8") >> np.uint64(11)) * 2.0**-53
