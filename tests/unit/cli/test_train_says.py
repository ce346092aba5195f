"""``disam-peft train``: what is printed where, and ``-q``, ``-v`` and ``--dry-run``."""

from __future__ import annotations

import sys
import warnings

import pytest

from disam_peft.cli.app import main
from tests.helpers.paths import ROOT

RECIPE = ROOT / "recipes/pacs/lora_erm.yaml"


@pytest.fixture
def cli(monkeypatch, capsys, domains_folder, openclip_name, tmp_path):
    """Trains with these words; gives (exit code, standard output, standard error)."""
    quick = ["train.steps=2", "train.batch_size=6", "train.warmup_steps=0", "train.workers=0", "evaluation.workers=0"]
    places = [f"data.root={domains_folder}", f"output={tmp_path / 'runs'}", f"backbone.name={openclip_name}"]
    small = ["backbone.pretrained=null", "adapter.blocks={last: 1}", "protocol.held_out=photo"]

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["disam-peft", "train", str(RECIPE), *places, *small, *quick, *words])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
            warnings.simplefilter("always")
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return call


def test_train_says_what_it_does_and_where_the_results_are(cli, tmp_path):
    code, out, err = cli()
    assert code == 0, err
    folder = tmp_path / "runs/pacs-lora-erm/photo"
    order = [
        "data: ",
        "run: without photo",
        "  images: ",
        "  trained: ",
        "  frozen: ",
        "  training: erm",
        "validation ",
    ]
    places = [out.index(text) for text in [*order, f"results: {folder / 'results.json'}", "next: disam-peft evaluate"]]
    assert places == sorted(places)
    assert f"disam-peft export {folder} --to peft --output DIR" in out


@pytest.mark.slow
def test_the_export_that_is_named_next_is_one_that_the_adapter_has(cli, monkeypatch, capsys, tmp_path):
    code, out, err = cli("adapter={kind: full, blocks: {last: 1}}", "name=whole")
    assert code == 0, err
    [line] = [line for line in out.splitlines() if line.startswith("next: ")]
    words = line.partition("disam-peft export ")[2].replace("DIR", str(tmp_path / "exported")).split()
    monkeypatch.setattr(sys, "argv", ["disam-peft", "export", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code, capsys.readouterr().err


@pytest.mark.slow
def test_quiet_prints_the_results_alone_and_verbose_prints_more(cli):
    code, out, err = cli("-q")
    assert code == 0, err
    assert "zero-shot" in out and "best step" in out and "->" not in out, "two losses are no means"
    for text in ("data: ", "trained: ", "validation ", "next: "):
        assert text not in out
    code, more, _ = cli("-v", "name=more")
    assert code == 0 and "  step 1 of 2: loss" in more and "lora_A" in more
    code, _, err = cli("-q", "-v")
    assert code == 2 and "choose one of them" in err


def test_dry_run_prints_the_plan_and_writes_nothing(cli, tmp_path):
    code, out, err = cli("--dry-run")
    assert code == 0, err
    assert (
        "  time: about " in out and "dry run: nothing was trained" in out and "zero-shot " not in out.split("time")[0]
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_warning_of_several_runs_is_shown_once(cli):
    code, _, err = cli("--dry-run", "protocol.held_out=all", "train.batch_size=600")
    assert code == 0, err
    assert err.count("train.batch_size=600 is more than the 52 training images") == 1
    code, _, again = cli("--dry-run", "train.batch_size=600")
    assert code == 0 and again.count("train.batch_size=600 is more") == 1, "and again by the next command"
