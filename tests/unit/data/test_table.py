"""CSV, TSV, Parquet and Hugging Face datasets: the same samples by other roads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from tests.helpers.tiny_images import write_image


def write_csv(tree, rows: list[str] | None = None, header: str = "image,label,domain", name: str = "t.csv") -> Path:
    root = tree({"a": {"cat": 2}, "b": {"cat": 1}})
    if rows is None:
        rows = ["b/cat/0.png,cat,b", "a/cat/1.png,cat,a", "a/cat/0.png,cat,a"]
    path = root / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_csv_gives_what_the_folder_gives(tree):
    table = load(DataConfig(table=write_csv(tree)))
    folder = load(DataConfig(root=table.base))
    assert table.keys == folder.keys
    assert table.fingerprint == folder.fingerprint
    assert table.hashes == folder.hashes


def test_csv_text_stays_text(tree):
    rows = ["a/cat/0.png,None,007", "a/cat/1.png,NA,007", "b/cat/0.png,1.0,007"]
    dataset = load(DataConfig(table=write_csv(tree, rows), classes="union"))
    assert dataset.classes == ("1.0", "NA", "None")
    assert dataset.domains == ("007",)


def test_csv_with_a_byte_order_mark_as_spreadsheets_write_it(tree):
    path = write_csv(tree)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(DataConfig(table=path)).keys == ("a/cat/0.png", "a/cat/1.png", "b/cat/0.png")


def test_named_columns_and_tsv(tree):
    path = write_csv(tree, ["a/cat/0.png\tx, y\tp", "b/cat/0.png\tx, y\tq"], "file\twhat\twhere", "t.tsv")
    dataset = load(DataConfig(table=path, image_column="file", label_column="what", domain_column="where"))
    assert dataset.classes == ("x, y",) and dataset.domains == ("p", "q")


def test_image_root(tree, tmp_path):
    path = write_csv(tree)
    moved = tmp_path / "elsewhere.csv"
    path.rename(moved)
    with pytest.raises(UserError, match=r"(?s)3 of 3 images .* are not there.*row 0: .*data.image_root"):
        load(DataConfig(table=moved))
    assert len(load(DataConfig(table=moved, image_root=path.parent))) == 3


@pytest.mark.parametrize("path", ["../outside/cat/0.png", "{tmp}/outside/cat/0.png", "link.png", "door/0.png"])
def test_row_16_a_table_path_out_of_its_root(tree, tmp_path, path):
    outside = write_image(tmp_path / "outside" / "cat" / "0.png")
    table = write_csv(tree, [f"{path.replace('{tmp}', str(tmp_path))},cat,a"])
    (table.parent / "link.png").symlink_to(outside)
    (table.parent / "door").symlink_to(outside.parent)
    with pytest.raises(UserError, match=r"row 0 of .* leads to .*outside/cat/0\.png, outside of"):
        load(DataConfig(table=table))


def test_an_absolute_path_inside_the_root_is_fine(tree, tmp_path):
    table = write_csv(tree, [f"{tmp_path}/tree/a/cat/0.png,cat,a", "a/../b/cat/0.png,cat,b"])
    assert load(DataConfig(table=table)).keys == ("a/cat/0.png", "b/cat/0.png")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a/cat/0.png,,a"], "row 0 of .* has no 'label'"),
        (["a/cat/0.png,cat,a", ",cat,a"], "row 1 of .* has no image"),
        (["a/cat/0.png,cat,a", "b/cat/0.png,cat,b", "./a/cat/0.png,cat,b"], "rows 0 and 2 .* both name"),
        (["a/cat/0.png,cat"], "cannot be read: line 2 has 2 cells, but there are 3 columns"),
        ([], "no rows"),
    ],
)
def test_bad_rows(tree, rows, message):
    with pytest.raises(UserError, match=message):
        load(DataConfig(table=write_csv(tree, rows)))


def test_row_72_a_column_twice(tree):
    path = write_csv(tree, ["a/cat/0.png,cat,cat,a"], header="image,label,label,domain")
    with pytest.raises(
        UserError, match=r"t\.csv has the column 'label' more than once \(columns: image, label, label, "
    ):
        load(DataConfig(table=path))
    path = write_csv(tree, ["a/cat/0.png,cat,a,1,2", "b/cat/0.png,cat,b,1,2"], header="image,label,domain,note,note")
    assert len(load(DataConfig(table=path))) == 2  # nobody asks for the notes


def test_all_missing_columns_are_told_at_once(tree):
    path = write_csv(tree, header="path,class,style")
    with pytest.raises(UserError) as caught:
        load(DataConfig(table=path))
    message = str(caught.value)
    for setting in ("image_column='image'", "label_column='label'", "domain_column='domain'"):
        assert f"data.{setting} is not a column" in message
    assert "(columns: path, class, style)" in message


def test_a_table_without_domains_is_one_unnamed_domain(tree):
    path = write_csv(tree, ["a/cat/0.png,cat", "b/cat/0.png,cat"], header="image,label")
    assert load(DataConfig(table=path)).domains == ("unnamed",)
    with pytest.raises(UserError, match=r"domain_column='domain' is not a column"):
        load(DataConfig(table=path, domain_column="domain"))
    for name in ("Domain", "domains", "domian"):
        path = write_csv(tree, header=f"image,label,{name}")
        with pytest.raises(UserError, match=rf"domain_column='domain' is not a column.*did you mean '{name}'"):
            load(DataConfig(table=path))
    for name in ("origin", "main_colour", "location"):
        assert load(DataConfig(table=write_csv(tree, header=f"image,label,{name}"))).domains == ("unnamed",)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_marks_are_recognised(tree, separator, encoding):
    path = write_csv(tree)
    text = path.read_text().replace(",", separator).replace("cat" + separator, f'"ca,t;"{separator}')
    path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    dataset = load(DataConfig(table=path))
    assert dataset.keys == ("a/cat/0.png", "a/cat/1.png", "b/cat/0.png") and dataset.classes == ("ca,t;",)


def test_windows_paths_are_read_here(tree):
    path = write_csv(tree, ["a\\cat\\0.png,cat,a", ".\\a\\cat\\1.png,cat,a", "b/cat/0.png,cat,b"])
    dataset = load(DataConfig(table=path))
    assert dataset.keys == ("a/cat/0.png", "a/cat/1.png", "b/cat/0.png")
    assert dataset.image(0).size == (12, 10)


def test_quotes_after_a_blank_are_no_part_of_a_cell(tree):
    path = write_csv(tree, ['a/cat/0.png, "cat", a', 'b/cat/0.png, "cat", "b"'])
    dataset = load(DataConfig(table=path))
    assert dataset.classes == ("cat",) and dataset.domains == ("a", "b")


@pytest.mark.parametrize("word", ["nan", "NaN"])
def test_a_missing_domain_as_programs_write_it(tree, word):
    path = write_csv(tree, ["a/cat/0.png,cat,a", f"b/cat/0.png,cat,{word}"])
    with pytest.raises(
        UserError, match=rf"row 1 of .* has the 'domain' '{word}', which is how a program writes a cell"
    ):
        load(DataConfig(table=path))


def test_missing_column_and_other_kinds_of_file(tree):
    path = write_csv(tree)
    with pytest.raises(UserError, match=r"label_column='lable'.*did you mean 'label'.*columns: image, label, domain"):
        load(DataConfig(table=path, label_column="lable"))
    with pytest.raises(UserError, match=r"expected \.csv, \.tsv or \.parquet"):
        load(DataConfig(table=path.rename(path.with_suffix(".xlsx"))))
    with pytest.raises(UserError, match="is not a file"):
        load(DataConfig(table=path))


def embedded(tree) -> datasets.Dataset:
    """Six images as a dataset of the hub has them: bytes and a bare name, ClassLabel, domain as text."""
    root = tree(["a", "b"], ["cat", "dog"], 2)
    files = sorted(root.glob("*/*/*.png"), reverse=True)
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
            "label": [["dog", "cat"].index(path.parent.name) for path in files],
            "domain": [path.parent.parent.name for path in files],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["dog", "cat"]),
                "domain": datasets.Value("string"),
            }
        ),
    )


@pytest.mark.parametrize("kind", ["disk", "dict", "hub_parquet", "table_parquet", "folder"])
def test_embedded_images_equal_the_folder(tree, tmp_path, kind):
    source = embedded(tree)
    place = tmp_path / "stored"
    if kind == "disk":
        source.save_to_disk(place)
    elif kind == "dict":
        datasets.DatasetDict({"train": source}).save_to_disk(place)
    else:
        place.mkdir()
        source.to_parquet(place / "data.parquet")
    if kind == "table_parquet":
        config = DataConfig(table=place / "data.parquet")
    else:
        config = DataConfig(hub=str(place / "data.parquet" if kind == "hub_parquet" else place))
    dataset = load(config)
    folder = load(DataConfig(root=tmp_path / "tree"))
    assert dataset.classes == ("cat", "dog")
    assert dataset.keys == folder.keys  # domain/class/name: the names are unique with these
    assert np.array_equal(dataset.labels, folder.labels) and dataset.hashes == folder.hashes
    assert np.array_equal(dataset.image(5), folder.image(5))
    assert "row " in dataset.source(0) and "0.png" in dataset.source(0)
    assert load(config).fingerprint == dataset.fingerprint


def with_other_image(source: datasets.Dataset) -> datasets.Dataset:
    """One image has another checksum behind its last pixel, which nobody looks at: other content of the same size."""
    images = source.cast_column("image", datasets.Image(decode=False))["image"][:]
    content = images[0]["bytes"]
    images[0] = {**images[0], "bytes": content[:-1] + bytes([content[-1] ^ 1])}
    columns = {"image": images, "label": source["label"][:], "domain": source["domain"][:]}
    return datasets.Dataset.from_dict(columns, features=source.features)


@pytest.mark.parametrize("verify", [True, "full"])
@pytest.mark.parametrize("kind", ["table", "hub", "folder", "disk"])
def test_row_65_a_table_of_images_is_read_anew_when_it_is_replaced_with_its_time_kept(
    tree, tmp_path, own_cache, kind, verify
):
    source, place = embedded(tree), tmp_path / "stored"
    place.mkdir()
    table = place / ("data-00000-of-00001.arrow" if kind == "disk" else "data.parquet")
    name = place if kind in ("folder", "disk") else table
    config = DataConfig(table=table) if kind == "table" else DataConfig(hub=str(name))

    def write(content: datasets.Dataset) -> None:
        if kind == "disk":
            content.save_to_disk(tmp_path / "draft")
            if (place / "state.json").exists():  # the table alone is replaced
                shutil.copy(tmp_path / "draft" / table.name, table)
            else:
                shutil.copytree(tmp_path / "draft", place, dirs_exist_ok=True)
        else:
            content.to_parquet(tmp_path / "draft.parquet")
            shutil.copy(tmp_path / "draft.parquet", table)
        os.utime(table, ns=(10**18, 10**18))

    write(source)
    first = load(config)
    table.rename(tmp_path / "old")  # mapped into memory until then
    write(with_other_image(source))
    second = load(config.model_copy(update={"verify": verify}))
    assert sum(a != b for a, b in zip(first.hashes, second.hashes, strict=True)) == 1


def test_a_local_image_folder_with_metadata(tree, tmp_path):
    root = tree(["a", "b"], ["cat"], 2)
    lines = [f"{path.relative_to(root)},{path.parent.name},{path.parts[-3]}" for path in root.glob("*/*/*.png")]
    (root / "metadata.csv").write_text("\n".join(["file_name,what,domain", *lines]))
    dataset = load(DataConfig(hub=str(root), label_column="what"))
    assert dataset.keys == load(DataConfig(root=root)).keys
    assert dataset.base == root


def test_rows_without_names_are_called_by_number(tree, tmp_path):
    source = embedded(tree).cast_column("image", datasets.Image(decode=False))
    nameless = source.map(lambda row: {"image": {"bytes": row["image"]["bytes"], "path": None}})
    nameless.save_to_disk(tmp_path / "stored")
    dataset = load(DataConfig(hub=str(tmp_path / "stored")))
    assert sorted(dataset.keys) == [f"row {row:09d}" for row in range(8)]


def test_bad_embedded_image_names_its_row(tree, tmp_path):
    source = embedded(tree).cast_column("image", datasets.Image(decode=False))
    broken = source.map(
        lambda row, i: {"image": {"bytes": b"" if i == 5 else row["image"]["bytes"]}}, with_indices=True
    )
    broken.save_to_disk(tmp_path / "stored")
    with pytest.raises(UserError, match=r"(?s)1 of 8 images.*row 5 of .*stored.*: the file is empty"):
        load(DataConfig(hub=str(tmp_path / "stored")))


def test_row_16_a_stored_dataset_may_not_point_anywhere(tmp_path):
    outside = write_image(tmp_path / "outside" / "cat" / "0.png")
    source = datasets.Dataset.from_dict({"image": [str(outside)], "label": ["cat"], "domain": ["a"]})
    source.save_to_disk(tmp_path / "stored")
    with pytest.raises(UserError, match=r"row 0 .*leads to .*outside"):
        load(DataConfig(hub=str(tmp_path / "stored")))
    config = DataConfig(hub=str(tmp_path / "stored"), image_root=tmp_path)
    assert load(config).keys == ("outside/cat/0.png",)


def test_splits_of_a_stored_dataset(tree, tmp_path):
    source = embedded(tree)
    place = str(tmp_path / "stored")
    other = str(tmp_path / "other")
    datasets.DatasetDict({"one": source.select(range(6)), "two": source.select(range(6, 8))}).save_to_disk(other)
    with pytest.raises(UserError, match=r"splits one, two; choose one"):
        load(DataConfig(hub=other))
    datasets.DatasetDict({"train": source.select(range(6)), "test": source.select(range(6, 8))}).save_to_disk(place)
    with pytest.raises(UserError, match=r"splits train, test; choose one"):
        load(DataConfig(hub=place, given_splits="ignore"))
    with pytest.raises(UserError, match=r"'tset' is not a split .*did you mean 'test'"):
        load(DataConfig(hub=place, split="tset"))
    assert len(load(DataConfig(hub=place, split="test"))) == 2


def test_hidden_labels_are_refused(tree, tmp_path):
    source = embedded(tree)
    hidden = source.remove_columns("label").add_column("label", [-1] * 8).cast_column("label", source.features["label"])
    hidden.save_to_disk(tmp_path / "stored")
    with pytest.raises(UserError, match=r"row 0 of .* has no 'label'"):
        load(DataConfig(hub=str(tmp_path / "stored")))


def test_a_column_that_holds_no_images(tmp_path):
    source = datasets.Dataset.from_dict({"image": [1.5], "label": ["cat"], "domain": ["a"]})
    source.save_to_disk(tmp_path / "stored")
    with pytest.raises(UserError, match="not images or paths"):
        load(DataConfig(hub=str(tmp_path / "stored")))


def test_row_72_an_unwritable_cache_of_the_library(tree, tmp_path, monkeypatch):
    embedded(tree).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"cache of the library datasets, but .*file/cache cannot be written") as caught:
        load(DataConfig(table=tmp_path / "data.parquet"))
    assert "as Parquet" not in str(caught.value)


def test_row_72_a_column_twice_in_a_parquet_file(tree):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tree(["a", "b"], ["cat"], 1)
    columns = [["a/cat/0.png", "b/cat/0.png"], ["cat", "cat"], ["a", "b"], ["x", "y"]]
    pq.write_table(pa.table(columns, names=["image", "label", "domain", "label"]), root / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet has the column 'label' more than once"):
        load(DataConfig(table=root / "t.parquet"))


def test_hub_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="does not exist; give a hub id"):
        load(DataConfig(hub=str(tmp_path / "nowhere")))


def test_hub_without_network_says_how_to_fetch(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the cache .*hf download --repo-type dataset nobody/nothing"):
        load(DataConfig(hub="nobody/nothing"))


def test_config_name_reaches_the_library(monkeypatch, tree, tmp_path):
    asked = []

    def fake(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict({"train": embedded(tree)})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert len(load(DataConfig(hub="owner/pacs", config_name="mini"))) == 8
    assert asked == [("owner/pacs", "mini")]
