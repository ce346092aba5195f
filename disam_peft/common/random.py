"""Random numbers that are computed from a key, so that they do not depend on what was drawn before them."""

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
    """(count,) float64, uniform on [0, 1), from the key alone. For a few numbers this is quicker than a generator."""
    import numpy as np

    stream = hashlib.shake_128("/".join(map(str, parts)).encode()).digest(8 * count)
    return (np.frombuffer(stream, dtype="<u8") >> np.uint64(11)) * 2.0**-53
