"""The pixel store: right pixels for every view, complete or not there, and never a stale one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.loading.loader import make_stored_loader, make_train_loader
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.splits import leave_out
from disam_peft.data.stores import pixels
from disam_peft.data.stores.pixels import PixelStore, auto_side, open_or_build, squeezed
from disam_peft.data.stores.store import write_record
from disam_peft.data.stores.stored_rows import DraftRows
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.batch_augment import BatchAugment
from disam_peft.data.transforms.decode import BadImage
from disam_peft.errors import UserError
from tests.helpers.tiny_images import write_image

SEEN = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic")
ARGUMENTS = (SEEN, AugmentConfig(), 1)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def dataset(tree) -> DomainDataset:
    return load(DataConfig(root=tree(["a", "b", "c"], ["x", "y"], 2), pixel_store=16))


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The samples that were decoded, in order of request."""
    asked, image = [], DomainDataset.image

    def watched(self, index):
        asked.append(index)
        return image(self, index)

    monkeypatch.setattr(DomainDataset, "image", watched)
    return asked


def store_of(dataset: DomainDataset, side: int = 16) -> PixelStore:
    return open_or_build(dataset.pixel_plan.whole, side, "bicubic")


def partial_folder(own_cache: Path) -> Path:
    (folder,) = (own_cache / "pixels").glob("*.partial")
    return folder


# -- what is stored ------------------------------------------------------------------------------------------


def test_pixels_are_pillows(dataset):
    images, sizes = store_of(dataset).read([7, 2, 7])
    expected = np.asarray(dataset.image(7).resize((16, 16), Image.Resampling.BICUBIC))
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert sizes.tolist() == [[10, 12]] * 3


@pytest.mark.parametrize(("size", "kept"), [((40, 20), (20, 40)), ((100, 20), (20, 40)), ((21, 65), (42, 21))])
def test_beyond_two_to_one_the_ends_are_cut(size, kept):
    ramp = np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[1], size[0]) % 251
    image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    array, original = squeezed(image, 16, "bilinear")
    assert original == kept and array.shape == (16, 16, 3)
    left, top = (size[0] - kept[1]) // 2, (size[1] - kept[0]) // 2
    middle = image.crop((left, top, left + kept[1], top + kept[0]))
    assert np.array_equal(array, np.asarray(middle.resize((16, 16), Image.Resampling.BILINEAR)))


def test_one_store_for_all_views(dataset, decoded, own_cache):
    for held_out in ("a", "b"):
        sources, target = leave_out(dataset, held_out)
        for view in (sources, target.select([3, 1])):
            batches = DomainBatches(view.domain_ids, 2, seed=0, steps=4)
            augment = BatchAugment(replace(SEEN, size=(16, 16)), AugmentConfig(kind="none"), 0)
            for batch in make_stored_loader(view, batches, augment, workers=0):
                for index, got in zip(batch["indices"].tolist(), batch["pixels"], strict=True):
                    stored, _ = store_of(dataset).read([dataset.keys.index(view.keys[index])])
                    assert torch.equal(got, augment(stored, [0], [0], np.array([[10, 12]]))[0])
    assert sorted(decoded[:12]) == list(range(12))
    assert len(list((own_cache / "pixels").glob("*/header.json"))) == 1


def test_what_the_key_depends_on(tree, decoded):
    root = tree(["a", "b"], ["x", "y"], 1)
    first = load(DataConfig(root=root, pixel_store=16))
    folders = {store_of(first).folder}
    assert store_of(load(DataConfig(root=root, pixel_store="auto"))).folder in folders
    folders |= {store_of(first, 17).folder, open_or_build(first.pixel_plan.whole, 16, "bilinear").folder}
    folders.add(store_of(load(DataConfig(root=root, domains=["a"], pixel_store=16))).folder)
    path = root / "a" / "x" / "0.png"
    unchecked = load(DataConfig(root=root, pixel_store=16, verify=False))
    folders.add(store_of(unchecked).folder)
    Image.new("RGB", (12, 10), "red").save(path)
    for verify in (True, False):
        changed = load(DataConfig(root=root, pixel_store=16, verify=verify))
        folders.add(store_of(changed).folder)
        images, _ = store_of(changed).read([0])
        assert np.array_equal(images[0].permute(1, 2, 0), squeezed(changed.image(0), 16, "bicubic")[0])
    assert len(folders) == 7


# -- building ------------------------------------------------------------------------------------------------


def test_a_killed_build_goes_on(dataset, decoded, monkeypatch, own_cache):
    expected = (store_of(dataset).folder / "records.bin").read_bytes()
    shutil.rmtree(own_cache / "pixels")
    monkeypatch.setattr(pixels, "CHUNK", 4)
    watched = DomainDataset.image

    def dies(self, index):
        if index == 9:
            raise KeyboardInterrupt
        return watched(self, index)

    monkeypatch.setattr(DomainDataset, "image", dies)
    with pytest.raises(KeyboardInterrupt):
        store_of(dataset)
    draft = partial_folder(own_cache)
    assert DraftRows(draft / "records.bin", 12, 16 * 16 * 3 + 8, 4).todo() == [2]
    with open(draft / "records.bin", "ab") as file:
        file.write(b"half a record")
    monkeypatch.setattr(DomainDataset, "image", watched)
    decoded.clear()
    store = store_of(dataset)
    assert sorted(decoded) == [8, 9, 10, 11]
    assert (store.folder / "records.bin").read_bytes() == expected
    assert not list((own_cache / "pixels").glob("*.partial"))


@pytest.mark.parametrize("lost", ["checksums", "records"])
def test_checksums_that_do_not_fit_the_records_are_no_progress(dataset, decoded, monkeypatch, own_cache, lost):
    monkeypatch.setattr(pixels, "CHUNK", 4)
    path = dataset.source(9)
    content = Path(path).read_bytes()
    os.remove(path)
    with pytest.raises(BadImage, match=r"c/x/1\.png"):
        store_of(dataset)
    draft = partial_folder(own_cache)
    if lost == "checksums":
        (draft / "checksums.bin").write_text("3" * 40)
    else:
        os.truncate(draft / "records.bin", 5)
    Path(path).write_bytes(content)
    decoded.clear()
    images, _ = store_of(dataset).read(range(12))
    assert sorted(decoded) == list(range(12))
    assert np.array_equal(images[9].permute(1, 2, 0), squeezed(dataset.image(9), 16, "bicubic")[0])


def test_processes_wait_for_the_one_that_builds(dataset, decoded):
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: store_of(dataset), range(3)))
    assert sorted(decoded) == list(range(12)) and len({store.folder for store in stores}) == 1


def test_row_34_too_little_room(dataset, decoded, monkeypatch, own_cache):
    record = 16 * 16 * 3 + 8
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 12 * record - 1))
    with pytest.raises(UserError, match=r"storing 12 images of 16 x 16 pixels needs 9\.3 kB.*DISAM_PEFT_CACHE"):
        store_of(dataset)
    assert decoded == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 12 * record))
    assert len(store_of(dataset)) == 12


def test_row_34_disk_full_while_building(dataset, monkeypatch, own_cache):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        store_of(dataset)
    assert not list((own_cache / "pixels").glob("*.partial"))


def test_a_cache_that_cannot_be_written(dataset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISAM_PEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set DISAM_PEFT_CACHE"):
        store_of(dataset)


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "longer", "no header", "half a header", "other header", "no records"])
def test_a_damaged_store_is_built_again(dataset, decoded, damage):
    store = store_of(dataset)
    records, header = store.folder / "records.bin", store.folder / "header.json"
    before = records.read_bytes()
    match damage:
        case "truncated":
            os.truncate(records, len(before) - 1)
        case "longer":
            records.write_bytes(before + b"x")
        case "no header":
            header.unlink()
        case "half a header":
            header.write_text(header.read_text()[:-9])
        case "other header":
            header.write_text(header.read_text().replace('"side": 16', '"side": 61'))
        case "no records":
            records.unlink()
    with pytest.raises(UserError, match="no complete pixel store"):
        PixelStore(store.folder, store.key)
    decoded.clear()
    with pytest.warns(UserWarning, match="damaged or incomplete and is built again"):
        again = store_of(dataset)
    assert sorted(decoded) == list(range(12)) and (again.folder / "records.bin").read_bytes() == before


def test_an_empty_record_is_not_an_image(dataset, monkeypatch):
    """In a store of version 0.1, which has no checksums, and without the images to decode it again."""
    monkeypatch.setattr(pixels, "CHUNK", 5)
    store = store_of(dataset)
    (store.folder / "checksums.bin").unlink()
    header = json.loads((store.folder / "header.json").read_text())
    write_record(store.folder / "header.json", {name: header[name] for name in ("key", "digest")})
    with open(store.folder / "records.bin", "r+b") as file:
        file.seek(5 * store.key.record.itemsize)
        file.write(bytes(store.key.record.itemsize))
    store = PixelStore(store.folder, store.key)
    assert store.read([3, 4])[0].shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="damaged; delete it"):
        store.read([4, 5])
    assert torch.equal(
        store.read([5], dataset)[0],
        torch.from_numpy(squeezed(dataset.image(5), 16, "bicubic")[0])[None].permute(0, 3, 1, 2),
    )


def test_a_store_can_be_sent(dataset):
    store = store_of(dataset)
    images, _ = store.read([1, 2])
    assert len(sent := pickle.dumps(store)) < 2000
    assert torch.equal(pickle.loads(sent).read([1, 2])[0], images)


# -- the loader ----------------------------------------------------------------------------------------------


def stored_batches(dataset, workers=0, start_method=None, first_step=0) -> list[dict]:
    batches = DomainBatches(dataset.domain_ids, 5, seed=0, steps=6, first_step=first_step)
    augment = BatchAugment(*ARGUMENTS)
    return list(make_stored_loader(dataset, batches, augment, workers=workers, start_method=start_method))


def test_the_same_batches_as_from_files(dataset):
    batches = DomainBatches(dataset.domain_ids, 5, seed=0, steps=6)
    from_files = list(make_train_loader(dataset, batches, TrainTransform(*ARGUMENTS), workers=0))
    stored = stored_batches(dataset)
    assert len(stored) == len(from_files) == 6
    for ours, theirs in zip(stored, from_files, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
            if name != "pixels":
                assert torch.equal(ours[name], theirs[name])


class _OneByOne:
    """BatchAugment for one image from its file."""

    def __init__(self, *arguments):
        self._augment = BatchAugment(*arguments)

    def __call__(self, image, index, epoch):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return self._augment(pixels[None], [index], [epoch])[0]


def test_nearly_the_same_pictures_as_from_files(tmp_path):
    """Smooth pictures, not square: what differs is half a pixel of the box. A wrong box or colour would show."""
    y, x = np.mgrid[0:60, 0:90] / 90
    for i in range(4):
        waves = [np.sin(5 * x + i), np.cos(4 * y * x + i), np.sin(3 * (x + y) - i)]
        picture = Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8))
        (tmp_path / "d" / "c").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "d" / "c" / f"{i}.png")
    dataset = load(DataConfig(root=tmp_path, pixel_store=72))
    arguments = (replace(SEEN, size=(32, 32)), *ARGUMENTS[1:])
    batches = DomainBatches(dataset.domain_ids, 4, seed=0, steps=3)
    (ours, theirs) = (
        torch.cat([batch["pixels"] for batch in loader])
        for loader in (
            make_stored_loader(dataset, batches, BatchAugment(*arguments), workers=0),
            make_train_loader(dataset, batches, _OneByOne(*arguments), workers=0),
        )
    )
    difference = (ours - theirs).abs().mean((1, 2, 3))
    assert difference.max() < 0.05 < 0.2 < (ours[:-1] - ours[1:]).abs().mean((1, 2, 3)).min()


@pytest.mark.slow
def test_workers_change_nothing(dataset):
    alone = stored_batches(dataset)
    for workers, start_method in ((2, "fork"), (1, "spawn")):
        others = stored_batches(dataset, workers, start_method)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, others, strict=True) for name in a)
    resumed = stored_batches(dataset, first_step=4)
    assert len(resumed) == 2 and torch.equal(resumed[0]["pixels"], alone[4]["pixels"])


def test_no_file_is_opened_in_training(dataset, decoded):
    store_of(dataset)
    decoded.clear()
    shutil.rmtree(dataset.base)
    assert len(stored_batches(dataset)) == 6 and decoded == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pixels_come_on_the_device(dataset):
    batches = DomainBatches(dataset.domain_ids, 5, seed=0, steps=6)
    loader = make_stored_loader(dataset, batches, BatchAugment(*ARGUMENTS), device="cuda", workers=1, pin_memory=True)
    for ours, expected in zip(loader, stored_batches(dataset), strict=True):
        assert ours.keys() == expected.keys() and ours["pixels"].device.type == "cuda"
        assert (ours["pixels"].cpu() - expected["pixels"]).abs().mean() < 0.01


# -- the setting ---------------------------------------------------------------------------------------------


def test_pixel_store_is_the_recipes_choice(tree):
    root = tree(["a", "b"], ["x"], 2)
    plain = load(DataConfig(root=root))
    assert plain.pixel_plan is None
    batches = DomainBatches(plain.domain_ids, 2, seed=0, steps=1)
    with pytest.raises(UserError, match=r"without data\.pixel_store"):
        make_stored_loader(plain, batches, BatchAugment(*ARGUMENTS))
    for choice, side in (("auto", 9), (12, 12)):
        dataset = load(DataConfig(root=root, pixel_store=choice)).select([3, 1])
        assert dataset.pixel_plan.side == choice and len(dataset.pixel_plan.whole) == 4
        loader = make_stored_loader(dataset, batches, BatchAugment(*ARGUMENTS), workers=0)
        store = loader.dataset._store  # type: ignore[attr-defined]
        assert store.key.side == side and len(store) == 4


def test_a_side_below_the_models_input(tree):
    dataset = load(DataConfig(root=tree(["a"], ["x"], 2), pixel_store=31))
    batches = DomainBatches(dataset.domain_ids, 2, seed=0, steps=1)
    with pytest.raises(UserError, match=r"data\.pixel_store=31 is smaller than .* 32 pixels; use 'auto' \(37\)"):
        make_stored_loader(dataset, batches, BatchAugment(replace(SEEN, size=(24, 32)), *ARGUMENTS[1:]))
    assert auto_side((224, 224)) == 256


@pytest.mark.parametrize("value", [True, 0, "large", 5000])
def test_config_refuses(value):
    with pytest.raises(ValidationError, match="pixel_store"):
        DataConfig(root="r", pixel_store=value)


def test_a_table_may_name_its_rows_in_any_order(tmp_path):
    """Samples are sorted, rows of the table are not: the store follows the samples."""
    lines = ["image,label,domain"]
    for i, domain in enumerate("bacab"):
        write_image(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,x,{domain}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    dataset = load(DataConfig(table=tmp_path / "table.csv", pixel_store=8)).select([4, 0, 2])
    assert dataset.rows.tolist() != sorted(dataset.rows.tolist())
    augment = BatchAugment(SEEN, AugmentConfig(kind="none"), 0)
    batches = DomainBatches(dataset.domain_ids, 3, seed=0, steps=1)
    (batch,) = make_stored_loader(dataset, batches, augment, workers=0)
    for index, got in zip(batch["indices"].tolist(), batch["pixels"], strict=True):
        array, size = squeezed(dataset.image(index), 8, "bicubic")
        stored = torch.from_numpy(array.copy()).permute(2, 0, 1)[None]
        assert torch.equal(got, augment(stored, [0], [0], np.array([size]))[0])
