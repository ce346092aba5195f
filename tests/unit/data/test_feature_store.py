"""A feature store is built by all ranks together, each its share, and a refusal ends them all."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from disam_peft.common import processes
from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.stores import features
from disam_peft.data.stores.features import FeatureKey, FeatureStore, open_or_build
from disam_peft.errors import UserError
from tests.helpers.ranks import fork_ranks, gloo_group

KEY = FeatureKey("backbone", None, "float32/no", "transform", "data", views=2)
IMAGES = 2 * 2 * 4


@pytest.fixture
def dataset(tree, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    return load(DataConfig(root=tree(["a", "b"], ["x", "y"], 4)))


def view(image, index, epoch):
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1) * (1 + epoch)


def build(dataset, folder: Path) -> tuple[FeatureStore, list[int]]:
    """The store, and how many images each call has encoded."""
    encoded: list[int] = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels.mean((2, 3))

    return open_or_build(KEY, dataset, view, encode, folder=folder, workers=0), encoded


def test_each_rank_builds_its_share_and_all_read_the_same(dataset, tmp_path):
    alone, encoded = build(dataset, tmp_path / "alone")
    assert encoded == [1, *[3] * 10, 2], "a blank image, then chunks of 3 of the 32 views"
    whole = alone.rows(range(IMAGES), 0), alone.rows(range(IMAGES), 1)
    assert torch.allclose(whole[1], 2 * whole[0]) and not torch.equal(whole[0][:8], whole[0][8:])

    def work(rank: int) -> None:
        with gloo_group(tmp_path, rank, 2):
            store, encoded = build(dataset, tmp_path / "together")
            assert sum(encoded) == {0: 1 + 5 * 3 + 2, 1: 1 + 5 * 3}[rank], "11 chunks in turn"
            for number in range(2):
                assert torch.equal(store.rows(range(IMAGES), number), whole[number])

    fork_ranks(2, work)
    [place] = (tmp_path / "together").glob("*/")
    assert sorted(os.listdir(place)) == ["checksums.bin", "features.bin", "store.json"]
    again, encoded = build(dataset, tmp_path / "together")
    assert encoded == [] and torch.equal(again.rows(range(IMAGES), 1), whole[1])


def test_a_disk_without_room_is_an_error_on_every_rank(dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 100))

    def work(rank: int) -> None:
        with gloo_group(tmp_path, rank, 2):
            with pytest.raises(UserError, match=r"16 images x 2 views needs 404 bytes"):
                build(dataset, tmp_path / "full")
            assert processes.from_all(rank) == [0, 1], "nobody is left waiting"

    fork_ranks(2, work)
    assert list((tmp_path / "full").glob("*/")) == []


@pytest.mark.parametrize("where", ["elsewhere", "in place"])
def test_unread_images_of_equal_names_sizes_and_times_are_other_data(tree, where):
    """A store of the one must not be served for the other."""
    first = tree(["a", "b"], ["x", "y"], 2, name="first")
    second = tree(["a", "b"], ["x", "y"], 2, name="second" if where == "elsewhere" else "replacement")
    for file in [*first.rglob("*.png"), *second.rglob("*.png")]:
        file.write_bytes(file.read_bytes().ljust(2000, b"\0"))
        os.utime(file, ns=(10**18, 10**18))
    config = DataConfig(root=first, verify=False)
    before = load(config)
    known, again = before.content_identity, load(config).content_identity
    if where == "in place":
        for file in second.rglob("*.png"):
            os.replace(file, first / file.relative_to(second))
    now = load(config if where == "in place" else DataConfig(root=second, verify=False))
    assert now.fingerprint == before.fingerprint
    assert again == known != now.content_identity
