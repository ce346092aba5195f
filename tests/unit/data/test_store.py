"""Stores that version 0.1 wrote are found and read: their keys and files are the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from disam_peft.data.stores import store
from disam_peft.data.stores.features import FeatureKey, FeatureStore
from disam_peft.data.stores.pixels import PixelKey, PixelStore
from disam_peft.errors import UserError

PIXELS = PixelKey("d" * 64, 3, 16, "bicubic", pillow="11.0.0")
FEATURES = FeatureKey("b" * 64, 2, "torch.float32/no", "{}", "d" * 64, 2)


def test_the_names_of_stores_are_those_of_version_0_1():
    """Both digests were computed by version 0.1."""
    assert PIXELS.digest == "53e38c7aa71fd90e78e9b814ef98997d9b8f645b1b4a677e5c6967a485fa8cf4"
    assert FEATURES.digest == "1ad26b95369c0300b98d574c13d97ab62544b23d1c436384b7fea0eff0a868a1"
    assert store.store_folder(PIXELS, "pixels", Path("x")) == Path("x") / PIXELS.digest


def test_stores_lie_in_the_cache_by_their_kind(own_cache):
    assert store.store_folder(FEATURES, "features", None) == own_cache / "features" / FEATURES.digest


def test_a_pixel_store_of_version_0_1_is_read(tmp_path):
    values = {"count": 3, "data": "d" * 64, "format": 1, "interpolation": "bicubic", "pillow": "11.0.0", "side": 16}
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    record = np.dtype([("pixels", "u1", (16, 16, 3)), ("size", "<i4", (2,))])
    content = np.zeros(3, record)
    content["pixels"] = np.arange(3 * 16 * 16 * 3).reshape(3, 16, 16, 3) % 251
    content["size"] = [[10, 20], [30, 40], [50, 60]]
    (tmp_path / "records.bin").write_bytes(content.tobytes())
    (tmp_path / "header.json").write_text(json.dumps({"key": values, "digest": digest}))
    images, sizes_B2 = PixelStore(tmp_path, PIXELS).read([2, 0])
    assert torch.equal(images, torch.from_numpy(content["pixels"][[2, 0]]).permute(0, 3, 1, 2))
    assert sizes_B2.tolist() == [[50, 60], [10, 20]]


def test_a_feature_store_of_version_0_1_is_read(tmp_path):
    key = {
        "backbone": "b" * 64,
        "split": 2,
        "precision": "torch.float32/no",
        "transform": "{}",
        "data": "d" * 64,
        "views": 2,
        "format": 2,
    }
    values = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(6, 4)
    (tmp_path / "features.bin").write_bytes(values.numpy().tobytes())
    header = {"key": key, "count": 3, "shape": [4], "dtype": "float32", "row": 16}
    (tmp_path / "store.json").write_text(json.dumps(header))
    found = FeatureStore(tmp_path, FEATURES)
    assert len(found) == 3
    assert torch.equal(found.rows([1, 2], [0, 1]), values[[1, 5]])
    assert torch.equal(found.rows([1], [3]), values[[4]])


@pytest.mark.parametrize("content", [None, b"", b'{"key": ', b"\xff\xfe"])
def test_a_record_that_is_missing_or_damaged_is_none(tmp_path, content):
    path = tmp_path / "header.json"
    if content is not None:
        path.write_bytes(content)
    assert store.read_record(path) is None
    store.write_record(path, {"done": 3})
    assert store.read_record(path) == {"done": 3}


def test_room_is_required_to_the_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2_600_000_000))
    store.require_room(tmp_path / "draft", 2_600_000_000, "a store", "make room")
    with pytest.raises(UserError, match=r"^a store needs 2\.6 GB, but .* has 2\.6 GB left; make room$"):
        store.require_room(tmp_path / "draft", 2_600_000_001, "a store", "make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1_500_000))
    with pytest.raises(UserError, match=r"^a store needs 40\.0 MB, but .* has 1\.5 MB left; make room$"):
        store.require_room(tmp_path / "draft", 40_000_000, "a store", "make room")
