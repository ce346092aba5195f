"""Where things are in the repository, so that no test counts its parent folders."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
SCRIPTS = ROOT / "scripts"
REFERENCE = ROOT / "tests" / "reference"
PACS_MINI = ROOT.parent / "shared" / "data" / "pacs_mini"
"""A sample of PACS that may lie beside the repository; tests that want it skip where it does not."""


def environment(**variables: str) -> dict[str, str]:
    """The environment for a process that imports the package and ``tests.helpers`` from this repository."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
