"""Two processes, a few steps: the quickest tests that need ranks. ``test_mutants.py`` runs them; nobody else does."""

import tempfile

from tests.helpers import disam_ranks

STEPS = 4


def largest_difference(case, key):
    """Between two ranks and one process; fails if a rank does."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = disam_ranks.fork_cases(2, folder, case)
    one = case(0, 1)[key]
    return max(float((rank[key] - one).abs().max()) for rank in ranks)


def test_ddp():
    def case(rank, world_size):
        return disam_ranks.train(rank, world_size, how="ddp", num_domains=3, steps=STEPS)

    assert largest_difference(case, "at_end") <= 1e-12


def test_reduce():
    def case(rank, world_size):
        return disam_ranks.train(rank, world_size, how="reduce", num_domains=3, steps=STEPS)

    assert largest_difference(case, "at_end") <= 1e-12


def test_fsdp():
    def case(rank, world_size):
        return disam_ranks.train_tower(rank, world_size, steps=STEPS)

    assert largest_difference(case, "weights") <= 1e-12
