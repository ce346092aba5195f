"""Row 59: damage in a finished store is found when it is opened or when a chunk is first read, and mended."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.data.load import load
from disam_peft.data.loading.loader import make_stored_loader
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores import features, pixels
from disam_peft.data.stores.features import FeatureKey, FeatureStore
from disam_peft.data.stores.stored_rows import Damaged, DraftRows, StoredRows
from disam_peft.data.transforms.batch_augment import BatchAugment
from disam_peft.errors import Notice, UserError
from tests.unit.data.test_pixels import SEEN

KEY = FeatureKey("backbone", None, "float32/no", "transform", "data", views=2)
ROWS, BYTES, CHUNK = 11, 24, 4
NUMBERS = np.random.default_rng(0).integers(1, 256, (ROWS, BYTES), dtype=np.uint8)


def flip_a_bit(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def zeros(path: Path, at: int, count: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes(count))


@pytest.fixture
def file(tmp_path):
    """A finished file of rows, and the checksum of its checksums."""
    draft = DraftRows(tmp_path / "rows.bin", ROWS, BYTES, CHUNK)
    draft.prepare()
    assert draft.todo() == [0, 1, 2]
    for chunk in (2, 0, 1):
        draft.write(chunk, NUMBERS[chunk * CHUNK : (chunk + 1) * CHUNK])
    return draft.file, draft.finished()


def opened(file) -> StoredRows:
    return StoredRows(file[0], ROWS, BYTES, CHUNK, file[1])


class Remake:
    """Makes rows again, and counts which."""

    def __init__(self) -> None:
        self.asked: list[range] = []

    def __call__(self, rows: range) -> np.ndarray:
        self.asked.append(rows)
        return NUMBERS[rows.start : rows.stop]


PLACES = np.array([10, 0, 5, 5, 3])


def test_rows_are_read_as_they_were_written(file):
    assert np.array_equal(opened(file).read(PLACES), NUMBERS[PLACES])
    sent = pickle.loads(pickle.dumps(opened(file)))
    assert np.array_equal(sent.read(PLACES), NUMBERS[PLACES])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(path, 5 * BYTES + 7),
        lambda path: zeros(path, 4 * BYTES, 3 * BYTES),
        lambda path: zeros(path, 7 * BYTES - 1, 1),
    ],
    ids=["bit", "zeros", "one zero"],
)
def test_row_59_a_damaged_chunk_is_made_again_and_the_file_is_left_alone(file, damage):
    path, remake = file[0], Remake()
    damage(path)
    damaged = path.read_bytes()
    rows = opened(file)
    assert np.array_equal(rows.read(np.array([0, 9]), remake), NUMBERS[[0, 9]]) and remake.asked == []
    with pytest.warns(Notice, match=r"rows 4 to 7 of the store .* are damaged and are built again"):
        assert np.array_equal(rows.read(PLACES, remake), NUMBERS[PLACES])
    assert np.array_equal(rows.read(PLACES, remake), NUMBERS[PLACES])
    assert remake.asked == [range(4, 8)], "once"
    assert path.read_bytes() == damaged, "never opened for writing"
    assert np.array_equal(opened(file).read(PLACES), NUMBERS[PLACES]), "the repair is found by whoever comes later"
    [repair] = path.with_name("repairs").iterdir()
    flip_a_bit(repair, 3)
    with pytest.raises(Damaged, match=r"rows 4 to 7 of .*rows\.bin are damaged"):
        opened(file).read(PLACES)
    with pytest.warns(Notice, match="built again"):
        assert np.array_equal(opened(file).read(PLACES, remake), NUMBERS[PLACES])


def test_row_59_a_file_that_is_cut_off_after_it_was_opened(file):
    rows, remake = opened(file), Remake()
    os.truncate(file[0], 9 * BYTES)
    with pytest.warns(Notice, match="rows 8 to 10"):
        assert np.array_equal(rows.read(PLACES, remake), NUMBERS[PLACES])
    assert remake.asked == [range(8, 11)]


@pytest.mark.parametrize("damage", ["short", "long", "checksums", "no checksums", "no file"])
def test_row_59_damage_that_is_seen_at_opening(file, damage):
    path = file[0]
    match damage:
        case "short":
            os.truncate(path, ROWS * BYTES - 1)
        case "long":
            os.truncate(path, ROWS * BYTES + 1)
        case "checksums":
            flip_a_bit(path.with_name("checksums.bin"), 20)
        case "no checksums":
            path.with_name("checksums.bin").unlink()
        case "no file":
            path.unlink()
    with pytest.raises((Damaged, OSError)):
        opened(file)


def test_row_59_a_chunk_is_checked_once_in_a_process_and_again_when_the_file_changed(file, monkeypatch):
    calls = []
    check = StoredRows._is_whole
    monkeypatch.setattr(
        StoredRows, "_is_whole", lambda self, chunk, data: calls.append(chunk) or check(self, chunk, data)
    )
    for _ in range(2):
        rows = opened(file)
        for _ in range(3):
            rows.read(PLACES)
    assert calls == [0, 1, 2]
    os.utime(file[0], ns=(1, 1))
    opened(file).read(PLACES)
    assert calls == [0, 1, 2] * 2


def test_row_59_zeros_in_a_store_without_checksums(file):
    """Version 0.1 wrote none, and two processes that built one of its stores left rows of zeros."""
    remake = Remake()
    zeros(file[0], 9 * BYTES, BYTES)
    rows = StoredRows(file[0], ROWS, BYTES, CHUNK, None)
    with pytest.warns(Notice, match="rows 8 to 10"):
        assert np.array_equal(rows.read(PLACES, remake), NUMBERS[PLACES])
    assert remake.asked == [range(8, 11)]


def test_row_58_a_draft_that_goes_on_trusts_no_row_that_is_not_what_was_written(tmp_path):
    draft = DraftRows(tmp_path / "rows.bin", ROWS, BYTES, CHUNK)
    draft.prepare()
    for chunk in (0, 2):
        draft.write(chunk, NUMBERS[chunk * CHUNK : (chunk + 1) * CHUNK])
    again = DraftRows(tmp_path / "rows.bin", ROWS, BYTES, CHUNK)
    again.prepare()
    assert again.todo() == [1]
    with pytest.raises(Damaged, match="not complete"):
        again.finished()
    flip_a_bit(draft.file, 10 * BYTES)
    assert again.todo() == [1, 2]


def test_checksums_cost_less_than_a_second_per_gigabyte(tmp_path):
    count, row = 4096, 16384
    draft = DraftRows(tmp_path / "rows.bin", count, row, 64)
    draft.prepare()
    data = np.random.default_rng(0).integers(0, 256, (64, row), dtype=np.uint8)
    for chunk in range(count // 64):
        draft.write(chunk, data)
    rows = StoredRows(draft.file, count, row, 64, draft.finished())
    start = time.perf_counter()
    for chunk in range(count // 64):
        rows._check(chunk, None)
    assert time.perf_counter() - start < 1.0 * count * row / 1e9 + 0.2


# -- both stores -----------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tree, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 5)
    monkeypatch.setattr(pixels, "CHUNK", 5)
    return load(DataConfig(root=tree(["a", "b"], ["x", "y"], 4)))


def view(image: Image.Image, index: int, epoch: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1) * (1 + epoch)


def feature_store(dataset, folder: Path, seen: list[int] | None = None) -> FeatureStore:
    def encode(batch):
        if seen is not None:
            seen.append(len(batch))
        return batch.mean((2, 3))

    return features.open_or_build(KEY, dataset, view, encode, folder=folder, workers=0)


@pytest.mark.parametrize("kind", ["bit", "zeros"])
def test_row_59_a_feature_store_encodes_a_damaged_chunk_again(dataset, tmp_path, kind):
    everything = np.arange(len(dataset))
    before = feature_store(dataset, tmp_path / "stores").rows(everything, 1)
    [place] = (tmp_path / "stores").glob("*/")
    file, first = place / "features.bin", (len(dataset) + 4) * 12
    flip_a_bit(file, first) if kind == "bit" else zeros(file, first, 12)
    damaged, seen = file.read_bytes(), []
    store = feature_store(dataset, tmp_path / "stores", seen)
    with pytest.warns(Notice, match="rows 20 to 24"):
        assert torch.equal(store.rows(everything, 1), before)
    assert seen == [5], "the damaged chunk alone"
    assert file.read_bytes() == damaged
    assert torch.equal(FeatureStore(place, KEY).rows(everything, 1), before), "from the repair"
    for repair in (place / "repairs").iterdir():
        repair.unlink()
    with pytest.raises(UserError, match=r"rows 20 to 24 of .* are damaged; delete .*, and it will be built again"):
        FeatureStore(place, KEY).rows(everything, 1)


@pytest.mark.parametrize("kind", ["bit", "zeros"])
def test_row_59_training_goes_on_over_a_damaged_pixel_store(tree, dataset, kind):
    dataset = load(DataConfig(root=dataset.base, pixel_store=16))
    batches = DomainBatches(dataset.domain_ids, 4, seed=0, steps=6)
    augment = BatchAugment(SEEN, AugmentConfig(kind="none"), 0)

    def trained():
        return [batch["pixels"] for batch in make_stored_loader(dataset, batches, augment, workers=0)]

    before = trained()
    store = pixels.open_or_build(dataset.pixel_plan.whole, 16, "bicubic")
    file = store.folder / "records.bin"
    flip_a_bit(file, 7 * 776 + 30) if kind == "bit" else zeros(file, 6 * 776, 2 * 776)
    with pytest.warns(Notice, match="rows 5 to 9"):
        assert all(torch.equal(a, b) for a, b in zip(before, trained(), strict=True))


@pytest.mark.parametrize("kind", ["features", "pixels"])
@pytest.mark.parametrize("damage", ["foreign", "other numbers", "truncated"])
def test_row_59_a_foreign_header_or_a_cut_file_is_built_again(dataset, tmp_path, kind, damage):
    def opened():
        if kind == "features":
            return feature_store(dataset, tmp_path / "stores").rows(range(16), 1)
        return pixels.open_or_build(dataset, 16, "bicubic", folder=tmp_path / "stores").read(range(16))[0]

    before = opened()
    [place] = (tmp_path / "stores").glob("*/")
    header = next(place.glob("*.json"))
    content = json.loads(header.read_text())
    if damage == "foreign":
        content["key"]["data"] = "other"
    elif damage == "other numbers":
        content["chunk"] = 16
    header.write_text(json.dumps(content))
    if damage == "truncated":
        os.truncate(next(file for file in place.glob("*.bin") if file.name != "checksums.bin"), 100)
    with pytest.warns(UserWarning, match="is damaged or incomplete and is built again"):
        assert torch.equal(opened(), before)
    assert torch.equal(opened(), before)
