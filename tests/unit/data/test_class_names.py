"""Folder names as words for a prompt."""

from __future__ import annotations

import unicodedata

import pytest

from disam_peft.data.class_names import clean_class_name, prompt_names, read_overrides
from disam_peft.errors import UserError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("art_painting", "art painting"),
        ("dog", "dog"),
        ("Alarm_Clock", "alarm clock"),
        ("AlarmClock", "alarm clock"),
        ("t-shirt", "t shirt"),
        ("St._Bernard", "st bernard"),
        ("the_Eiffel_Tower", "the Eiffel Tower"),
        ("The_Eiffel_Tower", "the eiffel tower"),
        ("TV", "TV"),
        ("Flat_TV", "flat TV"),
        ("TVStand", "TV stand"),
        ("iPod", "iPod"),
        ("McDonald", "McDonald"),
        ("001.ak47", "ak47"),
        ("012_dog", "dog"),
        ("257-cat", "cat"),
        ("18_wheeler", "18 wheeler"),
        ("7", "7"),
        ("007", "007"),
        ("version_2.5", "version 2.5"),
        ("  a__b--c ", "a b c"),
    ],
)
def test_clean(raw, clean):
    assert clean_class_name(raw) == clean


@pytest.mark.parametrize("name", ["", "  ", "___", "-"])
def test_row_20_empty_class_name(name):
    with pytest.raises(UserError, match="is empty once cleaned"):
        clean_class_name(name)


@pytest.mark.parametrize("name", ["{", "{0}", "{label}", "a}b", "%s"])
def test_row_20_braces_are_taken_literally(name):
    assert clean_class_name(name) == name


@pytest.mark.parametrize("name", ["חתול", "قطة سوداء", "猫", "👩‍🚀", "🐕 dog", "café"])
def test_row_21_unicode_rtl_and_emoji_pass(name):
    assert clean_class_name(name) == name


def test_row_21_nfc():
    assert clean_class_name(unicodedata.normalize("NFD", "Café_Bar")) == "café bar"


def test_overrides_replace_single_names():
    assert prompt_names(["ak47", "Big_Dog"], {"ak47": " assault  rifle "}) == ("assault rifle", "big dog")
    assert prompt_names(["x"], {"x": "Keep_This"}) == ("Keep_This",)


def test_two_classes_with_one_prompt_name():
    with pytest.raises(UserError, match=r"'big_dog', 'big-dog' all read 'big dog'"):
        prompt_names(["big_dog", "big-dog", "cat"])
    with pytest.raises(UserError, match=r"all read 'dog'"):
        prompt_names(["dog", "hound"], {"hound": "dog"})
    assert prompt_names(["big_dog", "big-dog"], {"big-dog": "giant dog"}) == ("big dog", "giant dog")


def test_override_of_an_unknown_class_or_with_nothing():
    with pytest.raises(UserError, match=r"no class 'giraf'; did you mean 'giraffe'"):
        prompt_names(["giraffe", "dog"], {"giraf": "x"})
    with pytest.raises(UserError, match=r"name of class 'dog' is empty"):
        prompt_names(["dog"], {"dog": "  "})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.yaml", "- a\n- b\n", "holds a list"),
        ("n.yaml", "no: 3\n", "'no': 3.*quotes"),
        ("n.yaml", "a: 3\n", "'a': 3.*quotes"),
        ("n.yaml", "a: [", "n.yaml is not valid YAML"),
        ("n.json", "{", "cannot be parsed"),
        ("n.json", '{"dog": "x", "dog": "y"}', "the key 'dog' is there twice"),
    ],
)
def test_override_file_is_strict(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_overrides(path)
    with pytest.raises(UserError, match="cannot read"):
        read_overrides(tmp_path / "none.yaml")


def test_row_50_classes_that_look_like_numbers_are_named_in_a_file(tmp_path):
    path = tmp_path / "names.yaml"
    path.write_text("0: zero\n007: agent\n1e3: thousand\n0.0: nothing\nno: norway\nnull: void\n2009-01-01: new year\n")
    assert read_overrides(path) == {
        "0": "zero",
        "007": "agent",
        "1e3": "thousand",
        "0.0": "nothing",
        "no": "norway",
        "null": "void",
        "2009-01-01": "new year",
    }
