"""Loaders: the same tensors for any number of workers and any way to start them; every sample exactly once."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import get_worker_info

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.data.load import load
from disam_peft.data.loading import loader as loader_module
from disam_peft.data.loading.loader import make_eval_loader, make_train_loader, resolve_workers
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.decode import BadImage
from disam_peft.errors import UserError

TRANSFORM = TrainTransform(Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic"), AugmentConfig(), seed=1)


def plain(image) -> torch.Tensor:
    return torch.tensor([image.width, image.height, 3.0]).reshape(3, 1, 1)


class ReportThreads:
    """A transform that answers with torch's number of threads and whether it runs in a worker."""

    def __call__(self, image) -> torch.Tensor:
        return torch.tensor([torch.get_num_threads(), get_worker_info() is not None, 0.0]).reshape(3, 1, 1)


@pytest.fixture
def dataset(tree):
    return load(DataConfig(root=tree(["a", "b"], ["x", "y"], 3), verify=False))


def test_train_batches_hold_what_the_sampler_said(dataset):
    batches = DomainBatches(dataset.domain_ids, 4, seed=0, steps=5)
    loaded = list(make_train_loader(dataset, batches, TRANSFORM, workers=0))
    assert len(loaded) == 5
    for pairs, batch in zip(batches, loaded, strict=True):
        indices = [index for index, _ in pairs]
        assert batch["indices"].tolist() == indices
        assert batch["labels"].tolist() == dataset.labels[indices].tolist()
        assert batch["domains"].tolist() == dataset.domain_ids[indices].tolist()
        assert {batch[name].dtype for name in ("indices", "labels", "domains")} == {torch.int64}
        expected = torch.stack([TRANSFORM(dataset.image(i), i, epoch) for i, epoch in pairs])
        assert batch["pixels"].dtype == torch.float32 and torch.equal(batch["pixels"], expected)


def train_pixels(dataset, workers: int, start_method=None) -> torch.Tensor:
    batches = DomainBatches(dataset.domain_ids, 4, seed=0, steps=5)
    loader = make_train_loader(dataset, batches, TRANSFORM, workers=workers, start_method=start_method)
    return torch.stack([batch["pixels"] for batch in loader])


def test_workers_change_nothing(dataset):
    alone = train_pixels(dataset, 0)
    assert torch.equal(alone, train_pixels(dataset, 2, "fork"))


@pytest.mark.slow
def test_spawned_workers_change_nothing(dataset):
    assert torch.equal(train_pixels(dataset, 0), train_pixels(dataset, 1, "spawn"))


def test_a_resumed_loader_gives_the_remaining_batches(dataset):
    whole = train_pixels(dataset, 0)
    batches = DomainBatches(dataset.domain_ids, 4, seed=0, steps=5, first_step=3)
    rest = [batch["pixels"] for batch in make_train_loader(dataset, batches, TRANSFORM, workers=0)]
    assert torch.equal(whole[3:], torch.stack(rest))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 13])
def test_eval_counts_each_sample_once(dataset, world_size):
    seen = []
    for rank in range(world_size):
        loader = make_eval_loader(dataset, plain, 2, workers=0, rank=rank, world_size=world_size)
        own = [i for batch in loader for i in batch["indices"].tolist()]
        assert own == list(range(rank, 12, world_size))
        seen += own
    assert sorted(seen) == list(range(12))


def test_eval_can_be_repeated_with_kept_workers(dataset):
    loader = make_eval_loader(dataset, plain, 5, workers=1)
    first, second = ([batch["indices"].tolist() for batch in loader] for _ in range(2))
    assert first == second == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert loader.persistent_workers


def test_workers_compute_on_one_thread(dataset):
    (batch,) = make_eval_loader(dataset, ReportThreads(), 12, workers=1)
    assert batch["pixels"][:, 0].tolist() == [[[1.0]]] * 12
    assert batch["pixels"][:, 1].tolist() == [[[1.0]]] * 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_the_run_is_named(dataset, monkeypatch, workers):
    monkeypatch.setattr(loader_module, "RETRY_SECONDS", 0.0)
    path = dataset.source(7)
    os.remove(path)
    loader = make_eval_loader(dataset, plain, 4, workers=workers)
    with pytest.raises(BadImage) as caught:
        list(loader)
    assert str(caught.value) == f"image {path}: cannot be read (No such file or directory)"


def test_one_failure_is_retried(dataset, monkeypatch):
    monkeypatch.setattr(loader_module, "RETRY_SECONDS", 0.0)
    asked = []
    image = type(dataset).image

    def flaky(self, index):
        asked.append(index)
        if asked.count(index) == 1 and index == 2:
            raise BadImage.of("x", "not now")
        return image(self, index)

    monkeypatch.setattr(type(dataset), "image", flaky)
    (batch,) = make_eval_loader(dataset, plain, 12, workers=0)
    assert len(batch["labels"]) == 12 and asked == [0, 1, 2, 2, *range(3, 12)]


def test_auto_workers(monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no CPU affinity here")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    counts = []
    for cpus in (1, 2, 6, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        counts.append(resolve_workers("auto"))
    assert counts == [0, 1, 5, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert resolve_workers("auto") == 3
    assert resolve_workers(5) == 5
    with pytest.raises(UserError, match="workers=-1"):
        resolve_workers(-1)


def test_batch_size_of_nothing(dataset):
    with pytest.raises(UserError, match="batch_size=0"):
        make_eval_loader(dataset, plain, 0)
