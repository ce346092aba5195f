"""The names of DomainShapes, without what it takes to paint it."""

from __future__ import annotations

from typing import Final

CLASSES: Final = (
    *("arrow", "circle", "crescent", "cross", "diamond", "heart"),
    *("hexagon", "house", "ring", "square", "star", "triangle"),
)
DOMAINS: Final = ("blueprint", "cartoon", "painting", "photo", "silhouette", "sketch")
