"""The held-out domain, the validation split, and the search for leaks."""

from __future__ import annotations

import shutil
import warnings

import pytest

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.splits import check_no_leak, leave_out, require_two_classes, split_train_validation
from disam_peft.errors import UserError


def dataset_of(root, **options):
    return load(DataConfig(root=root, verify=False, **options))


def test_leave_out_keeps_the_numbering(tree):
    dataset = dataset_of(tree(["a", "b", "c"], ["x", "y"], 2))
    sources, target = leave_out(dataset, "b")
    assert sources.present_domains == ("a", "c") and set(sources.domain_ids.tolist()) == {0, 2}
    assert target.present_domains == ("b",) and target.domain_ids.tolist() == [1] * 4
    assert sorted(sources.keys + target.keys) == sorted(dataset.keys)
    assert sources.domains == target.domains == ("a", "b", "c") and sources.classes == target.classes


def test_row_06_held_out_domain_misspelt(tree):
    dataset = dataset_of(tree(["photo", "sketch"], ["x"], 1))
    with pytest.raises(UserError, match=r"'skech' has no samples in .*did you mean 'sketch'.*found: photo, sketch"):
        leave_out(dataset, "skech")


def test_row_06_held_out_domain_empty(tree):
    dataset = dataset_of(tree(["photo", "sketch", "art"], ["x"], 1)).with_domains(["photo", "art"])
    assert "sketch" in dataset.domains
    with pytest.raises(UserError, match=r"'sketch' has no samples.*found: art, photo"):
        leave_out(dataset, "sketch")


def test_row_06_one_domain_leaves_nothing_to_train_on(tree):
    with pytest.raises(UserError, match="one domain, 'photo'"):
        leave_out(dataset_of(tree(["photo"], ["x"], 3)), "photo")


@pytest.mark.parametrize(("classes", "policy"), [(["cat"], "identical"), (["cat", "dog"], "intersection")])
def test_row_70_one_class_is_nothing_to_learn(tree, classes, policy):
    root = tree({"a": dict.fromkeys(classes, 1), "b": {"cat": 1}})
    with pytest.raises(UserError, match=r"has one class, 'cat': a classifier needs two or more"):
        require_two_classes(dataset_of(root, classes=policy))
    require_two_classes(dataset_of(tree(["a", "b"], ["cat", "dog"], 1, name="two")))


def test_split_sizes_per_domain(tree):
    dataset = dataset_of(tree({"a": {"x": 30}, "b": {"x": 55}}))
    train, validation = split_train_validation(dataset, 0.2, seed=0)
    assert [sum(validation.domain_ids == d) for d in (0, 1)] == [6, 11]
    assert sorted(train.keys + validation.keys) == sorted(dataset.keys)
    assert not set(train.keys) & set(validation.keys)


def test_split_follows_the_seed_and_only_the_keys(tree):
    dataset = dataset_of(tree({"a": {"x": 40}}))
    chosen = set(split_train_validation(dataset, 0.25, seed=0)[1].keys)
    assert chosen == set(split_train_validation(dataset.select(range(39, -1, -1)), 0.25, seed=0)[1].keys)
    assert chosen != set(split_train_validation(dataset, 0.25, seed=1)[1].keys)


def test_a_removed_file_moves_at_most_one_other(tree):
    dataset = dataset_of(tree({"a": {"x": 40}}))
    before = set(split_train_validation(dataset, 0.25, seed=3)[1].keys)
    moved_counts = []
    for gone in range(40):
        rest = dataset.select(i for i in range(40) if i != gone)
        after = set(split_train_validation(rest, 0.25, seed=3)[1].keys)
        moved_counts.append(len((before - {dataset.keys[gone]}) ^ after))
    assert max(moved_counts) == 1 and moved_counts.count(0) == 30


def test_row_01_domain_too_small_to_split(tree):
    dataset = dataset_of(tree({"a": {"x": 20}, "tiny": {"x": 1}}))
    with pytest.raises(UserError, match=r"'tiny' has 1 sample\(s\), 1 of which would validate and none train"):
        split_train_validation(dataset, 0.2, seed=0)
    with pytest.raises(UserError, match=r"'a' has 20 sample\(s\), 20 of which"):
        split_train_validation(dataset.with_domains(["a"]), 0.99, seed=0)


def test_row_01_few_validation_samples_warn(tree):
    dataset = dataset_of(tree({"a": {"x": 25}, "small": {"x": 3}}))
    with pytest.warns(UserWarning, match=r"few validation samples in 'small' \(1 of 3\):"):
        train, validation = split_train_validation(dataset, 0.2, seed=0)
    assert len(validation) == 5 + 1 and len(train) == 20 + 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_train_validation(dataset.with_domains(["a"]), 0.2, seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_fraction_out_of_range(tree, fraction):
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        split_train_validation(dataset_of(tree(["a"], ["x"], 3)), fraction, seed=0)


def test_row_07_held_out_domain_also_a_source(tree):
    dataset = dataset_of(tree(["a", "b"], ["x"], 2))
    with pytest.raises(UserError, match="held-out domain 'b' is also a source"):
        check_no_leak(dataset, dataset.with_domains(["b"]))


@pytest.mark.parametrize("verify", [False, True])
def test_row_07_same_file_on_both_sides(tree, verify):
    root = tree(["a", "b", "c"], ["x", "y"], 3)
    clean = load(DataConfig(root=root, verify=verify))
    check_no_leak(*leave_out(clean, "c"))
    shutil.copy(root / "a/x/1.png", root / "c/y/other_name.png")
    sources, target = leave_out(load(DataConfig(root=root, verify=verify)), "c")
    with pytest.raises(UserError) as caught:
        check_no_leak(sources, target)
    message = str(caught.value)
    assert "leak: 1 image file(s)" in message
    assert "a/x/1.png" in message and "c/y/other_name.png" in message and "0.png" not in message


def test_pacs_mini_leaves_every_domain_out(pacs_mini):
    dataset = dataset_of(pacs_mini)
    for name in dataset.domains:
        sources, target = leave_out(dataset, name)
        check_no_leak(sources, target)
        train, validation = split_train_validation(sources, 0.2, seed=0)
        assert (len(train), len(validation), len(target)) == (3 * 336, 3 * 84, 420)
