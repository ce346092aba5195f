"""A sample of the cells of `scripts/matrix.py`: all families, all adapters, not all pairs."""

from __future__ import annotations

from math import gcd
from pathlib import Path

import pytest

from scripts.matrix import FAILED, REFUSED, adapters, load_small, models, require_exact_splits, try_cell

SAMPLE = (
    *("coca_ViT-B-32", "roberta-ViT-B-32", "mt5-base-ViT-B-32", "nllb-clip-base", "ViT-L-14-CLIPA"),
    *("ViT-L-14-worldwide", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "EVA01-g-14", "EVA02-B-16"),
    *("MobileCLIP-B", "MobileCLIP-S1", "ViTamin-S", "convnext_tiny", "RN50", "swin_base_patch4_window7_224"),
    *("vit_relpos_medium_patch16_cls_224", "vit_medium_patch16_gap_256", "ViT-B-32"),
    *(name for family, name in models() if family == "transformers"),
)
CELLS = 60
COLUMNS = list(adapters())
PAIRS = [(name, column) for name in SAMPLE for column in COLUMNS]
STEP = next(step for step in range(len(PAIRS) // CELLS, len(PAIRS)) if gcd(step, len(COLUMNS)) == 1)
CHOSEN = PAIRS[::STEP]


def test_the_sample_has_every_model_and_every_adapter() -> None:
    assert {name for name, _ in CHOSEN} == set(SAMPLE) and {column for _, column in CHOSEN} == set(COLUMNS)
    assert CELLS * 0.7 <= len(CHOSEN) <= CELLS * 1.2


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_works_or_says_why_not(name: str, tmp_path: Path) -> None:
    family = {model: family for family, model in models()}[name]
    shared = load_small(family, name, tmp_path)
    require_exact_splits(shared)
    configs = adapters()
    cells = [try_cell(family, name, shared, column, configs[column]) for model, column in CHOSEN if model == name]
    assert not [cell for cell in cells if cell.outcome == FAILED]
    assert all(cell.note for cell in cells if cell.outcome == REFUSED)
