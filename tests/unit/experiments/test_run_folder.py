"""What a folder may hold when a run comes to it: nothing, the same run, half of it, another one, somebody's thesis."""

import json
import os
import re
import shutil
import sys
import warnings
from functools import cached_property

import pytest

from disam_peft.cli.app import main
from disam_peft.common.records import read_events, read_results
from disam_peft.common.run_images import read_images
from disam_peft.config.data import DataConfig
from disam_peft.config.identity import HARMLESS
from disam_peft.config.recipe import Recipe, as_dict, as_yaml, differences
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.errors import Notice, UserError
from disam_peft.experiments import run, run_folder
from disam_peft.experiments.compare import is_finished
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.experiments.kept_runs import kept_runs
from disam_peft.experiments.run_cache import RunCache
from disam_peft.experiments.run_data import content_by_cell, images_of
from disam_peft.experiments.split_data import split_data


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
            "data": data if isinstance(data, dict) else {"root": data},
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_after_a_mistake_that_stops_a_run_before_its_first_step_the_corrected_one_starts(make_recipe):
    with pytest.raises(UserError, match="batch_size=1 cannot hold a sample of each of the 2 domains"):
        run.train(make_recipe(train={"batch_size": 1}))
    assert not make_recipe().folder("photo").exists(), "the run never was"
    assert run.train(make_recipe())[0].fit is not None


@pytest.mark.slow
def test_row_75_a_run_that_trained_nothing_has_no_results_and_advises_no_resume(make_recipe, monkeypatch, capsys):
    recipe = make_recipe(method={"name": "sam", "rho": 3e38})
    path = recipe.output / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(as_yaml(recipe))
    for options in ([], ["--resume"]):
        monkeypatch.setattr(sys, "argv", ["disam-peft", "train", str(path), *options])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert "nothing was trained: all 4 steps" in said
        assert "would come to the same: give the changed command with --overwrite" in said
        assert "give the same command with --resume" not in said
    left = {path.name for path in recipe.folder("photo").iterdir()}
    assert left == {"recipe.yaml", "images.parquet", "metrics.jsonl", "checkpoints"}
    assert run.train(make_recipe(), overwrite=True)[0].fit is not None


@pytest.mark.slow
def test_row_62_metrics_that_are_gone_are_said_and_the_run_goes_on_to_the_same_result(make_recipe, cut):
    recipe = make_recipe()
    cut(recipe)
    (recipe.folder("photo") / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"the records of steps 1 to 2 are missing in .*photo.metrics\.jsonl"):
        [outcome] = run.train(recipe, resume=True)
    assert [event["step"] for event in read_events(outcome.folder / "metrics.jsonl", "step")] == [3, 4]
    [lost] = read_events(outcome.folder / "metrics.jsonl", "records_lost")
    assert (lost["first_step"], lost["last_step"]) == (1, 2)
    before = (outcome.folder / "results.json").read_bytes()
    run.train(recipe, overwrite=True)
    assert (outcome.folder / "results.json").read_bytes() == before


@pytest.mark.slow
def test_row_60_results_alone_do_not_make_a_finished_run(make_recipe, monkeypatch):
    recipe = make_recipe(evaluation={"workers": 0, "sharpness": {}})

    def no_memory(*_, **__):
        raise Cut

    monkeypatch.setattr(run, "write_sharpness", no_memory)
    with pytest.raises(Cut):
        run.train(recipe)
    folder = recipe.folder("photo")
    assert (folder / "results.json").is_file()
    with pytest.raises(UserError, match="did not finish; --resume continues it"):
        run.train(recipe)
    monkeypatch.undo()
    with pytest.warns(Notice, match=r"going on after step 4 \(of 4 steps\)"):
        run.train(recipe, resume=True)
    assert (folder / "sharpness.json").is_file() and (folder / "finished.json").is_file()
    assert run.train(recipe)[0].fit is None


@pytest.mark.slow
def test_row_60_a_finished_run_whose_results_are_gone_is_made_again(make_recipe, monkeypatch):
    recipe = make_recipe()
    folder = run.train(recipe)[0].folder
    before = (folder / "results.json").read_bytes()
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match=r"a finished run whose results\.json is gone; --resume makes it again"):
        run.train(recipe)
    real = run.write_results
    monkeypatch.setattr(run, "write_results", lambda *arguments: [real(*arguments), 1 / 0])
    with pytest.raises(ZeroDivisionError):
        run.train(recipe, resume=True)
    assert (folder / "results.json").is_file() and not (folder / "finished.json").exists()
    monkeypatch.undo()
    run.train(recipe, resume=True)
    assert (folder / "results.json").read_bytes() == before and (folder / "finished.json").is_file()


@pytest.mark.slow
def test_row_60_a_finished_run_without_its_adapter_or_without_rows_is_not_kept(make_recipe):
    recipe = make_recipe()
    folder = run.train(recipe)[0].folder
    before = (folder / "results.json").read_bytes()
    shutil.rmtree(folder / "adapter")
    for keep in (run.train, lambda recipe: kept_runs(recipe, RunCache()) or run.train(recipe)):
        with pytest.raises(UserError, match="a finished run whose adapter is gone; --resume makes it again"):
            keep(recipe)
    assert not is_finished(recipe, RunCache())
    run.train(recipe, resume=True)
    assert (folder / "results.json").read_bytes() == before and any((folder / "adapter").iterdir())
    (folder / "results.json").write_text("[]")
    with pytest.raises(UserError, match=r"a finished run whose results\.json is gone; --resume makes it again"):
        run.train(recipe)


@pytest.mark.slow
def test_an_adapter_that_is_not_the_runs_result_is_said_or_refused(make_recipe, tmp_path):
    recipe = make_recipe()
    folder = run.train(recipe)[0].folder
    (folder / "finished.json").unlink()
    with pytest.warns(UserWarning, match="did not finish: its adapter is the best state so far"):
        evaluate(folder)
    with pytest.warns(UserWarning, match="did not finish"):
        export_run(folder, "peft", tmp_path / "out")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"^seed: .*$", "seed: 77", text, flags=re.M))
    with pytest.raises(UserError, match=r"trained with seed=\d+, but recipe.yaml beside it has 77"):
        evaluate(folder)


@pytest.mark.slow
def test_a_comparison_keeps_runs_of_its_data_only(make_recipe, images):
    recipe = make_recipe(data=images)
    assert not is_finished(recipe, RunCache())
    run.train(recipe)
    assert is_finished(recipe, RunCache())
    bring_back = change(images)
    assert not is_finished(recipe, RunCache())
    bring_back()
    assert is_finished(recipe, RunCache())
    shutil.rmtree(images)
    assert not is_finished(recipe, RunCache()), "data that are gone cannot be compared"


@pytest.mark.slow
def test_processes_that_share_the_work_look_for_kept_runs_together(make_recipe, monkeypatch):
    recipe = make_recipe()
    run.train(recipe)
    assert kept_runs(recipe, RunCache()) is not None
    for variables in ({"WORLD_SIZE": "2"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert kept_runs(recipe, RunCache()) is None


@pytest.mark.slow
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


@pytest.mark.slow
def test_row_38_harmless_keys_may_change(make_recipe, cut, domains_folder, tmp_path):
    recipe = make_recipe()
    expected = read_results(run.train(recipe)[0].folder / "results.json")
    weights = (recipe.folder("photo") / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(recipe.output)
    cut(recipe)
    moved = tmp_path / "elsewhere"
    recipe.output.rename(moved)
    shutil.copytree(domains_folder, tmp_path / "copy")
    faster = {
        "workers": 1,
        "log_every": 2,
        "save_every": 1,
        "keep_checkpoints": 1,
        "timeout_minutes": 5.0,
        "gradient_checkpointing": True,
    }
    other = make_recipe(output=moved, data=tmp_path / "copy", train=faster, evaluation={"workers": 1, "batch_size": 32})
    changed = [line.split(":")[0] for line in differences(as_dict(recipe), as_dict(other))]
    unchanged = {"name", "features.folder", "train.tracker", "data.verify", "data.duplicates"}
    assert set(changed) == HARMLESS.keys() - unchanged
    with pytest.warns(Notice, match="going on after step 2"):
        [outcome] = run.train(other, resume=True)
    assert read_results(outcome.folder / "results.json") == expected
    assert (outcome.folder / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert outcome.fit is not None


@pytest.fixture
def images(domains_folder, tmp_path):
    """A copy of the data, to be changed."""
    shutil.copytree(domains_folder, tmp_path / "images")
    return tmp_path / "images"


def change(images):
    """Take an image away and replace another one; gives a function that brings both back."""
    gone, other = images / "art/red/0.png", images / "cartoon/blue/1.png"
    content = gone.read_bytes(), other.read_bytes()
    gone.unlink()
    other.write_bytes((images / "cartoon/blue/2.png").read_bytes())

    def bring_back():
        gone.write_bytes(content[0])
        other.write_bytes(content[1])

    return bring_back


CHANGED = (
    r"images of art/red: 8 -> 7 \(gone: art/red/0\.png\)\n"
    r"  images of cartoon/blue: 8 -> 8 \(changed: cartoon/blue/1\.png\)$"
)


@pytest.mark.slow
def test_row_38_changed_data_are_refused_with_the_difference(make_recipe, cut, images):
    recipe = make_recipe(data=images)
    cut(recipe)
    bring_back = change(images)
    with pytest.raises(UserError, match=r"photo holds a run of other data, which cannot be continued so") as caught:
        run.train(recipe, resume=True)
    assert re.search(CHANGED, str(caught.value))
    assert str(caught.value).count("->") == 2
    bring_back()
    with pytest.warns(Notice, match="going on after step 2"):
        run.train(recipe, resume=True)


@pytest.mark.slow
def test_row_38_where_images_were_not_recorded_the_checkpoint_knows_their_content(make_recipe, cut, images):
    """As for a run that version 0.1 began."""
    recipe = make_recipe(data=images)
    cut(recipe)
    (recipe.folder("photo") / "images.parquet").unlink()
    bring_back = change(images)
    with pytest.raises(UserError, match=r"step-000002 was made with something else than what is there now") as caught:
        run.train(recipe, resume=True)
    hashed = r"\(sha256 [0-9a-f]{16}\)"
    assert re.search(rf"images of art/red: 8 {hashed} -> 7 {hashed}", str(caught.value))
    assert re.search(rf"images of cartoon/blue: 8 {hashed} -> 8 {hashed}", str(caught.value))
    assert str(caught.value).count("->") == 2
    bring_back()
    with pytest.warns(Notice, match="going on after step 2"):
        [outcome] = run.train(recipe, resume=True)
    assert len(read_images(outcome.folder / "images.parquet")) == 96
    assert run.train(recipe)[0].fit is None


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, "full"])
def test_row_53_a_finished_run_is_kept_for_its_own_backbone_only(
    make_recipe, domains_folder, openclip_name, tmp_path, verify
):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(openclip_name.removeprefix("local-dir:"), folder)
    recipe = make_recipe(backbone={"name": f"local-dir:{folder}"}, data={"root": domains_folder, "verify": verify})
    run.train(recipe)
    assert run.train(recipe)[0].fit is None
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    config.write_text(config.read_text() + "\n")
    assert run.train(recipe)[0].fit is None, "other files of the same backbone"
    before, tensors = weights.stat(), load_file(weights)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    save_file({**tensors, name: tensors[name] + 0.1}, tmp_path / "new", metadata={"format": "pt"})
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "new", weights)
    with pytest.raises(UserError, match=r"a run with another backbone; bring its files back.*\n.*-> [0-9a-f]{12}"):
        run.train(recipe)
    with pytest.raises(UserError, match="another backbone"):
        kept_runs(recipe, RunCache())
    marker = recipe.folder("photo") / "finished.json"
    about = json.loads(marker.read_text())
    marker.write_text(json.dumps({key: about[key] for key in ("disam_peft_version", "images", "data")}))
    assert run.train(recipe)[0].fit is None, "an older version did not record the backbone"


@pytest.mark.slow
def test_a_run_may_look_closer_at_its_images_when_it_goes_on(make_recipe, cut, domains_folder, tmp_path):
    cut(make_recipe(data={"root": domains_folder, "verify": False}))
    with pytest.warns(Notice, match="going on after step 2"):
        [outcome] = run.train(make_recipe(), resume=True)
    assert not read_images(outcome.folder / "images.parquet").is_hashed
    with pytest.warns(Notice, match="images were compared by name and size alone, .* notes nothing new about them"):
        assert run.train(make_recipe())[0].fit is None
    shutil.copytree(domains_folder, tmp_path / "copy")
    with pytest.warns(Notice, match="images were compared by name and size alone, .* these are other files by now"):
        assert run.train(make_recipe(data={"root": tmp_path / "copy"}))[0].fit is None


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_a_finished_run_is_not_the_result_for_other_data(make_recipe, images, options):
    recipe = make_recipe(data=images)
    run.train(recipe)
    before = (recipe.folder("photo") / "results.json").read_bytes()
    bring_back = change(images)
    with pytest.raises(UserError, match=r"photo holds a run of other data.*; bring its data back, choose") as caught:
        run.train(recipe, **options)
    assert re.search(CHANGED, str(caught.value))
    with pytest.raises(UserError, match="holds a run of other data"):
        kept_runs(recipe, RunCache())
    assert (recipe.folder("photo") / "results.json").read_bytes() == before
    bring_back()
    assert run.train(recipe, **options)[0].fit is None
    change(images)
    assert run.train(recipe, overwrite=True)[0].fit is not None


@pytest.mark.slow
def test_the_same_images_elsewhere_are_the_same_run_and_others_are_not(make_recipe, images, domains_folder, tmp_path):
    assert run.train(make_recipe())[0].fit is not None
    elsewhere = make_recipe(data=images)
    assert run.train(elsewhere)[0].fit is None
    rows = [f"{p},{p.parent.parent.name},{p.parent.name}" for p in sorted(images.glob("*/*/*.png"))]
    (images / "list.csv").write_text("\n".join(["image,domain,label", *(r.replace(f"{images}/", "") for r in rows)]))
    assert run.train(make_recipe(data={"table": images / "list.csv"}))[0].fit is None, "listed, not found"
    (images / "list.csv").write_text(
        "\n".join(["image,domain,label", *(r.replace(f"{images}/", "") for r in rows[1:])])
    )
    with pytest.raises(UserError, match=r"images of art/blue: 8 -> 7 \(gone: art/blue/0\.png\)"):
        run.train(make_recipe(data={"table": images / "list.csv"}))
    (tmp_path / "words.yaml").write_text("red: crimson\n")
    with pytest.raises(UserError, match=r"differs in:\n  class red: red -> crimson$"):
        run.train(make_recipe(data={"root": images, "class_names": tmp_path / "words.yaml"}))


@pytest.mark.slow
def test_all_domains_are_compared_when_all_are_held_out_in_turn(make_recipe, images):
    recipe = make_recipe(held_out="all", data=images)
    run.train(recipe)
    assert [outcome.fit for outcome in run.train(recipe)] == [None] * 3
    assert [outcome.held_out for outcome in kept_runs(recipe, RunCache())] == ["art", "cartoon", "photo"]
    joint = recipe.output / "probe/results.json"
    before = joint.read_bytes()
    joint.unlink()
    kept_runs(recipe, RunCache())
    assert joint.read_bytes() == before
    change(images)
    with pytest.raises(UserError, match=r"probe/art holds a run of other data"):
        run.train(recipe)


@pytest.mark.slow
def test_row_65_a_replaced_image_is_noticed_though_its_size_and_time_are_the_same(make_recipe, images, monkeypatch):
    recipe = make_recipe(data=images)
    run.train(recipe)
    with pytest.warns(Notice, match="no image was read again: .* no size, time of change or inode is new"):
        run.train(recipe)
    replaced = images / "cartoon/blue/1.png"
    twin = replaced.read_bytes()
    status = replaced.stat()
    other = bytearray(twin)
    other[-5] ^= 1  # in the checksum of the last chunk, which no decoder reads
    replaced.write_bytes(other)
    os.utime(replaced, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"cartoon/blue: 8 -> 8 \(changed: cartoon/blue/1\.png\)"):
        run.train(recipe)
    # a file system without inodes and times of change of its notes: only reading helps
    replaced.write_bytes(twin)
    states = DomainDataset.__dict__["file_states_N4"].func
    blind = cached_property(lambda dataset: states(dataset) * [1, 1, 0, 0])
    blind.__set_name__(DomainDataset, "file_states_N4")
    monkeypatch.setattr(DomainDataset, "file_states_N4", blind)
    os.utime(replaced, ns=(status.st_atime_ns, status.st_mtime_ns))
    run.train(recipe)
    replaced.write_bytes(other)
    os.utime(replaced, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.warns(Notice, match="data.verify=full reads every file"):
        assert run.train(recipe)[0].fit is None
    with pytest.raises(UserError, match=r"cartoon/blue: 8 -> 8 \(changed: cartoon/blue/1\.png\)"):
        run.train(make_recipe(data={"root": images, "verify": "full"}))
    replaced.write_bytes(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert run.train(make_recipe(data={"root": images, "verify": "full"}))[0].fit is None


@pytest.mark.slow
def test_a_damaged_record_of_the_images_is_an_error_that_names_it(make_recipe):
    recipe = make_recipe()
    run.train(recipe)
    (recipe.folder("photo") / "images.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"photo/images\.parquet cannot be read"):
        run.train(recipe)


@pytest.mark.slow
def test_row_63_a_finished_run_that_recorded_no_images_is_kept_with_a_note_where_its_data_lie(make_recipe, images):
    recipe = make_recipe()
    run.train(recipe)
    for name in ("images.parquet", "finished.json"):
        (recipe.folder("photo") / name).unlink()
    with pytest.warns(Notice, match="not known, as its version did not record them: it is kept as its recipe agrees"):
        assert run.train(recipe)[0].fit is None
    with pytest.raises(UserError, match=r"holds another run[\s\S]*data\.root: .*domains0.* -> .*images"):
        run.train(make_recipe(data=images))


def test_what_the_content_of_data_is_made_of(make_recipe, domains_folder):
    checked, trusted = (load(DataConfig(root=domains_folder, verify=verify)) for verify in (True, False))
    cells, sizes = (content_by_cell(images_of(split_data(make_recipe(), dataset))) for dataset in (checked, trusted))
    assert len(cells) == 12 + 1
    assert cells["images of art/red"].startswith("8 (sha256 ")
    assert cells["class names"].startswith("4 (sha256 ")
    assert len(set(cells.values())) == 13
    assert sizes.keys() == cells.keys()
    assert sizes != cells, "by sizes, where nobody looked into the files"


@pytest.mark.slow
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


@pytest.mark.slow
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
        "finished.json",
        "images.parquet",
        "metrics.jsonl",
        "predictions.parquet",
        "recipe.yaml",
        "results.json",
    ]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert sorted(path.name for path in folder.parent.iterdir()) == [".photo.lock", "photo"]
    fresh = make_recipe(held_out="art")
    fresh.folder("art").mkdir()
    (fresh.folder("art") / ".recipe.yaml.77.tmp").write_text("name: pro")
    assert run.train(fresh)[0].fit is not None, "killed before the folder had its recipe"


@pytest.mark.slow
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
    sys.argv[-1] = "--overwrite"
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 143
    assert "stopped by a signal after step 3 of 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "results.json", "adapter", "checkpoints", "adapter/disam_peft.json", "."]
)
@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}], ids=str)
def test_row_64_a_folder_with_links_in_place_of_its_files_is_refused(make_recipe, tmp_path, name, options):
    recipe = make_recipe()
    folder = recipe.folder("photo")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "recipe.yaml").write_text(as_yaml(recipe))
    if name == ".":
        folder.parent.mkdir(parents=True)
        folder.symlink_to(victim)
    else:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(victim / "recipe.yaml" if "." in name else victim)
    with pytest.raises(UserError, match=r"is a link to .*victim.*; remove the link, or choose another output"):
        run.train(recipe, **options)
    assert [path.name for path in victim.iterdir()] == ["recipe.yaml"]
    assert (victim / "recipe.yaml").read_text() == as_yaml(recipe)


@pytest.mark.parametrize("name", ["metrics.jsonl", "images.parquet", "results.json", "finished.json", "sharpness.json"])
def test_row_61_a_folder_in_place_of_a_file_is_said_before_training_goes_on(make_recipe, cut, monkeypatch, name):
    recipe = make_recipe()
    cut(recipe)
    place = recipe.folder("photo") / name
    place.unlink(missing_ok=True)
    place.mkdir()
    monkeypatch.setattr(run, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=rf"{name} is a folder, where a file of our own belongs; remove it"):
        run.train(recipe, resume=True)
    assert place.is_dir() and (recipe.folder("photo") / "checkpoints").is_dir()


def test_row_64_locks_are_not_written_through_links(make_recipe, tmp_path):
    recipe = make_recipe()
    for name in (".photo.lock", ".photo.owner.json"):
        (tmp_path / "victim").write_text("precious")
        folder = recipe.folder("photo").parent
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / name).symlink_to(tmp_path / "victim")
        with pytest.raises(UserError, match=f"{name} is a link to"):
            run.train(recipe)
        assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.slow
def test_overwriting_a_run_removes_its_old_tensorboard_files_and_no_others(make_recipe):
    recipe = make_recipe(train={"tracker": "tensorboard"})
    place = recipe.folder("photo").parent / "tensorboard/photo"

    def events():
        return sorted(path.name for path in place.glob("events.out.tfevents.*"))

    run.train(recipe)
    first = events()
    assert first
    (place / "notes.txt").write_text("mine")
    other = place.with_name("art") / "events.out.tfevents.1"
    other.parent.mkdir()
    other.write_text("of another run")
    run.train(recipe, overwrite=True)
    assert events() and not set(events()) & set(first)
    run.train(make_recipe(), overwrite=True)
    assert events() == [], "without a tracker there are no numbers of the old run either"
    assert (place / "notes.txt").read_text() == "mine" and other.is_file()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_tensorboard_files(make_recipe, cut):
    recipe = make_recipe(train={"tracker": "tensorboard"})
    cut(recipe)
    place = recipe.folder("photo").parent / "tensorboard/photo"
    before = {path.name for path in place.glob("events*")}
    assert before
    run.train(recipe, resume=True)
    assert {path.name for path in place.glob("events*")} > before
