"""Batches made and sent ahead: the same ones in the same order, and nothing left behind."""

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch

from disam_peft.common.device import constant, prefetch_to_device, to_device
from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.loading.feature_batches import feature_batches, read_ahead
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureKey, open_or_build

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def numbers(until, seen, fails_at=None):
    for number in range(until):
        if number == fails_at:
            raise ValueError("number 3 is missing")
        seen.append((number, threading.current_thread().name))
        yield number


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_same_items_in_order_from_one_thread(depth, count):
    seen = []
    assert list(read_ahead(numbers(count, seen), depth=depth)) == list(range(count))
    assert [number for number, _ in seen] == list(range(count))
    assert len({name for _, name in seen}) == min(1, count) and threading.main_thread().name not in dict(seen).values()
    assert not threads()


def test_it_is_ahead_by_its_depth_and_no_more():
    seen = []
    items = read_ahead(numbers(9, seen), depth=2)
    assert seen == [], "nothing is made before anybody asks"
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert [number for number, _ in seen] == [0, 1, 2]
    items.close()  # type: ignore[attr-defined]  # it is a generator


def test_an_error_comes_as_itself_when_its_turn_has_come():
    taken = []
    with pytest.raises(ValueError, match="number 3 is missing"):
        taken.extend(read_ahead(numbers(9, [], fails_at=3)))
    assert taken == [0, 1, 2]
    assert not threads()


@pytest.mark.parametrize("how", ["break", "error", "forgotten"])
def test_the_thread_ends_with_a_consumer_that_stops_early(how):
    items = read_ahead(numbers(10**9, []))
    if how == "error":
        with pytest.raises(KeyboardInterrupt):
            for number in items:
                if number == 4:
                    raise KeyboardInterrupt
    else:
        for number in items:
            if number == 4:
                break
    if how == "forgotten":
        del items
        gc.collect()
    else:
        items.close()  # type: ignore[attr-defined]  # it is a generator
    assert not threads()


@pytest.mark.slow
def test_an_interpreter_that_exits_in_the_middle_does_not_hang():
    code = (
        "from disam_peft.data.loading.feature_batches import read_ahead\n"
        "import itertools\n"
        "items = read_ahead(itertools.count())\n"
        "print(next(items), next(items))\n"
        "keep = [items]; keep.append(keep)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


def test_what_the_thread_begins_with():
    names = []
    assert list(read_ahead(range(3), in_thread=lambda: names.append(threading.current_thread().name))) == [0, 1, 2]
    assert len(names) == 1 and names[0].startswith("ahead")


def test_no_random_number_is_drawn():
    before = torch.get_rng_state()
    list(read_ahead(range(20)))
    assert torch.equal(torch.get_rng_state(), before)


def test_on_a_cpu_nothing_is_copied():
    batch = {"pixels": torch.ones(2), "indices": torch.zeros(2)}
    (out,) = prefetch_to_device([batch], torch.device("cpu"), ["pixels"])
    assert all(out[name] is batch[name] for name in batch)
    assert to_device(batch["pixels"], torch.device("cpu")) is batch["pixels"]
    assert constant((1.0, 2.0), torch.float64, torch.device("cpu")).tolist() == [1.0, 2.0]


# -- a feature store -----------------------------------------------------------------------------------------


@pytest.fixture
def stored(domains_folder, tmp_path):
    """(dataset, a store of 2 views of 96 images, a maker of batches)"""
    dataset = load(DataConfig(root=domains_folder))
    key = FeatureKey("weights", None, "float32", "transform", "data", views=2)

    def transform(image, index, view):
        return torch.full((1, 2, 2), 100.0 * view + index)

    def encode(pixels_BCHW):
        return torch.cat([pixels_BCHW.flatten(1), -pixels_BCHW.flatten(1)], dim=1).unflatten(1, (4, 2))

    store = open_or_build(key, dataset, transform, encode, folder=tmp_path, workers=0)
    return dataset, store, lambda steps=60: DomainBatches(dataset.domain_ids, 7, seed=3, steps=steps, first_step=2)


def test_a_batch_holds_what_the_store_has_of_its_samples(stored):
    dataset, store, batches = stored
    seen = set()
    found = list(feature_batches(store, dataset, batches(), torch.device("cpu")))
    for places, batch in zip(batches(), found, strict=True):
        indices, epochs = zip(*places, strict=True)
        assert batch["indices"].tolist() == list(indices)
        assert batch["labels"].tolist() == dataset.labels[list(indices)].tolist()
        assert batch["domains"].tolist() == dataset.domain_ids[list(indices)].tolist()
        assert batch["frozen"].shape == (7, 4, 2)
        assert batch["frozen"][:, 0, 0].tolist() == [100 * (e % 2) + i for i, e in places]
        seen |= set(epochs)
    assert max(seen) > 3, "views wrapped round"


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("share", [0.0, 0.05], ids=["read ahead", "resident"])
    def test_the_same_batches_of_features(self, stored, monkeypatch, share):
        from disam_peft.data.loading import feature_batches as module

        monkeypatch.setattr(module, "RESIDENT_SHARE", share)
        monkeypatch.setattr(module, "LOADED_AT_ONCE", 10)
        dataset, store, batches = stored
        calls, real = [], module._resident
        monkeypatch.setattr(module, "_resident", lambda *of: calls.append(1) or real(*of))
        expected = feature_batches(store, dataset, batches(), torch.device("cpu"))
        ours = feature_batches(store, dataset, batches(), torch.device("cuda"))
        for batch, wanted in zip(ours, expected, strict=True):
            assert batch["frozen"].is_cuda and batch["labels"].is_cuda
            assert not batch["indices"].is_cuda and not batch["domains"].is_cuda
            assert {name: tensor.tolist() for name, tensor in batch.items()} == {
                name: tensor.tolist() for name, tensor in wanted.items()
            }
        assert len(calls) == (share > 0)
        assert not threads()

    def test_a_store_of_which_little_is_read_stays_on_the_disk(self, stored):
        from disam_peft.data.loading import feature_batches as module

        _, store, batches = stored
        assert module._fits(store, batches(steps=60), torch.device("cuda"))
        assert not module._fits(store, batches(steps=20), torch.device("cuda"))

    def test_a_batch_that_is_still_in_use_is_not_overwritten_by_the_next(self):
        """Each is summed behind a long queue of work, while those after it are already sent."""
        device, size = torch.device("cuda"), 2**20
        source = ({"pixels": torch.full((size,), float(k)).pin_memory()} for k in range(20))
        busy = torch.randn(4096, 4096, device=device)
        sums = []
        for batch in prefetch_to_device(source, device, ["pixels"]):
            for _ in range(5):
                busy = (busy @ busy).clamp_(-1, 1)
            sums.append(batch["pixels"].sum())
        assert torch.stack(sums).tolist() == [float(k * size) for k in range(20)]

    def test_the_thread_works_on_the_device_of_its_process(self, stored, monkeypatch):
        from disam_peft.data.loading import feature_batches as module

        monkeypatch.setattr(module, "RESIDENT_SHARE", 0.0)
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        dataset, store, batches = stored
        for name in ("cuda", "cuda:0"):
            assert len(list(feature_batches(store, dataset, batches(), torch.device(name)))) == 58
        assert chosen == [0, 0]
