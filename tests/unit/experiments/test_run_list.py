"""The list of runs: found at any depth, with their state, what tells them apart, and what they reached."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from disam_peft.cli.app import main
from disam_peft.cli.output import Terminal
from disam_peft.cli.run_verbs import print_runs
from disam_peft.common.run_images import RunImages, write_images
from disam_peft.config.recipe import WRITTEN_BY_US
from disam_peft.errors import UserError
from disam_peft.experiments.run_folder import find_runs, finish
from disam_peft.experiments.run_list import ListedRun, apart_from_most, list_runs, sort_runs, told_apart_by
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_runs import images, write_run

OLD = ROOT / "tests/reference/runs_of_0.1"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished and an interrupted run with rank 4, and four finished ones with rank 2 five folders deep."""
    shutil.copytree(OLD, tmp_path / "work")
    return tmp_path / "work"


def by_folder(runs: Path) -> dict[str, ListedRun]:
    return {Path(run.folder).relative_to(runs).as_posix(): run for run in list_runs(runs)}


def test_runs_are_found_at_any_depth_with_what_they_are(runs: Path) -> None:
    (runs / "runs/.old.replaced/painting").mkdir(parents=True)
    shutil.copy(runs / "runs/old/painting/recipe.yaml", runs / "runs/.old.replaced/painting/recipe.yaml")
    (runs / "mine").mkdir()
    shutil.copy(runs / "r.yaml", runs / "mine/recipe.yaml")  # a recipe that somebody keeps there
    found = by_folder(runs)
    assert len(found) == 6
    old, half = found["runs/old/painting"], found["runs/half/painting"]
    assert (old.name, old.held_out, old.backbone, old.adapter, old.method) == (
        "old",
        "painting",
        "demo",
        "lora",
        "disam",
    )
    assert (old.state, old.steps, old.all_steps, old.data) == ("finished", 40, 40, "DomainShapes")
    rows = json.loads((runs / "runs/old/painting/results.json").read_text())
    is_result = {"split": "held_out", "domain": "painting", "metric": "top1", "method": "disam"}
    assert [old.result] == [row["value"] for row in rows if is_result.items() <= row.items()]
    assert (half.state, half.steps, half.all_steps, half.result) == ("interrupted", 20, 40, None)


def test_what_tells_runs_apart(runs: Path) -> None:
    differing = told_apart_by(list_runs(runs))
    assert "adapter.rank" in differing and "train.steps" in differing
    assert not {"backbone.name", "method.name", "seed", "evaluation.example_errors"} & set(differing)
    assert told_apart_by(list_runs(runs / "runs/old")) == []
    path = runs / "runs/old/painting/recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0\n", "seed: 7\n", 1))
    assert "seed" in told_apart_by(list_runs(runs / "runs"))


def test_states(runs: Path) -> None:
    note = runs / "runs/half/.painting.owner.json"
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": "today"}
    note.write_text(json.dumps(owner))
    assert by_folder(runs)["runs/half/painting"].state == "running"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    note.write_text(json.dumps({**owner, "pid": ended.pid}))
    assert by_folder(runs)["runs/half/painting"].state == "interrupted", "of a process that is gone"
    run = runs / "runs/old/painting"
    images = RunImages(("k",), ("0" * 64,), ("d",), ("c",), ("training",), (3,))
    write_images(run / "images.parquet", images)
    assert by_folder(runs)["runs/old/painting"].state == "interrupted", "of this version, without its last file"
    finish(run)
    listed = by_folder(runs)["runs/old/painting"]
    assert (listed.state, listed.data_identity) == ("finished", images.identity)


def test_an_adapter_that_takes_no_steps_has_none_to_show(runs: Path) -> None:
    path = runs / "runs/old/painting/recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(WRITTEN_BY_US + "\n" + yaml.safe_dump({**recipe, "adapter": {"kind": "tip_adapter"}}))
    listed = by_folder(runs)["runs/old/painting"]
    assert (listed.state, listed.steps, listed.all_steps) == ("finished", 0, 0)
    [row] = [line for line in printed(runs, 80).splitlines() if "old/painting" in line]
    assert row.split()[1:3] == ["none", "finished"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("results.json", b"[{]", "results.json"),
        ("results.json", b"[" * 5000, "results.json"),
        ("results.json", b"[]", "results.json has no row of a trained adapter"),
        ("recipe.yaml", b"name: [", "recipe.yaml"),
        ("recipe.yaml", b"\0", "recipe.yaml"),
        ("recipe.yaml", None, "recipe.yaml is missing"),
        ("adapter", None, "adapter is missing"),
    ],
)
def test_row_61_damaged_runs_are_listed_with_what_is_wrong(
    runs: Path, name: str, content: bytes | None, problem: str
) -> None:
    path = runs / "runs/old/painting" / name
    if content is not None:
        path.write_bytes(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    listed = by_folder(runs)["runs/old/painting"]
    assert len(list_runs(runs)) == 6
    assert problem in listed.problem and (listed.state == "damaged") == bool(problem)
    assert listed.result is None or name not in ("results.json", "recipe.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_row_61_nobody_waits_for_a_pipe(runs: Path) -> None:
    for name in ("folder", "pipe"):
        (runs / name).mkdir()
    (runs / "folder/recipe.yaml").mkdir()
    os.mkfifo(runs / "pipe/recipe.yaml")
    assert len(list_runs(runs)) == 6
    metrics = runs / "runs/half/painting/metrics.jsonl"
    metrics.unlink()
    os.mkfifo(metrics)
    assert "runs/half/painting" in by_folder(runs) and by_folder(runs)["runs/half/painting"].steps == 0
    recipe = runs / "runs/old/painting/recipe.yaml"
    recipe.unlink()
    os.mkfifo(recipe)
    with pytest.raises(UserError, match=r"no finished run in .*: expected recipe\.yaml and adapter/"):
        find_runs(runs / "runs/old")


def test_sorting(runs: Path) -> None:
    found = list_runs(runs)
    ordered = [run.result for run in sort_runs(found, "result")]
    numbers = [value for value in ordered if value is not None]
    assert numbers == sorted(numbers, reverse=True) and ordered[len(numbers) :] == [None]
    assert [run.settings["adapter.rank"] for run in sort_runs(found, "adapter.rank")] == [2, 2, 2, 2, 4, 4]
    with pytest.raises(UserError, match=r"--sort adapter\.rnk: no column or setting .* did you mean 'adapter\.rank'"):
        sort_runs(found, "adapter.rnk")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        list_runs(runs / "nowhere")


def printed(runs: Path, width: int) -> str:
    out = io.StringIO()
    found = list_runs(runs)
    print_runs(found, runs, Terminal(file=out, width=width))
    return out.getvalue()


def test_the_list_fits_eighty_columns(runs: Path) -> None:
    damaged = runs / "runs/old/painting/results.json"
    damaged.write_text("[")
    (runs / "runs/half").rename(runs / "runs/[red]half\x1b[31m")
    text = printed(runs, 80)
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(text.split())
    assert said.startswith("6 runs in ") and "4 finished, 1 interrupted, 1 damaged" in said
    assert "all of them: backbone demo, adapter lora, data DomainShapes" in said
    assert "20/40" in text and "60.4" in text and "adapter.rank=4" in text
    assert "\x1b" not in text and "[red]half" in text


def test_many_runs_say_in_two_lines_what_most_others_do_not_have(tmp_path: Path) -> None:
    terms = {"penalties": [{"kind": "coral"}], "anchors": [{"kind": "logits"}]}
    fishr = {"penalties": [{"kind": "fishr", "weight": 1e6, "anneal": 20}]}
    changes = {
        "coral": {"objective": terms, "average": "swad"},
        "fishr": {"objective": fishr},
        "erm": {"method": "erm"},
    }
    for number in range(9):
        write_run(tmp_path / f"plain{number}/sketch", seed=0, recorded=images())
    for name, settings in changes.items():
        write_run(tmp_path / f"{name}/sketch", recorded=images(), **settings)
    found = list_runs(tmp_path)
    apart = {run.name: told for run, told in zip(found, apart_from_most(found), strict=True)}
    assert {name: told for name, told in apart.items() if told} == {
        "coral": ["coral", "logits anchor", "swad"],
        "fishr": ["fishr (weight 1e6 from step 21 on)"],
    }
    text = printed(tmp_path, 80)
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) <= 8 + 3 * len(found)
    assert "disam, coral, logits anchor, swad" in " ".join(text.split()) and "rho" not in text


@pytest.mark.slow
def test_the_verb_prints_json_and_loads_no_torch(runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["disam-peft", "runs", str(runs), "--json", "--sort", "steps"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    content = json.loads(capsys.readouterr().out)
    assert [run["steps"] for run in content["runs"]] == [4, 4, 4, 4, 20, 40]
    assert content["runs"][0]["settings"]["adapter.rank"] == 2 and "adapter.rank" in content["told_apart_by"]
    code = "import sys; from disam_peft.experiments.run_list import list_runs; from pathlib import Path; "
    code += f"print(len(list_runs(Path({str(runs)!r}))), 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["6", "False"]
