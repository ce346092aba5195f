"""Folder trees, the choice of domains and classes, and the strictness of DataConfig."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from disam_peft.config.data import DataConfig
from disam_peft.data.load import agree, load
from disam_peft.errors import UserError
from tests.helpers.tiny_images import write_image


def test_folder_tree_is_numbered_in_sorted_order(tree):
    root = tree({"sketch": {"dog": 2, "cat": 1}, "art": {"cat": 3, "dog": 1}})
    dataset = load(DataConfig(root=root))
    assert dataset.domains == ("art", "sketch")
    assert dataset.classes == ("cat", "dog")
    assert dataset.domain_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert dataset.labels.dtype == dataset.domain_ids.dtype == np.int64
    assert dataset.keys[3] == "art/dog/0.png"
    assert dataset.source(3) == str(root / "art/dog/0.png")
    assert dataset.image(3).mode == "RGB" and dataset.image(3).size == (12, 10)


@pytest.mark.slow
def test_pacs_mini_census(pacs_mini):
    dataset = load(DataConfig(root=pacs_mini))
    assert len(dataset) == 4 * 7 * 60
    assert np.bincount(dataset.domain_ids * 7 + dataset.labels).tolist() == [60] * 28
    assert dataset.prompt_names[0] == "dog" and dataset.domains[0] == "art_painting"
    assert dataset.hashes is not None and len(set(dataset.hashes)) == 1680


def test_views_keep_the_numbering(tree):
    dataset = load(DataConfig(root=tree(["a", "b", "c"], ["cat", "dog"], 2)))
    view = dataset.with_domains(["c"]).select([1, 3])
    assert view.present_domains == ("c",) and view.domains == ("a", "b", "c")
    assert view.domain_ids.tolist() == [2, 2]
    assert view.keys == ("c/cat/1.png", "c/dog/1.png")
    assert view.content(1) == (dataset.base / "c/dog/1.png").read_bytes()
    assert dataset.hashes is not None and view.hashes == (dataset.hashes[9], dataset.hashes[11])
    with pytest.raises(IndexError):
        view.select([2])


def test_hidden_and_other_files_are_passed_over_and_counted(tree):
    root = tree({"a": {"cat": 1}})
    (root / "README.md").write_text("about")
    (root / ".git").mkdir()
    (root / "a/cat/.hidden.png").write_bytes(b"")
    (root / "a/cat/notes.txt").write_text("x")
    (root / "a/cat/list").write_text("x")
    write_image(root / "a" / "loose.png")
    dataset = load(DataConfig(root=root))
    assert dataset.keys == ("a/cat/0.png",)
    assert dataset.ignored == {
        ".md": 1,
        ".txt": 1,
        "hidden": 2,
        "image outside a class folder": 1,
        "no extension": 1,
    }


def test_extensions_count_in_any_case(tree):
    root = tree({"a": {"cat": 1}})
    os.rename(root / "a/cat/0.png", root / "a/cat/0.PNG")
    assert load(DataConfig(root=root)).keys == ("a/cat/0.PNG",)


def test_fingerprint_follows_content_not_place(tree):
    layout = {"a": {"cat": 2}, "b": {"cat": 2}}
    first, second = (load(DataConfig(root=tree(layout, name=name))) for name in ("one", "two"))
    assert first.fingerprint == second.fingerprint
    assert first.select([0, 1, 2]).fingerprint != first.fingerprint
    grown = tree(layout, name="three")
    with open(grown / "a/cat/1.png", "ab") as file:
        file.write(b"\0")
    assert load(DataConfig(root=grown)).fingerprint != first.fingerprint
    moved = tree({"a": {"dog": 2}, "b": {"dog": 2}}, name="four")
    assert load(DataConfig(root=moved)).fingerprint != first.fingerprint


# -- domains and classes -------------------------------------------------------------------------------------


def test_domains_restricts_before_anything_is_compared(tree):
    root = tree({"a": {"cat": 1}, "b": {"cat": 1}, "other": {"Cat": 1}})
    assert load(DataConfig(root=root, domains=["b", "a"])).domains == ("a", "b")


def test_unknown_domain_gets_close_names(tree):
    root = tree(["sketch", "photo"], ["cat"], 1)
    with pytest.raises(UserError, match=r"no domain 'skecth'.*did you mean 'sketch'.*found: photo, sketch"):
        load(DataConfig(root=root, domains=["photo", "skecth"]))


LAYOUT_08 = {"art": {"cat": 1, "dog": 1}, "photo": {"cat": 2, "owl": 1}, "sketch": {"cat": 1, "dog": 1, "owl": 1}}


def test_row_08_class_folders_differ(tree):
    root = tree(LAYOUT_08)
    with pytest.raises(UserError) as caught:
        load(DataConfig(root=root))
    message = str(caught.value)
    assert "1 of 3" in message
    assert "art lacks 'owl'" in message and "photo lacks 'dog'" in message and "sketch lacks" not in message
    assert "intersection" in message and "union" in message


def test_row_08_intersection_and_union_opt_in(tree):
    root = tree(LAYOUT_08)
    common = load(DataConfig(root=root, classes="intersection"))
    assert common.classes == ("cat",) and len(common) == 4
    every = load(DataConfig(root=root, classes="union"))
    assert every.classes == ("cat", "dog", "owl") and len(every) == 8


def test_row_08_an_empty_class_folder_is_no_class(tree):
    with pytest.raises(UserError, match=r"b lacks 'dog'"):
        load(DataConfig(root=tree({"a": {"cat": 1, "dog": 1}, "b": {"cat": 1, "dog": 0}})))


def test_row_08_nothing_in_common():
    with pytest.raises(UserError, match="no class in common"):
        agree({"a": {"cat"}, "b": {"dog"}}, "intersection")


@pytest.mark.parametrize("policy", ["identical", "intersection", "union"])
def test_row_09_names_that_differ_only_in_case(policy):
    with pytest.raises(UserError, match=r"'Dog' in art; 'dog' in photo, sketch"):
        agree({"art": {"Dog"}, "photo": {"dog"}, "sketch": {"dog"}}, policy)


@pytest.mark.parametrize("twin", ["Photo", "photo ", "PHOTO"])
def test_row_48_domains_that_differ_only_in_case_or_spaces(tree, twin):
    root = tree({"photo": {"dog": 2}, twin: {"dog": 2}, "sketch": {"dog": 2}})
    if len(list(root.iterdir())) < 3:
        pytest.skip("this file system does not tell them apart")
    with pytest.raises(UserError, match="likely the same domain: ") as caught:
        load(DataConfig(root=root, verify=False))
    assert f"{twin!r}" in str(caught.value) and "'photo'" in str(caught.value)
    assert load(DataConfig(root=root, verify=False, domains=["photo", "sketch"])).domains == ("photo", "sketch")


def test_row_48_classes_that_differ_only_in_spaces(tree):
    with pytest.raises(UserError, match="likely the same class: 'big  dog' in sketch; 'big dog' in photo"):
        agree({"photo": {"big dog"}, "sketch": {"big  dog"}}, "union")


def test_row_21_two_unicode_spellings_are_one_class(tree):
    composed = unicodedata.normalize("NFC", "café")
    decomposed = unicodedata.normalize("NFD", "café")
    assert composed != decomposed
    dataset = load(DataConfig(root=tree({"a": {composed: 1, "חתול": 1}, "b": {decomposed: 1, "חתול": 1}})))
    assert dataset.classes == (composed, "חתול")
    assert dataset.image(2).size == (12, 10)


def test_numbers_as_classes_warn(tree):
    root = tree(["a"], ["0", "1"], 1)
    with pytest.warns(UserWarning, match=r"bare numbers \(0, 1\)"):
        load(DataConfig(root=root))


def test_class_names_file(tree, tmp_path):
    root = tree(["a"], ["ak_47", "dog"], 1)
    names = tmp_path / "names.yaml"
    names.write_text("ak_47: assault rifle\n")
    assert load(DataConfig(root=root, class_names=names)).prompt_names == ("assault rifle", "dog")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"dgo": "hound"}))
    with pytest.raises(UserError, match=r"no class 'dgo'; did you mean 'dog'"):
        load(DataConfig(root=root, class_names=names))


# -- layouts that are not what was expected ------------------------------------------------------------------


def test_missing_root_says_what_was_expected(tree):
    root = tree(["a"], ["cat"], 1, name="pacs")
    with pytest.raises(UserError, match=r"does not exist; did you mean 'pacs'.*root/<domain>/<class>/\*\.jpg"):
        load(DataConfig(root=root.with_name("pcas")))


def test_root_that_is_a_file(tmp_path):
    with pytest.raises(UserError, match="is a file"):
        load(DataConfig(root=write_image(tmp_path / "x.png")))


def test_classes_without_the_level_of_domains_are_one_unnamed_domain(tree, tmp_path):
    write_image(tmp_path / "flat" / "cat" / "0.png")
    write_image(tmp_path / "flat" / "dog" / "0.png")
    dataset = load(DataConfig(root=tmp_path / "flat"))
    assert dataset.domains == ("unnamed",) and dataset.classes == ("cat", "dog")
    assert dataset.keys == ("cat/0.png", "dog/0.png")
    with pytest.raises(UserError, match=r"no domain 'photo' in .*found: unnamed"):
        load(DataConfig(root=tmp_path / "flat", domains=["photo"]))


def test_root_with_images_and_nothing_else(tmp_path):
    write_image(tmp_path / "flat" / "0.png")
    with pytest.raises(UserError, match="without domain and class folders"):
        load(DataConfig(root=tmp_path / "flat"))


def test_root_one_level_too_high(tree):
    root = tree(["a"], ["cat"], 1, name="above/pacs")
    with pytest.raises(UserError, match=r"one more level.*above/pacs\)"):
        load(DataConfig(root=root.parent))


def test_root_without_images_names_what_it_passed_over(tree):
    root = tree({"a": {"cat": 0}})
    (root / "a/cat/x.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in .*passed over: 1 \.heic"):
        load(DataConfig(root=root))


@pytest.mark.parametrize("level", ["a/cat/out.png", "a/dog", "b"])
def test_row_16_a_link_out_of_the_root(tree, tmp_path, level):
    outside = write_image(tmp_path / "outside" / "dog" / "0.png")
    target = {"a/cat/out.png": outside, "a/dog": outside.parent, "b": outside.parent.parent}[level]
    root = tree({"a": {"cat": 1}})
    (root / level).symlink_to(target)
    with pytest.raises(UserError, match=rf"the link .*{level} leads to .*outside"):
        load(DataConfig(root=root))


def test_row_16_links_inside_and_a_linked_root_are_fine(tree, tmp_path):
    root = tree({"a": {"cat": 1}})
    (root / "a/cat/1.png").symlink_to("0.png")
    (tmp_path / "alias").symlink_to(root)
    assert load(DataConfig(root=tmp_path / "alias")).keys == ("a/cat/0.png", "a/cat/1.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tree):
    root = tree({"a": {"cat": 1}})
    os.mkfifo(root / "a/cat/pipe.png")
    assert load(DataConfig(root=root)).ignored == {"not a regular file": 1}


def test_a_dangling_link_is_kept_for_the_data_check(tree):
    root = tree({"a": {"cat": 1}})
    (root / "a/cat/1.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"1 of 2 images(?s:.*)1\.png: cannot be read"):
        load(DataConfig(root=root))


# -- files that are not used -----------------------------------------------------------------------------------


def test_row_69_pictures_that_are_passed_over_are_said(tree):
    root = tree(["photo", "sketch"], ["cat", "dog"], 3)
    (root / "photo/cat/0.png").rename(root / "photo/cat/0.heic")
    (root / "photo/cat/1.png").rename(root / "photo/cat/1.HEIC")
    (root / "sketch/notes.txt").write_text("x")
    write_image(root / "sketch" / "loose.png")
    with pytest.warns(UserWarning, match=r"not used are 2 \.heic in photo/cat \(install pillow-heif to read") as caught:
        dataset = load(DataConfig(root=root))
    message = str(caught[0].message)
    assert "1 image outside a class folder in sketch" in message and ".txt" not in message
    assert dataset.ignored == {".heic": 2, ".txt": 1, "image outside a class folder": 1}
    assert dataset.ignored_in[".heic"] == {"photo/cat": 2}


def test_row_69_they_are_said_before_what_follows_from_them(tree):
    root = tree(["photo", "sketch"], ["cat", "dog"], 1)
    (root / "photo/cat/0.png").rename(root / "photo/cat/0.heic")
    with pytest.warns(UserWarning, match=r"1 \.heic in photo/cat"), pytest.raises(UserError, match="photo lacks 'cat'"):
        load(DataConfig(root=root))


@pytest.mark.parametrize("name", ["0.heic", None])
def test_row_69_a_domain_without_an_image_does_not_vanish(tree, name):
    root = tree({"photo": {"cat": 2}, "sketch": {"cat": 2}, "scan": {"cat": 0}})
    if name is not None:
        (root / "scan/cat" / name).write_bytes(b"x")
    reason = r"passed over: 1 \.heic" if name else "its folder is empty"
    with pytest.raises(UserError, match=rf"domain 'scan' of .* has no image that can be used \({reason}"):
        load(DataConfig(root=root))
    assert load(DataConfig(root=root, domains=["photo", "sketch"])).present_domains == ("photo", "sketch")


def test_row_69_a_domain_of_nothing_but_broken_images_does_not_vanish(tree):
    root = tree({"photo": {"cat": 200}, "scan": {"cat": 1}})
    (root / "scan/cat/0.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image of the domain 'scan' can be used, for example .*scan/cat/0\.png"):
        load(DataConfig(root=root, skip_bad=True))


def test_a_folder_of_notes_is_no_domain(tree):
    root = tree({"photo": {"cat": 1}})
    (root / "splits").mkdir()
    (root / "splits/train.txt").write_text("x")
    assert load(DataConfig(root=root)).domains == ("photo",)


def test_jfif_is_jpeg(tree):
    root = tree({"photo": {"cat": 1}})
    Image.open(root / "photo/cat/0.png").save(root / "photo/cat/1.jfif", "JPEG")
    assert load(DataConfig(root=root)).keys == ("photo/cat/0.png", "photo/cat/1.jfif")


def test_most_images_above_the_class_folders(tree):
    root = tree({"cat": {"old": 1}, "dog": {}})
    for i in range(3):
        write_image(root / "dog" / f"{i}.png")
    with pytest.raises(UserError, match=r"most images of .* \(3 of 4\) lie higher in the tree than cat/old/0\.png"):
        load(DataConfig(root=root))


def test_a_level_too_many_gets_advice_that_keeps_the_domains(tree, tmp_path):
    for domain in ("a", "b"):
        for name in ("cat", "dog"):
            write_image(tmp_path / "deep" / domain / name / "session1" / "0.png")
    with pytest.raises(UserError, match=r"session1 is a folder where images were expected") as caught:
        load(DataConfig(root=tmp_path / "deep"))
    assert "as data.root" not in str(caught.value) and "Move the images up" in str(caught.value)


# -- the config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got none of them"),
        ({"root": "r", "table": "t.csv"}, "got root and table"),
        ({"root": "r", "image_column": "x"}, "image_column has no meaning with data.root"),
        ({"table": "t.csv", "split": "train"}, "split has no meaning with data.table"),
        ({"root": "r", "verify": False, "skip_bad": True}, "skip_bad needs verify"),
        ({"root": "r", "domains": []}, "at least 1"),
        ({"root": "r", "max_pixels": 200_000_000}, "178956970"),
        ({"root": "r", "clases": "union"}, "clases"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


def test_verify_and_max_pixels_change_what_load_does(tree):
    root = tree({"a": {"cat": 1}})
    Path(root / "a/cat/bad.png").write_bytes(b"")
    assert len(load(DataConfig(root=root, verify=False))) == 2
    with pytest.raises(UserError, match=r"1 of 2 images"):
        load(DataConfig(root=root))
    with pytest.raises(UserError, match=r"(?s)2 of 2 images.*12 x 10 = 120 pixels, more than the limit of 119"):
        load(DataConfig(root=root, max_pixels=119))
