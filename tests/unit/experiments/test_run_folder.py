"""What a folder may hold when a run comes to it: nothing, the same run, half of it, another one, somebody's thesis."""

import json
import re
import shutil
import sys

import pytest

from disam_peft.cli.app import main
from disam_peft.common.records import read_events, read_results
from disam_peft.config.data import DataConfig
from disam_peft.config.identity import HARMLESS
from disam_peft.config.recipe import Recipe, as_dict, differences
from disam_peft.data.load import load
from disam_peft.errors import Notice, UserError
from disam_peft.experiments import run, run_folder
from disam_peft.experiments.run_data import content_by_cell


class Cut(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path):
    def make(held_out="photo", data=domains_folder, output=tmp_path / "runs", **changes):
        train = {"steps": 4, "batch_size": 4, "workers": 0, "save_every": 2, "log_every": 1, **changes.pop("train", {})}
        values = {
            "name": "probe",
            "output": output,
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "linear_probe"},
            "data": {"root": data},
            "protocol": {"held_out": held_out},
            "train": train,
            "evaluation": {"workers": 0},
        }
        return Recipe.model_validate({**values, **changes})

    return make


@pytest.fixture
def cut(monkeypatch):
    """Run a recipe until its third step in that domain."""

    def until_step_3(recipe, held_out="photo", **options):
        def append(path, event, **values):
            if values.get("step") == 3 and path.parent.name == held_out:
                raise Cut
            real(path, event, **values)

        real = run.append_event
        monkeypatch.setattr(run, "append_event", append)
        with pytest.raises(Cut):
            run.train(recipe, **options)
        monkeypatch.setattr(run, "append_event", real)

    return until_step_3


def test_row_37_half_a_run_is_continued_or_overwritten_when_told_to(make_recipe, cut):
    recipe = make_recipe()
    cut(recipe)
    with pytest.raises(UserError, match=r"did not finish; --resume continues it, --overwrite starts it again"):
        run.train(recipe)
    with pytest.raises(UserError, match=r"--overwrite starts again and --resume goes on; choose one"):
        run.train(recipe, overwrite=True, resume=True)
    with pytest.warns(Notice, match=r"going on after step 2"):
        [outcome] = run.train(recipe, resume=True)
    assert outcome.fit is not None
    assert not (outcome.folder / "checkpoints").exists()
    before = (outcome.folder / "results.json").read_bytes()
    assert run.train(recipe, resume=True)[0].fit is None, "finished: kept"
    [again] = run.train(recipe, overwrite=True)
    assert again.fit == outcome.fit
    assert (again.folder / "results.json").read_bytes() == before


def test_a_resumed_run_tracks_every_step_once(make_recipe, cut):
    recipe = make_recipe(train={"tracker": "json_lines", "log_every": 1})
    cut(recipe)
    elsewhere = [make_recipe(train={"tracker": kind}) for kind in ("none", {"kind": "wandb", "project": "shapes"})]
    assert [run_folder.changed(other) for other in elsewhere] == [[], []]
    with pytest.warns(Notice, match=r"json_lines writes to .*photo.tracking\.jsonl"):
        [outcome] = run.train(recipe, resume=True)
    lines = [json.loads(line) for line in (outcome.folder / "tracking.jsonl").read_text().splitlines()]
    tracked = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert tracked == [(e["step"], e["loss"]) for e in read_events(outcome.folder / "metrics.jsonl", "step")]
    assert [step for step, _ in tracked] == [1, 2, 3, 4]
    validated = [(line["step"], line["validation/mean_top1"]) for line in lines if "loss" not in line]
    events = read_events(outcome.folder / "metrics.jsonl", "validation")
    assert validated == [(e["step"], e["mean_top1"]) for e in events]


def test_after_a_mistake_that_stops_a_run_before_its_first_step_the_corrected_one_starts(make_recipe):
    with pytest.raises(UserError, match="batch_size=1 cannot hold a sample of each of the 2 domains"):
        run.train(make_recipe(train={"batch_size": 1}))
    assert run.train(make_recipe())[0].fit is not None


def test_resume_where_nothing_is_starts_with_a_notice(make_recipe):
    recipe = make_recipe()
    with pytest.warns(Notice, match="nothing to go on with in .*photo; it is started"):
        assert run.train(recipe, resume=True)[0].fit is not None


def test_row_37_resume_leaves_what_is_not_ours_alone(make_recipe):
    recipe = make_recipe()
    theirs = recipe.folder("photo") / "thesis.tex"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="holds files that are no run of disam-peft"):
            run.train(recipe, **options)
    assert theirs.read_text() == "years of work"


def test_row_38_a_changed_recipe_is_refused_with_its_differences(make_recipe, cut):
    cut(make_recipe())
    checkpoints = make_recipe().folder("photo") / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    with pytest.raises(UserError, match=r"cannot be continued so[\s\S]*\n  seed: 0 -> 5\n  train\.steps: 4 -> 9"):
        run.train(make_recipe(seed=5, train={"steps": 9}), resume=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_row_38_harmless_keys_may_change(make_recipe, cut, domains_folder, tmp_path):
    recipe = make_recipe()
    expected = read_results(run.train(recipe)[0].folder / "results.json")
    weights = (recipe.folder("photo") / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(recipe.output)
    cut(recipe)
    moved = tmp_path / "elsewhere"
    recipe.output.rename(moved)
    shutil.copytree(domains_folder, tmp_path / "copy")
    faster = {"workers": 1, "log_every": 2, "save_every": 1, "keep_checkpoints": 1, "timeout_minutes": 5.0}
    other = make_recipe(output=moved, data=tmp_path / "copy", train=faster, evaluation={"workers": 1, "batch_size": 32})
    changed = [line.split(":")[0] for line in differences(as_dict(recipe), as_dict(other))]
    assert set(changed) == HARMLESS.keys() - {"name", "features.folder", "train.tracker", "data.verify"}
    with pytest.warns(Notice, match="going on after step 2"):
        [outcome] = run.train(other, resume=True)
    assert read_results(outcome.folder / "results.json") == expected
    assert (outcome.folder / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert outcome.fit is not None


def test_row_38_changed_data_is_refused_with_the_difference(make_recipe, cut, domains_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(domains_folder, images)
    recipe = make_recipe(data=images)
    cut(recipe)
    gone, other = images / "art/red/0.png", images / "cartoon/blue/1.png"
    content = gone.read_bytes(), other.read_bytes()
    gone.unlink()
    other.write_bytes((images / "cartoon/blue/2.png").read_bytes())
    with pytest.raises(UserError, match=r"step-000002 was made with something else than what is there now") as caught:
        run.train(recipe, resume=True)
    hashed = r"\(sha256 [0-9a-f]{16}\)"
    assert re.search(rf"images of art/red: 8 {hashed} -> 7 {hashed}", str(caught.value))
    assert re.search(rf"images of cartoon/blue: 8 {hashed} -> 8 {hashed}", str(caught.value))
    assert str(caught.value).count("->") == 2
    gone.write_bytes(content[0])
    other.write_bytes(content[1])
    with pytest.warns(Notice, match="going on after step 2"):
        run.train(recipe, resume=True)


def test_row_53_a_run_goes_on_with_the_same_backbone_only(make_recipe, cut, openclip_name, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(openclip_name.removeprefix("local-dir:"), folder)
    recipe = make_recipe(backbone={"name": f"local-dir:{folder}"})
    cut(recipe)
    config = folder / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["vision_cfg"]["head_width"] //= 2
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"differs in:\n  heads of the image tower of the backbone: \[2\] -> \[4\]$"):
        run.train(recipe, resume=True)


def test_what_the_content_of_data_is_made_of(domains_folder):
    checked, trusted = (load(DataConfig(root=domains_folder, verify=verify)) for verify in (True, False))
    cells = content_by_cell(checked)
    assert len(cells) == 12 + 1
    assert cells["images of art/red"].startswith("8 (sha256 ")
    assert cells["class names"].startswith("4 (sha256 ")
    assert len(set(cells.values())) == 13
    assert content_by_cell(trusted).keys() == cells.keys()
    assert content_by_cell(trusted) != cells, "by sizes, where nobody looked into the files"


def test_resume_keeps_what_is_finished_continues_what_began_and_starts_the_rest(make_recipe, cut):
    recipe = make_recipe(held_out="all")
    cut(recipe, held_out="cartoon")
    finished = recipe.folder("art") / "results.json"
    before = finished.stat().st_mtime_ns
    with pytest.warns(Notice) as notices:
        outcomes = run.train(recipe, resume=True)
    assert [outcome.fit is None for outcome in outcomes] == [True, False, False]
    assert finished.stat().st_mtime_ns == before
    said = " ".join(str(notice.message) for notice in notices)
    assert "photo; it is started" in said and "going on after step 2" in said
    assert {row.held_out for row in read_results(recipe.output / "probe/results.json")} == {"art", "cartoon", "photo"}


def test_what_kills_left_behind_is_cleared(make_recipe, cut):
    recipe = make_recipe()
    cut(recipe)
    folder = recipe.folder("photo")
    (folder / ".adapter.x1y2").mkdir()
    (folder / ".results.json.123.tmp").write_text("[")
    (folder / "checkpoints/.step-000004.partial").mkdir()
    (folder.parent / ".photo.replaced").mkdir()
    run.train(recipe, resume=True)
    files = [
        "adapter",
        "confusion.json",
        "errors.json",
        "images.parquet",
        "metrics.jsonl",
        "recipe.yaml",
        "results.json",
    ]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert sorted(path.name for path in folder.parent.iterdir()) == [".photo.lock", "photo"]
    fresh = make_recipe(held_out="art")
    fresh.folder("art").mkdir()
    (fresh.folder("art") / ".recipe.yaml.77.tmp").write_text("name: pro")
    assert run.train(fresh)[0].fit is not None, "killed before the folder had its recipe"


def test_the_command_line_says_notes_and_exit_codes(make_recipe, cut, monkeypatch, capsys, tmp_path):
    recipe = make_recipe()
    cut(recipe)
    monkeypatch.setattr(sys, "argv", ["disam-peft", "train", str(recipe.folder("photo") / "recipe.yaml"), "--resume"])
    with pytest.raises(SystemExit) as caught:
        main()
    err = capsys.readouterr().err
    assert not caught.value.code, err
    assert "note: going on after step 2 (of 4 steps)" in err
    from disam_peft.errors import Stopped

    def stopped(*arguments, **options):
        raise Stopped("stopped by a signal after step 3 of 4", 15)

    monkeypatch.setattr(run, "train", stopped)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 143
    assert "stopped by a signal after step 3 of 4" in capsys.readouterr().err
