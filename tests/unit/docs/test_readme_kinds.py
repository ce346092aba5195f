"""The table of the README that says what a recipe can choose."""

import re
from pathlib import Path
from typing import get_args

import pytest

from disam_peft.adapters.registry import ADAPTERS
from disam_peft.config.average import KeptAverageConfig
from disam_peft.config.method import MethodConfig
from disam_peft.objectives.objective import ANCHORS, LOSSES, PENALTIES

README = Path(__file__).parents[3] / "README.md"


def kinds(configs):
    return {config.model_fields["kind"].default for config in configs}


KINDS = {
    "adapter.kind": kinds(ADAPTERS),
    "method.name": set(get_args(MethodConfig.model_fields["name"].annotation)),
    "objective.loss.kind": kinds(LOSSES),
    "objective.penalties": kinds(PENALTIES),
    "objective.anchors": kinds(ANCHORS),
    "average": kinds(get_args(KeptAverageConfig)),
}


@pytest.mark.parametrize("setting", KINDS)
def test_the_readme_names_every_kind(setting):
    [line] = re.findall(rf"^\| `{re.escape(setting)}` \|(.*)\|$", README.read_text(), re.MULTILINE)
    assert KINDS[setting] <= (named := set(re.findall(r"`([^`]+)`", line)))
    assert all(" " in other for other in named - KINDS[setting]), "a kind that is none; commands have several words"
