"""One list of adapters: the union of config classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.registry import ADAPTERS
from disam_peft.config.adapters import ADAPTER_CONFIGS, ADAPTER_KINDS
from disam_peft.config.recipe import load_recipe
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import CELLS
from tests.helpers.paths import RECIPES


def test_the_registry_holds_the_configs_of_the_union_and_no_others() -> None:
    assert list(ADAPTERS) == list(ADAPTER_CONFIGS)
    assert tuple(adapter.kind for adapter in ADAPTERS.values()) == ADAPTER_KINDS
    assert len(set(ADAPTER_KINDS)) == len(ADAPTER_KINDS) >= 5
    assert len(set(ADAPTERS.values())) == len(ADAPTERS)


def test_the_matrix_holds_every_kind() -> None:
    assert {config.kind for config in CELLS.values()} == set(ADAPTER_KINDS)


def test_an_unknown_kind_in_a_recipe_lists_all_kinds() -> None:
    listed = ", ".join(re.escape(f"'{kind}'") for kind in ADAPTER_KINDS)
    with pytest.raises(UserError, match=listed):
        load_recipe(Path(RECIPES / "pacs" / "lora_disam.yaml"), ["adapter.kind=lorra"])


def test_the_kinds_that_start_from_features_are_those_that_override_the_hook() -> None:
    class Starting(Adapter):
        def fit_start(self, *_: object) -> None: ...

    assert Starting.starts_from_features() and not Adapter.starts_from_features()
    assert [adapter.kind for adapter in ADAPTERS.values() if adapter.starts_from_features()] == [
        "lp_ft",
        "tip_adapter",
        "closed_form_probe",
        "clap",
    ]
