"""Batches: the share of each domain, ranks, restarts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.errors import UserError

# Domains 2, 5 and 9 with 4, 10 and 30 samples, mixed.
IDS = np.random.default_rng(0).permutation([2] * 4 + [5] * 10 + [9] * 30)
# Classes 0, 3 and 7; domain 2 has no sample of class 7, and rare classes have one sample.
LABELS = np.zeros(44, dtype=np.int64)
for domain, rare, rarest in ((2, [0], []), (5, [0, 1], [2]), (9, [0, 1, 2, 3, 4], [5, 6])):
    LABELS[np.flatnonzero(domain == IDS)[rare]] = 3
    LABELS[np.flatnonzero(domain == IDS)[rarest]] = 7
BALANCED = {"class_sampling": "balanced", "labels": LABELS}
KINDS = [{}, {"sampling": "proportional"}, BALANCED, {**BALANCED, "sampling": "proportional"}]
NAMES = ["balanced", "proportional", "classes of each domain", "classes of all"]


def test_balanced_shares_and_the_rotating_rest():
    batches = list(DomainBatches(IDS, 8, seed=0, steps=6))
    counts = [Counter(int(IDS[index]) for index, _ in batch) for batch in batches]
    assert [[c[2], c[5], c[9]] for c in counts] == [[3, 3, 2], [3, 2, 3], [2, 3, 3]] * 2


@pytest.mark.parametrize("batch_size", [6, 7, 8])
def test_balanced_walks_each_domain_without_repeats_and_past_the_smallest(batch_size):
    pairs = [pair for batch in DomainBatches(IDS, batch_size, seed=0, steps=15) for pair in batch]
    for domain, size in ((2, 4), (5, 10), (9, 30)):
        walk = [(index, epoch) for index, epoch in pairs if IDS[index] == domain]
        assert len(walk) == 5 * batch_size
        assert [epoch for _, epoch in walk] == [n // size for n in range(len(walk))]
        for epoch in range(len(walk) // size):
            assert {i for i, e in walk if e == epoch} == set(np.flatnonzero(domain == IDS).tolist())
    assert len(set(pairs)) == len(pairs)


def test_order_changes_with_epoch_seed_and_domain():
    ids = [0] * 50 + [1] * 50

    def walk(seed: int, domain: int, epoch: int) -> list[int]:
        pairs = [pair for batch in DomainBatches(ids, 10, seed=seed, steps=20) for pair in batch]
        return [i % 50 for i, e in pairs if e == epoch and ids[i] == domain]

    base = walk(0, 0, 0)
    assert sorted(base) == list(range(50))
    for other in (walk(0, 0, 1), walk(1, 0, 0), walk(0, 1, 0)):
        assert sorted(other) == sorted(base) and sum(a == b for a, b in zip(base, other, strict=True)) < 10


def test_a_batch_larger_than_a_domain_crosses_its_epochs():
    (batch,) = DomainBatches([0, 0, 0, 1, 1], 16, seed=0, steps=1)
    assert Counter(epoch for index, epoch in batch if index < 3) == {0: 3, 1: 3, 2: 2}
    assert len(set(batch)) == 16


def test_proportional_is_one_walk():
    batches = list(DomainBatches(IDS, 11, seed=0, steps=8, sampling="proportional"))
    pairs = [pair for batch in batches for pair in batch]
    for epoch in (0, 1):
        assert sorted(i for i, e in pairs if e == epoch) == list(range(44))
    assert [e for _, e in pairs] == [0] * 44 + [1] * 44
    assert [i for i, e in pairs if e == 0] != [i for i, e in pairs if e == 1]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(kind, world_size):
    whole = DomainBatches(IDS, 7, seed=4, steps=9, **kind)
    parts = [
        list(DomainBatches(IDS, 7, seed=4, steps=9, rank=rank, world_size=world_size, **kind))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert all(part[step] for part in parts)
        for rank, part in enumerate(parts):
            assert part[step] == batch[rank::world_size]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_restart_gives_the_remaining_batches(kind):
    whole = list(DomainBatches(IDS, 7, seed=4, steps=25, **kind))
    for first in (0, 1, 8, 13, 24, 25):
        rest = DomainBatches(IDS, 7, seed=4, steps=25, first_step=first, **kind)
        assert len(rest) == 25 - first
        assert list(rest) == whole[first:]


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("batch_size", [3, 7, 12])
def test_balanced_classes_come_equally_often_within_each_domain(steps, batch_size):
    pairs = [pair for batch in DomainBatches(IDS, batch_size, 1, steps, **BALANCED) for pair in batch]
    natural = [pair for batch in DomainBatches(IDS, batch_size, 1, steps) for pair in batch]
    assert [IDS[index] for index, _ in pairs] == [IDS[index] for index, _ in natural], "domains are shared as before"
    assert len(set(pairs)) == len(pairs), "no sample comes twice with the same augmentation"
    for domain, classes in ((2, [0, 3]), (5, [0, 3, 7]), (9, [0, 3, 7])):
        counts = Counter(int(LABELS[index]) for index, _ in pairs if IDS[index] == domain)
        found = [counts[c] for c in classes]
        assert sum(found) == counts.total() and max(found) - min(found) <= 1
        for c in classes:
            members = np.flatnonzero((domain == IDS) & (c == LABELS))
            walk = [(index, epoch) for index, epoch in pairs if index in members]
            assert [epoch for _, epoch in walk] == [n // len(members) for n in range(len(walk))]
            for epoch in range(len(walk) // len(members)):
                assert {i for i, e in walk if e == epoch} == set(members.tolist())


def test_balanced_classes_of_the_whole_data_set_whatever_their_domains():
    kind = {**BALANCED, "sampling": "proportional"}
    pairs = [pair for batch in DomainBatches(IDS, 11, 1, 30, **kind) for pair in batch]
    assert Counter(int(LABELS[index]) for index, _ in pairs) == {0: 110, 3: 110, 7: 110}
    assert len(set(pairs)) == len(pairs)
    rare = Counter(index for index, _ in pairs if LABELS[index] == 7)
    assert set(rare) == set(np.flatnonzero(LABELS == 7).tolist()) and sorted(rare.values()) == [36, 37, 37]


def test_the_order_of_classes_is_drawn_anew_in_every_round():
    labels = np.arange(100) % 50
    pairs = [
        pair for batch in DomainBatches([0] * 100, 50, 0, 4, class_sampling="balanced", labels=labels) for pair in batch
    ]
    rounds = [[int(labels[index]) for index, _ in pairs[start : start + 50]] for start in (0, 50, 100, 150)]
    assert all(sorted(order) == list(range(50)) for order in rounds)
    assert all(sum(a == b for a, b in zip(rounds[0], other, strict=True)) < 10 for other in rounds[1:])
    seconds = [index // 50 for index, epoch in pairs if epoch == 0]
    assert 20 < sum(seconds[:50]) < 30, "which of its samples comes first is drawn for each class"


def test_iterating_twice_is_the_same():
    batches = DomainBatches(IDS, 7, seed=4, steps=25)
    assert list(batches) == list(batches)


def test_row_05_batch_smaller_than_the_number_of_domains():
    with pytest.raises(UserError, match=r"batch_size=2 .* each of the 3 domains; use at least 3"):
        DomainBatches(IDS, 2, seed=0, steps=1)
    assert len(next(iter(DomainBatches(IDS, 3, seed=0, steps=1)))) == 3
    assert len(next(iter(DomainBatches(IDS, 2, seed=0, steps=1, sampling="proportional")))) == 2


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS, {"world_size": 8}, r"batch_size=7 leaves some of the 8 processes"),
        (IDS, {"rank": 1}, r"rank 1 of 1"),
        (IDS, {"first_step": 4}, r"first_step=4 is outside a run of 3"),
        (IDS, {"sampling": "blanced"}, "sampling='blanced' is unknown; use one of balanced, proportional"),
        ([], {}, "no training samples"),
        (IDS, {"class_sampling": "rare"}, "class_sampling='rare' is unknown; use one of natural, balanced"),
        (IDS, {"class_sampling": "balanced"}, r"needs the class of each of the 44 samples, got 0; hand over labels="),
        (IDS, {"class_sampling": "balanced", "labels": LABELS[:43]}, r"each of the 44 samples, got 43"),
    ],
)
def test_refusals(ids, options, message):
    with pytest.raises(UserError, match=message):
        DomainBatches(ids, 7, 0, 3, **options)
