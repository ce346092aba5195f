"""``disam-peft models``: what is found, and how it is shown."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from disam_peft.cli.app import app
from disam_peft.errors import UserError


def call(*words: str) -> str:
    result = CliRunner().invoke(app, ["models", *words], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_few_are_shown_with_their_weights() -> None:
    shown = call("--search", "eva02 LAION2B_S9B")
    assert shown.count("EVA02-E-14-plus") == 2 and "EVA02-B-16" not in shown
    assert "EVA02-E-14-plus: eva02_enormous_patch14_clip_224; backbone.pretrained: laion2b_s9b_b144k" in " ".join(
        shown.split()
    )
    assert max(map(len, shown.splitlines())) <= 80


def test_families_and_json() -> None:
    found = json.loads(call("--family", "transformers", "--json"))
    assert [one["family"] for one in found] == ["transformers"] * 5
    assert found[1]["name"] == "google/siglip2-base-patch16-224" and found[1]["projections"] == ["q", "v"]
    names = [one["name"] for one in json.loads(call("--search", "siglip2", "--json"))]
    assert "ViT-B-16-SigLIP2-512" in names and "google/siglip2-base-patch16-224" in names and "ViT-B-16" not in names


def test_a_search_that_finds_nothing_says_what_is_near() -> None:
    with pytest.raises(UserError, match=r"no model holds 'ViT-B-17'.*did you mean 'ViT-B-16'"):
        call("--search", "ViT-B-17")
    with pytest.raises(UserError, match="--family timm is none of open_clip, transformers"):
        call("--family", "timm")
