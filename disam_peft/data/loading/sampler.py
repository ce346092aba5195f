"""Which samples make up the batch of a step: a pure function of the seed and the step's number.

The global batch does not depend on the number of ranks, and a run that restarts at step k sees exactly the batches
it would have seen. Letters: D domains, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, get_args

import numpy as np

from disam_peft.common.random import keyed_seed
from disam_peft.errors import UserError

Sampling = Literal["balanced", "proportional"]
ClassSampling = Literal["natural", "balanced"]


class _Order(Protocol):
    """An endless sequence of samples."""

    def take(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """(index, epoch) at the positions ``first`` to ``first + count - 1`` of the sequence."""


class _EndlessOrder:
    """An endless sequence of ``members``: one seeded permutation after the other, a new one for each epoch."""

    def __init__(self, members: np.ndarray, seed: int, name: str) -> None:
        self._members, self._seed, self._name = members, seed, name
        self._epoch = -1
        self._order = members

    def take(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        for position in range(first, first + count):
            epoch, offset = divmod(position, len(self._members))
            if epoch != self._epoch:
                rng = np.random.default_rng(keyed_seed(self._seed, self._name, epoch))
                self._epoch, self._order = epoch, rng.permutation(self._members)
            yield int(self._order[offset]), epoch


class _ClassRounds:
    """An endless sequence of ``members`` in rounds: each has one sample of every class, in an order of its own. Every
    class has an endless order of its own samples, so that rare classes begin theirs anew more often."""

    def __init__(self, members: np.ndarray, labels_N: np.ndarray, seed: int, name: str) -> None:
        of_members = labels_N[members]
        classes = np.unique(of_members)
        self._samples = [_EndlessOrder(members[of_members == c], seed, f"{name}, class {c}") for c in classes]
        self._classes = _EndlessOrder(np.arange(len(classes)), seed, f"{name}, classes")

    def take(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        for number, turn in self._classes.take(first, count):
            yield from self._samples[number].take(turn, 1)


class DomainBatches:
    """The batches of one rank, for use as a DataLoader's ``batch_sampler``.

    Iterating gives, for every step from ``first_step`` to ``steps - 1``, the list of ``(index, epoch)`` pairs of
    this rank: ``index`` is a position in the dataset, ``epoch`` says how often all samples of its domain (or of the
    data set, or of its class) came before, so that (seed, epoch, index) never repeats within a run.

    ``balanced``: every domain gives B // D samples to each batch; the B % D left over go round the domains from
    step to step. Each domain has a permutation of its own and begins a new one when all its samples have come, so the
    smallest domain does not end the epoch. ``proportional``: one permutation of all samples after the other.

    With ``class_sampling="balanced"``, each of these sequences has its classes equally often in place of as often as
    they are in the data: every class once, in an order drawn anew, then every class again. So the numbers of samples of
    two classes of a domain (of the data set) differ by at most one, however long the run is.

    Args:
        domain_ids: (N,) domain of every sample; ids need not be contiguous.
        batch_size: B, over all ranks. Rank r of W takes places r, r + W, ... of the global batch, in which samples
            stand domain by domain, so every rank has a fair share of each.
        steps: length of the whole run, in steps.
        labels: (N,) class of every sample; needed where classes are balanced.
        first_step: where to start, in steps; more than 0 when resuming.

    Raises:
        UserError: no samples; a batch smaller than the number of ranks, or (balanced) than that of domains; no labels
            to balance.
    """

    def __init__(
        self,
        domain_ids: np.ndarray | Sequence[int],
        batch_size: int,
        seed: int,
        steps: int,
        *,
        sampling: Sampling = "balanced",
        class_sampling: ClassSampling = "natural",
        labels: np.ndarray | Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        ids_N = np.asarray(domain_ids)
        if len(ids_N) == 0:
            raise UserError("no training samples to draw batches from; check data.root and data.domains")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} processes does not exist; ranks count from 0")
        if not 0 <= first_step <= steps:
            raise UserError(f"first_step={first_step} is outside a run of {steps} steps")
        for name, value, known in (
            ("sampling", sampling, get_args(Sampling)),
            ("class_sampling", class_sampling, get_args(ClassSampling)),
        ):
            if value not in known:
                raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
        labels_N = np.asarray([] if labels is None else labels)
        if class_sampling == "balanced" and len(labels_N) != len(ids_N):
            raise UserError(
                f"class_sampling 'balanced' needs the class of each of the {len(ids_N)} samples, got {len(labels_N)}; "
                "hand over labels=dataset.labels"
            )
        domains = np.unique(ids_N)
        if batch_size < world_size:
            raise UserError(
                f"batch_size={batch_size} leaves some of the {world_size} processes without a sample; "
                f"use at least {world_size}"
            )
        if sampling == "balanced" and batch_size < len(domains):
            raise UserError(
                f"batch_size={batch_size} cannot hold a sample of each of the {len(domains)} domains; use at least "
                f"{len(domains)}, or sampling 'proportional'"
            )
        self.batch_size, self.steps, self.first_step = batch_size, steps, first_step
        self.rank, self.world_size = rank, world_size
        groups = {"all": np.arange(len(ids_N))}
        if sampling == "balanced":
            groups = {f"domain {d}": np.flatnonzero(ids_N == d) for d in domains}
        self._orders: list[_Order] = [
            _EndlessOrder(members, seed, name)
            if class_sampling == "natural"
            else _ClassRounds(members, labels_N, seed, name)
            for name, members in groups.items()
        ]

    def __len__(self) -> int:
        return self.steps - self.first_step

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """The (index, epoch) pairs of all ranks at ``step``."""
        orders = self._orders
        share, rest = divmod(self.batch_size, len(orders))
        batch: list[tuple[int, int]] = []
        for number, order in enumerate(orders):
            # The left-over sample number x (x = 0, 1, ... over the whole run) goes to domain number x % D.
            before, after = (_congruent_below(s * rest, number, len(orders)) for s in (step, step + 1))
            batch.extend(order.take(share * step + before, share + after - before))
        return batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            yield self.global_batch(step)[self.rank :: self.world_size]


def _congruent_below(bound: int, remainder: int, modulus: int) -> int:
    """How many x in [0, bound) have x % modulus == remainder."""
    return (bound - remainder + modulus - 1) // modulus
