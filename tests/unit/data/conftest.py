"""Tiny image trees for the tests of the data floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.helpers.paths import PACS_MINI
from tests.helpers.tiny_images import write_image

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """``tree({"art": {"cat": 3}})`` writes art/cat/0.png to 2.png; ``tree(["art"], ["cat"], 3)`` the same."""

    def write(
        domains: Mapping[str, Mapping[str, int]] | Sequence[str],
        classes: Sequence[str] = (),
        count: int = 0,
        name: str = "tree",
    ) -> Path:
        root = tmp_path / name
        layout = domains if isinstance(domains, Mapping) else {d: dict.fromkeys(classes, count) for d in domains}
        for domain, per_class in layout.items():
            for class_name, number in per_class.items():
                (root / domain / class_name).mkdir(parents=True, exist_ok=True)
                for i in range(number):
                    write_image(root / domain / class_name / f"{i}.png")
        return root

    return write


@pytest.fixture(scope="session")
def pacs_mini() -> Path:
    if not PACS_MINI.is_dir():
        pytest.skip("the PACS sample does not lie beside the repository")
    return PACS_MINI
