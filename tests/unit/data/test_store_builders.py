"""Row 58: one process builds a store and the others wait; a finished store is never opened for writing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.stores import features, pixels
from disam_peft.data.stores.features import FeatureKey, FeatureStore, open_or_build
from disam_peft.errors import UserError
from tests.helpers.interrupted import end_the_rest, ended, forked

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="processes are forked"),
    pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice"),
]
KEY = FeatureKey("backbone", None, "float32/no", "transform", "data", views=1)
IMAGES = 2 * 2 * 6


@pytest.fixture(autouse=True)
def no_child_outlives_its_test():
    yield
    end_the_rest()


@pytest.fixture
def dataset(tree, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    monkeypatch.setattr(pixels, "CHUNK", 4)
    return load(DataConfig(root=tree(["a", "b"], ["x", "y"], 6)))


def view(image, index, epoch):
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1)


def built(dataset, folder: Path, on_chunk=lambda number: None) -> FeatureStore:
    """``on_chunk`` is called before each chunk is encoded, with how many this process has encoded before."""
    calls = []

    def encode(batch):
        if len(batch) > 1:  # not the blank image
            on_chunk(len(calls))
            calls.append(1)
        return batch.mean((2, 3))

    return open_or_build(KEY, dataset, view, encode, folder=folder, workers=0)


def expected(dataset) -> torch.Tensor:
    return torch.stack([view(dataset.image(i), i, 0).mean((1, 2)) for i in range(len(dataset))])


def until(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


def test_row_58_who_comes_late_finds_the_finished_store(dataset, tmp_path):
    """The race of version 0.1, forced: the second process looks while there is no store, and goes on when the first one
    has finished it. It then began the file anew, and 216 of the first one's 280 rows became zeros."""
    folder, looked, finished = tmp_path / "stores", tmp_path / "looked", tmp_path / "finished"

    def late():
        look = features._is_complete

        def waits(place, key):
            features._is_complete = look
            found = look(place, key)
            assert not found
            looked.touch()
            until(finished)
            return found

        features._is_complete = waits
        store = built(dataset, folder, on_chunk=lambda number: os._exit(7))
        assert torch.allclose(store.rows(range(IMAGES)), expected(dataset))

    second = forked(late)
    until(looked)
    store = built(dataset, folder)
    [file] = folder.glob("*/features.bin")
    before = file.stat()
    finished.touch()
    assert ended(second) == 0, "it encodes nothing"
    assert torch.allclose(store.rows(range(IMAGES)), expected(dataset))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_row_58_who_comes_in_the_middle_waits(dataset, tmp_path):
    folder, begun, go_on = tmp_path / "stores", tmp_path / "begun", tmp_path / "go_on"

    def stops(number):
        if number == 2:
            begun.touch()
            until(go_on)

    def waits():
        store = built(dataset, folder, on_chunk=lambda number: os._exit(7))
        assert torch.allclose(store.rows(range(IMAGES)), expected(dataset))

    first = forked(lambda: built(dataset, folder, stops))
    until(begun)
    second = forked(waits)
    time.sleep(0.3)
    assert os.waitpid(second, os.WNOHANG) == (0, 0) and not list(folder.glob("*/store.json"))
    go_on.touch()
    assert ended(first) == ended(second) == 0


def test_row_58_the_lock_of_a_killed_builder_is_taken_over(dataset, tmp_path):
    folder, begun = tmp_path / "stores", tmp_path / "begun"

    def stops(number):
        if number == 3:
            begun.touch()
            time.sleep(60)

    def takes_over():
        store = built(dataset, folder, on_chunk=lambda number: os._exit(7) if number == 3 else None)
        assert torch.allclose(store.rows(range(IMAGES)), expected(dataset))

    first = forked(lambda: built(dataset, folder, stops))
    until(begun)
    second = forked(takes_over)
    time.sleep(0.2)
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert ended(second) == 0, "it encodes the three chunks that were missing, and no fourth"


def test_row_58_a_pixel_store_is_built_once(dataset, tmp_path):
    finished, looked = tmp_path / "finished", tmp_path / "looked"

    def late():
        look = pixels._is_complete

        def waits(place, key):
            pixels._is_complete = look
            looked.touch()
            until(finished)
            return False

        pixels._is_complete = waits
        pixels._build = lambda *_: os._exit(7)
        pixels.open_or_build(dataset, 8, "bicubic").read(range(IMAGES))

    second = forked(late)
    until(looked)
    store = pixels.open_or_build(dataset, 8, "bicubic")
    before, _ = store.read(range(IMAGES))
    finished.touch()
    assert ended(second) == 0
    assert torch.equal(pixels.open_or_build(dataset, 8, "bicubic").read(range(IMAGES))[0], before)


@pytest.mark.parametrize("kind", ["feature store", "pixel store"])
def test_a_cache_that_cannot_be_written_is_named(dataset, tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISAM_PEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=rf"^the {kind} .* cannot be written \(Not a directory\); .*DISAM_PEFT_CACHE"
    ) as error:
        if kind == "feature store":
            open_or_build(KEY, dataset, view, lambda batch: batch.mean((2, 3)), workers=0)
        else:
            pixels.open_or_build(dataset, 8, "bicubic")
    assert ("features.folder" in str(error.value)) == (kind == "feature store")
