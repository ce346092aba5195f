"""Which images of a data set a run has seen."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from PIL import Image

from disam_peft.common.run_images import IMAGES, read_images, size_as_content, write_images
from disam_peft.config.data import DataConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.load import load
from disam_peft.errors import Notice
from disam_peft.experiments.run_data import images_of
from disam_peft.experiments.seen_images import RunsImages
from disam_peft.experiments.split_data import split_data


def paint(folder, domains=("art", "photo", "sketch"), count=5):
    for shade, domain in enumerate(domains):
        for place, name in enumerate(("cat", "dog")):
            (folder / domain / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (4, 4), (50 * shade, 100 * place, i))
                image.save(folder / domain / name / f"{i}.png")
    return folder


@pytest.fixture
def root(tmp_path):
    return paint(tmp_path / "images")


def recipe_of(root, **data):
    return Recipe.model_validate(
        {
            "name": "try",
            "backbone": {"name": "demo"},
            "adapter": {"kind": "linear_probe"},
            "data": {"root": root, **data},
            "protocol": {"held_out": "sketch", "validation_fraction": 0.2},
        }
    )


@pytest.fixture
def recipe(root):
    return recipe_of(root)


@pytest.fixture
def run(tmp_path, recipe):
    (tmp_path / "run").mkdir()
    write_images(tmp_path / "run" / IMAGES, images_of(split_data(recipe, load(recipe.data))))
    return tmp_path / "run"


def counts(splits):
    return {name: len(dataset) for name, dataset in splits.items()}


WHOLE = {"seen_training": 16, "seen_validation": 4, "unseen": 10}


def test_own_data_are_split_as_in_training_wherever_they_lie(run, recipe, root, tmp_path):
    wanted = split_data(recipe, load(recipe.data)).by_split()
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    for place in (root, moved):
        found = RunsImages(run, recipe).own_splits(recipe_of(place), load(DataConfig(root=place)))
        assert found is not None
        assert {name: part.keys for name, part in found.items()} == {name: part.keys for name, part in wanted.items()}
    unchecked = recipe_of(root, verify=False)
    assert RunsImages(run, recipe).own_splits(unchecked, load(unchecked.data)) is not None, "hashes its files"


@pytest.mark.parametrize("change", ["removed", "changed", "added", "renamed", "moved to another class"])
def test_row_52_data_that_are_not_the_runs_are_split_by_what_was_seen(run, recipe, root, change):
    path, wanted = root / "art/cat/0.png", dict(WHOLE)
    part = dict(zip(read_images(run / IMAGES).key, read_images(run / IMAGES).part, strict=True))["art/cat/0.png"]
    if change == "removed":
        path.unlink()
        wanted[f"seen_{part}"] -= 1
    elif change == "changed":
        Image.new("RGB", (4, 4), "white").save(path)
        wanted[f"seen_{part}"] -= 1
        wanted["unseen"] += 1
    elif change == "added":
        Image.new("RGB", (4, 4), "white").save(root / "photo/dog/new.png")
        wanted["unseen"] += 1
    elif change == "renamed":
        path.rename(path.with_name("another.png"))
    else:
        path.rename(root / "art/dog/another.png")
    images, dataset = RunsImages(run, recipe), load(recipe.data)
    assert images.own_splits(recipe, dataset) is None
    found = images.by_what_was_seen(dataset)
    assert counts(found) == wanted
    assert sum(counts(found).values()) == len(dataset), "evaluated whole"


def test_row_52_a_part_of_the_runs_data_is_split_by_what_was_seen(run, recipe, root, tmp_path):
    """Domains of the same names, with fewer images: the split by key would have put them into other parts."""
    other = tmp_path / "other"
    for domain in ("art", "photo", "sketch"):
        shutil.copytree(root / domain / "cat", other / domain / "cat")
    dataset = load(DataConfig(root=other))
    images = RunsImages(run, recipe)
    assert images.own_splits(recipe_of(other), dataset) is None
    known = dict(zip(read_images(run / IMAGES).key, read_images(run / IMAGES).part, strict=True))
    names = {"training": "seen_training", "validation": "seen_validation", "held_out": "unseen"}
    for name, part in images.by_what_was_seen(dataset).items():
        assert {names[known[key]] for key in part.keys} == {name}


def test_row_52_a_run_of_an_older_version_is_split_again_from_its_data(run, recipe, root, tmp_path):
    (run / IMAGES).unlink()
    own = load(recipe.data)
    with pytest.warns(Notice, match=r"is a run of version 0\.1, which did not record the content of its images"):
        found = RunsImages(run, recipe).own_splits(recipe, own)
    assert found is not None and counts(found) == {"source_validation": 4, "held_out": 10}
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    found = RunsImages(run, recipe).own_splits(recipe_of(moved), load(DataConfig(root=moved)))
    assert found is not None and counts(found) == {"source_validation": 4, "held_out": 10}
    (moved / "art/cat/0.png").unlink()
    dataset = load(DataConfig(root=moved))
    assert RunsImages(run, recipe).own_splits(recipe_of(moved), dataset) is None
    assert sum(counts(RunsImages(run, recipe).by_what_was_seen(dataset)).values()) == 29
    shutil.rmtree(root)
    with pytest.warns(UserWarning, match="which of the images of .* it was trained on is unknown"):
        assert counts(RunsImages(run, recipe).by_what_was_seen(dataset)) == {"unknown": 29}


@pytest.mark.parametrize("where", ["elsewhere", "in place"])
def test_row_52_unread_images_are_the_runs_only_where_they_are_the_same_files(tmp_path, where):
    """Equal names and sizes, and a held-out domain that holds the training images of another one."""
    root = paint(tmp_path / "images")
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(200, b"\0"))
    recipe = recipe_of(root, verify=False)
    run = tmp_path / "run"
    run.mkdir()
    write_images(run / IMAGES, images_of(split_data(recipe, load(recipe.data))))
    own = RunsImages(run, recipe).own_splits(recipe, load(recipe.data))
    assert own is not None and counts(own) == {"source_validation": 4, "held_out": 10}
    other = tmp_path / "other"
    shutil.copytree(root, other)
    copied = load(DataConfig(root=other, verify=False))
    assert RunsImages(run, recipe).own_splits(recipe_of(other), copied) is not None, "read now, here and there"
    shutil.rmtree(other / "sketch")
    shutil.copytree(other / "art", other / "sketch")
    if where == "in place":
        shutil.rmtree(root)
        other = other.rename(root)
    for verify in (False, True):
        dataset, images = load(DataConfig(root=other, verify=verify)), RunsImages(run, recipe)
        assert images.own_splits(recipe_of(other, verify=verify), dataset) is None
        if where == "elsewhere":
            found = images.by_what_was_seen(dataset)
            assert not {"held_out", "source_validation"} & found.keys() and counts(found)["seen_training"] > 16
        else:
            with pytest.warns(UserWarning, match="no longer where, or what, they were"):
                assert counts(images.by_what_was_seen(dataset)) == {"unknown": 30}


def test_row_52_sizes_alone_do_not_tell_what_was_seen(run, recipe, root, tmp_path):
    """The run did not read its images. Where its data are still there they are read now; else only an image of another
    size is known to be new."""
    known = read_images(run / IMAGES)
    write_images(run / IMAGES, replace(known, content=tuple(map(size_as_content, known.size))))
    with pytest.warns(Notice, match="recorded the sizes of its images alone"):
        assert RunsImages(run, recipe).own_splits(recipe, load(recipe.data)) is not None
    other = tmp_path / "other"
    shutil.copytree(root, other)
    Image.effect_noise((64, 64), 50).save(other / "photo/dog/new.png")
    dataset = load(DataConfig(root=other))
    assert counts(RunsImages(run, recipe).by_what_was_seen(dataset)) == {**WHOLE, "unseen": 11}
    shutil.rmtree(root)
    with pytest.warns(UserWarning, match="is unknown"):
        assert counts(RunsImages(run, recipe).by_what_was_seen(dataset)) == {"unseen": 1, "unknown": 30}
