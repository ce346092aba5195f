"""The help of the scripts in recipes/ says what the small CLIP of the package needs."""

from __future__ import annotations

import importlib.util

import pytest
import typer
from typer.testing import CliRunner

from tests.helpers.paths import ROOT


@pytest.mark.parametrize("name", ["finetune_folder", "own_loop", "own_objective"])
def test_the_help_says_how_to_use_the_demo_backbone(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"recipes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "demo: the small CLIP that comes with the package, with --pretrained ''" in shown
    assert "FOLDER/<domain>/<class>/*.jpg" in shown
