"""The same image in two parts of a split, or under two classes."""

from __future__ import annotations

import shutil
import warnings

import pytest

from disam_peft.config.data import DataConfig
from disam_peft.data.duplicates import check_duplicates, label_conflicts
from disam_peft.data.load import load
from disam_peft.data.splits import split_train_validation
from disam_peft.errors import UserError


def copies(tree):
    """A validation image of each of two domains lies in the other one's training part; one image has two classes."""
    root = tree(["photo", "art"], ["cat", "dog"], 10)
    dataset = load(DataConfig(root=root))
    training, validation = split_train_validation(dataset, 0.2, seed=0)
    shutil.copy(validation.source(0), training.source(0))
    shutil.copy(root / "photo/dog/1.png", root / "photo/cat/1.png")
    return root, validation.source(0), training.source(0)


def split(root, **options):
    dataset = load(DataConfig(root=root, **options))
    training, validation = split_train_validation(dataset, 0.2, seed=0)
    return {"training": training, "validation": validation}


@pytest.mark.parametrize("verify", [True, False])
def test_row_71_the_same_image_in_training_and_validation(tree, verify):
    root, validates, trains = copies(tree)
    parts = split(root, verify=verify)
    with pytest.raises(UserError, match=r"image\(s\) of the validation part are also in the training part") as caught:
        check_duplicates(parts, "error")
    assert f"{trains}  =  {validates}" in str(caught.value)
    with pytest.warns(UserWarning, match=r"also in the training part.*(?s:.*)data\.duplicates=error refuses"):
        check_duplicates(parts, "warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_duplicates(parts, "ignore")


def test_row_71_one_image_with_two_classes(tree):
    root, _, _ = copies(tree)
    parts = split(root)
    with pytest.raises(UserError, match=r"image\(s\) have several classes") as caught:
        check_duplicates({"training": parts["training"]}, "error", target=parts["validation"])
    message = str(caught.value)
    assert f"{root}/photo/cat/1.png (cat)  =  {root}/photo/dog/1.png (dog)" in message
    assert any(len(members) == 2 for members in label_conflicts(load(DataConfig(root=root))))


def test_clean_data_pass_without_a_word(tree):
    parts = split(tree(["photo", "art"], ["cat", "dog"], 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_duplicates(parts, "warn", target=parts["validation"])
        check_duplicates(parts, "error")


def test_a_long_list_is_cut(tree):
    root = tree(["photo", "art"], ["cat"], 40)
    for i in range(40):
        shutil.copy(root / f"photo/cat/{i}.png", root / f"art/cat/{i}.png")
    with pytest.raises(UserError, match=r"and \d+ more\n"):
        check_duplicates(split(root), "error")
