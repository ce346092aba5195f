"""Splits that the data themselves give: where they are recognised, and what they do to a run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest

from disam_peft.common.run_images import write_images
from disam_peft.config.data import DataConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.sources.given_splits import WORDS
from disam_peft.data.splits import split_train_validation
from disam_peft.errors import UserError
from disam_peft.experiments.run_data import images_of
from disam_peft.experiments.seen_images import RunsImages
from disam_peft.experiments.split_data import split_data
from tests.helpers.tiny_images import write_image

DOMAINS, CLASSES = ("photo", "sketch"), ("cat", "dog")
COUNTS = {"train": 5, "val": 2, "test": 3}
PARTS = {"train": 20, "validation": 8, "test": 12}
"""Samples of each part: COUNTS in 2 domains x 2 classes."""


def write(root: Path, pattern: str, words: dict[str, str] | None = None, domains: tuple[str, ...] = DOMAINS) -> Path:
    """A tree whose folders are laid out as ``pattern``; ``words``: how it spells train, val and test."""
    for split, count in COUNTS.items():
        for domain in domains:
            for name in CLASSES:
                folder = pattern.format(split=(words or {}).get(split, split), domain=domain, name=name)
                for i in range(count):
                    write_image(root / folder / f"{split}-{domain}-{i}.png")
    return root


def given(dataset: DomainDataset) -> tuple[str, ...]:
    assert dataset.given_parts is not None
    return dataset.given_parts


def parts(dataset: DomainDataset) -> Counter[str]:
    return Counter(given(dataset))


@pytest.mark.parametrize("pattern", ["{split}/{domain}/{name}", "{domain}/{split}/{name}", "{domain}/{name}/{split}"])
def test_a_level_of_splits_is_recognised_wherever_it_stands(tmp_path, pattern):
    dataset = load(DataConfig(root=write(tmp_path / "d", pattern)))
    assert dataset.domains == DOMAINS and dataset.classes == CLASSES
    assert parts(dataset) == PARTS
    for i, key in enumerate(dataset.keys):
        assert key.rsplit("/", 1)[1].split("-")[0][:3] == given(dataset)[i][:3]


@pytest.mark.parametrize("pattern", ["{split}/{name}", "{name}/{split}"])
def test_splits_and_classes_alone_are_one_unnamed_domain(tmp_path, pattern):
    dataset = load(DataConfig(root=write(tmp_path / "d", pattern)))
    assert dataset.domains == ("unnamed",) and dataset.classes == CLASSES
    assert parts(dataset) == PARTS


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "VAL", "Validation"])
def test_words_in_any_case(tmp_path, val):
    words = {"train": "Train", "val": val, "test": "TEST"}
    assert parts(load(DataConfig(root=write(tmp_path / "d", "{split}/{domain}/{name}", words)))) == PARTS


def test_in_an_archive_too(tmp_path):
    write(tmp_path / "d", "{split}/{domain}/{name}")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "d")
    dataset = load(DataConfig(root=Path(archive)))
    assert dataset.domains == DOMAINS and parts(dataset) == PARTS


def test_ignored_they_are_domains(tmp_path):
    root = write(tmp_path / "d", "{split}/{name}")
    assert load(DataConfig(root=root, given_splits="ignore")).domains == ("test", "train", "val")
    assert load(DataConfig(root=root, given_splits="ignore")).given_parts is None
    assert load(DataConfig(root=root, domains=["train", "test"])).domains == ("test", "train")
    deep = write(tmp_path / "deep", "{domain}/{split}/{name}")
    with pytest.raises(UserError, match=r"looks like given splits: set data\.given_splits to auto"):
        load(DataConfig(root=deep, given_splits="ignore"))


def test_a_name_of_domains_that_was_read_as_a_split(tmp_path):
    root = write(tmp_path / "d", "{split}/{domain}/{name}")
    assert load(DataConfig(root=root, domains=["photo"])).present_domains == ("photo",)
    with pytest.raises(UserError, match=r"no domain 'train'.*read as a given split: set data\.given_splits to ignore"):
        load(DataConfig(root=root, domains=["train", "photo"]))


def test_splits_beside_other_folders_are_asked_about(tmp_path):
    root = write(tmp_path / "d", "{split}/{name}")
    write_image(root / "extra" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"given splits \('test', 'train', 'val'\) beside other names \('extra'\)"):
        load(DataConfig(root=root))
    assert len(load(DataConfig(root=root, given_splits="ignore", classes="union")).domains) == 4


def test_a_domain_or_a_class_called_train_is_no_split(tree):
    assert load(DataConfig(root=tree(["train", "bus"], ["cat"], 1))).given_parts is None
    dataset = load(DataConfig(root=tree(["photo", "sketch"], ["train", "bus"], 1, name="vehicles")))
    assert dataset.given_parts is None and dataset.classes == ("bus", "train")


def test_images_in_split_folders_without_classes(tmp_path):
    root = write(tmp_path / "d", "{split}")
    with pytest.raises(UserError, match="without class folders"):
        load(DataConfig(root=root))


# -- columns -------------------------------------------------------------------------------------------------


def records(root: Path) -> list[dict[str, str]]:
    """A row per image of a tree of domains and classes, whose names begin with their split."""
    paths = sorted(root.rglob("*.png"))
    return [
        {
            "image": path.relative_to(root).as_posix(),
            "label": path.parts[-2],
            "domain": path.parts[-3],
            "split": path.name.split("-")[0],
        }
        for path in paths
    ]


def as_csv(rows: list[dict[str, str]]) -> str:
    return "\n".join(",".join(row) for row in [list(rows[0]), *(row.values() for row in rows)]) + "\n"


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_column_of_splits(tmp_path, kind):
    rows = records(write(tmp_path / "d", "{domain}/{name}"))
    path = tmp_path / "d" / f"t.{kind}"
    if kind == "csv":
        path.write_text(as_csv(rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    source = "json_lines" if kind == "jsonl" else "table"
    dataset = load(DataConfig.model_validate({source: path}))
    assert parts(dataset) == PARTS
    assert all(key.rsplit("/", 1)[1][:3] == part[:3] for key, part in zip(dataset.keys, given(dataset), strict=True))
    assert load(DataConfig.model_validate({source: path, "given_splits": "ignore"})).given_parts is None


def test_a_column_is_found_by_its_name_or_by_the_setting(tmp_path):
    rows = records(write(tmp_path / "d", "{domain}/{name}"))
    path = tmp_path / "d" / "t.csv"
    path.write_text(as_csv(rows).replace("split", "Partition", 1))
    assert parts(load(DataConfig(table=path))) == PARTS
    path.write_text(as_csv(rows).replace("split", "phase", 1))
    assert load(DataConfig(table=path)).given_parts is None
    assert parts(load(DataConfig(table=path, split_column="phase"))) == PARTS
    with pytest.raises(UserError, match=r"data\.split_column='fase' is not a column.*did you mean 'phase'"):
        load(DataConfig(table=path, split_column="fase"))


def test_a_column_that_says_something_else(tmp_path):
    rows = records(write(tmp_path / "d", "{domain}/{name}"))
    path = tmp_path / "d" / "t.csv"
    path.write_text(as_csv([{**row, "split": "A"} for row in rows]))
    assert load(DataConfig(table=path)).given_parts is None
    with pytest.raises(UserError, match=r"column 'split' .*holds 'A'; expected one of train, "):
        load(DataConfig(table=path, split_column="split"))
    path.write_text(as_csv([{**rows[0], "split": "extra"}, *rows[1:]]))
    with pytest.raises(UserError, match=r"column 'split' .*beside other names \('extra'\)"):
        load(DataConfig(table=path))
    path.write_text(as_csv([{**rows[0], "split": ""}, *rows[1:]]))
    with pytest.raises(UserError, match=r"row 0 of .* has no 'split'"):
        load(DataConfig(table=path))


def test_the_splits_of_a_hub_data_set(tmp_path):
    rows = records(write(tmp_path / "d", "{domain}/{name}"))
    of = {
        word: datasets.Dataset.from_list([row for row in rows if row["split"] == split]).remove_columns("split")
        for word, split in [("train", "train"), ("validation", "val"), ("test", "test")]
    }
    place = tmp_path / "stored"
    datasets.DatasetDict(of).save_to_disk(place)
    config = {"hub": str(place), "image_root": tmp_path / "d"}
    dataset = load(DataConfig.model_validate(config))
    assert dataset.domains == DOMAINS and parts(dataset) == PARTS
    assert all(key.rsplit("/", 1)[1][:3] == part[:3] for key, part in zip(dataset.keys, given(dataset), strict=True))
    assert load(DataConfig.model_validate({**config, "split": "test"})).given_parts is None


# -- what they do --------------------------------------------------------------------------------------------


def recipe(root: Path, held_out: str = "sketch") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "given",
            "backbone": {"name": "x"},
            "adapter": {"kind": "linear_probe"},
            "data": {"root": root},
            "protocol": {"held_out": held_out},
        }
    )


def test_sources_train_and_validate_by_their_parts_and_the_target_is_whole(tmp_path):
    run = recipe(write(tmp_path / "d", "{domain}/{split}/{name}", domains=("photo", "sketch", "art")))
    data = split_data(run, load(run.data))
    assert parts(data.training) == {"train": 20} and parts(data.validation) == {"validation": 8}
    assert data.sources.present_domains == ("art", "photo")
    assert set(data.sources.keys) == {*data.training.keys, *data.validation.keys}
    assert parts(data.target) == {"train": 10, "validation": 4, "test": 6}
    splits = data.by_split()
    assert list(splits) == ["source_validation", "held_out", "held_out_test"]
    assert parts(splits["held_out_test"]) == {"test": 6} and splits["held_out"] is data.target


def test_where_nothing_is_held_out_the_test_parts_are_judged(tmp_path):
    run = recipe(write(tmp_path / "d", "{split}/{name}"))
    run = run.model_copy(update={"protocol": ProtocolConfig(kind="all")})
    data = split_data(run, load(run.data))
    assert parts(data.training) == {"train": 20} and parts(data.validation) == {"validation": 8}
    splits = data.by_split()
    assert list(splits) == ["source_validation", "test"] and parts(splits["test"]) == {"test": 12}
    assert data.judged == ("test", splits["test"])
    assert Counter(images_of(data).part) == {"training": 20, "validation": 8, "test": 12}


def test_images_say_what_a_run_used_each_of_them_for(tmp_path):
    run = recipe(write(tmp_path / "d", "{split}/{domain}/{name}"))
    images = images_of(split_data(run, load(run.data)))
    assert Counter(images.part) == {"training": 10, "validation": 4, "held_out": 14, "test": 6, "unused": 6}
    assert {domain for domain, part in zip(images.domain, images.part, strict=True) if part == "test"} == {"sketch"}


def test_the_data_of_a_run_are_known_again(tmp_path):
    """Another given split is a difference."""
    rows = records(write(tmp_path / "d", "{domain}/{name}"))
    path = tmp_path / "d" / "t.csv"
    path.write_text(as_csv(rows))
    run = recipe(tmp_path)
    run = run.model_copy(update={"data": DataConfig(table=path)})
    before = images_of(split_data(run, load(run.data)))
    write_images(tmp_path / "images.parquet", before)
    known = RunsImages(tmp_path, run)
    splits = known.own_splits(run, load(run.data))
    assert splits is not None and list(splits) == ["source_validation", "held_out", "held_out_test"]
    swapped = {"train": "val", "val": "train", "test": "test"}
    path.write_text(as_csv([{**row, "split": swapped[row["split"]]} for row in rows]))
    assert known.own_splits(run, load(run.data)) is None


def test_without_a_given_validation_part_it_is_drawn_from_the_training_part(tmp_path):
    root = write(tmp_path / "d", "{split}/{domain}/{name}")
    shutil.rmtree(root / "val")
    dataset = load(DataConfig(root=root))
    training, validation = split_train_validation(dataset, 0.4, seed=0)
    assert parts(validation) == {"train": 8} and parts(training) == {"train": 12}
    assert not set(training.keys) & set(validation.keys)


def test_a_domain_may_have_a_validation_part_where_another_has_none(tmp_path):
    root = write(tmp_path / "d", "{split}/{domain}/{name}")
    shutil.rmtree(root / "val" / "photo")
    training, validation = split_train_validation(load(DataConfig(root=root)), 0.4, seed=0)
    assert Counter(validation.domain_ids.tolist()) == {0: 4, 1: 4}
    assert Counter(training.domain_ids.tolist()) == {0: 6, 1: 10}


def test_a_source_with_nothing_but_a_test_part_is_said(tmp_path):
    root = write(tmp_path / "d", "{split}/{domain}/{name}")
    for part in ("train", "val"):
        shutil.rmtree(root / part / "photo")
    dataset = load(DataConfig(root=root))
    with pytest.warns(UserWarning, match=r"every image of 'photo' into the test part"):
        training, _ = split_train_validation(dataset, 0.2, seed=0)
    assert training.present_domains == ("sketch",)
    with pytest.warns(UserWarning, match="every image"), pytest.raises(UserError, match="nothing is left to train on"):
        split_train_validation(dataset.with_domains(["photo"]), 0.2, seed=0)


def test_parts_belong_to_what_the_data_are(tmp_path):
    rows = records(write(tmp_path / "d", "{domain}/{name}"))
    path = tmp_path / "d" / "t.csv"
    path.write_text(as_csv(rows))
    before = load(DataConfig(table=path))
    path.write_text(as_csv([{**rows[0], "split": "test" if rows[0]["split"] != "test" else "train"}, *rows[1:]]))
    assert load(DataConfig(table=path)).fingerprint != before.fingerprint


def test_every_word_is_in_small_letters():
    assert all(word == word.casefold() for word in WORDS)
