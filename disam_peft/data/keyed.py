"""Seeds made from a key, so that a random choice depends on what it is for and not on what was drawn before it."""

from __future__ import annotations

import hashlib


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order; the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
