"""A folder of domains that a tiny CLIP can learn something from: the class is a colour, the domain a texture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

DOMAINS = ("art", "cartoon", "photo")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 60, 220), "grey_tone": (128, 128, 128)}


def write_domains(root: Path, *, count: int = 8, size: int = 32, domains: tuple[str, ...] = DOMAINS) -> Path:
    """``root/<domain>/<class>/<number>.png``: ``count`` images per cell, no two alike."""
    for number, domain in enumerate(domains):
        for name, colour in COLOURS.items():
            folder = root / domain / name
            folder.mkdir(parents=True)
            rng = np.random.default_rng([number, *colour])
            for i in range(count):
                noise = rng.normal(0, 20 + 15 * number, (size, size, 3))
                image = np.clip(np.array(colour) * (0.7 + 0.1 * number) + noise, 0, 255)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return root
