"""Several processes against one: the same weights, whoever reduces the gradients and however samples are spread."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from disam_peft import DISAM
from tests.helpers import disam_ranks
from tests.helpers.disam_ranks import LAMBDA, RHO, STEPS, TOWERS, TRAINED, global_batches, make_model, share, vector

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over processes is tested on POSIX systems")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of every case on every rank, by world size; the processes of a world size are started once."""
    results = {}

    def of(world_size):
        if world_size not in results:
            results[world_size] = disam_ranks.on_ranks(world_size, tmp_path_factory.mktemp("ranks"))
        return results[world_size]

    return of


@pytest.fixture(scope="module")
def one_process():
    """The case on one process, which has the whole batch."""
    results = {}

    def of(name):
        if name not in results:
            results[name] = disam_ranks.train(0, 1, **TRAINED[name])
        return results[name]

    return of


@pytest.mark.parametrize(
    ("world_size", "name"), [(size, name) for size, names in disam_ranks.TRAINED_ON.items() for name in names]
)
def test_row_04_ranks_equal_one_process(ranks, one_process, world_size, name):
    """Unequal splits, a domain missing on a rank and on all, an empty rank; 20 steps of SGD with momentum."""
    on_rank = [result[name] for result in ranks(world_size)]
    one = one_process(name)
    tolerance = 1e-5 if name == "float32" else 1e-12
    assert all(torch.equal(on_rank[0]["at_end"], other["at_end"]) for other in on_rank[1:]), "replicas are bit-equal"
    assert (on_rank[0]["at_20"] - one["at_20"]).abs().max() <= tolerance
    assert (one["at_20"] - vector(make_model(one["at_20"].dtype).parameters())).abs().max() > 0.1, "it did train"
    for rank in on_rank:
        assert rank["loss"].item() == pytest.approx(one["loss"].item(), abs=tolerance), "reports are of all ranks"
        assert rank["counts"].tolist() == one["counts"].tolist()


def test_row_04_a_group_of_one_rank_equals_no_group(one_process):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        for name in ("reduce", "ddp", "pieces"):
            alone = disam_ranks.train(0, 1, **TRAINED[name])
            assert torch.equal(alone["at_20"], one_process(name)["at_20"])
    finally:
        dist.destroy_process_group()


def simulated(variant, world_size=2):
    """What ``variant`` would train on these ranks, computed in one process from per-rank gradients."""
    model = make_model()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def gradient(objective, x, y, domains):
        loss_B = nn.functional.cross_entropy(model(x), y, reduction="none")
        return torch.autograd.grad(objective(loss_B, domains), params)

    def mean(loss_B, domains):
        return loss_B.mean()

    def penalised(loss_B, domains):
        mean_K = torch.stack([loss_B[domains == d].mean() for d in domains.unique()])
        return loss_B.mean() - LAMBDA * mean_K.var(correction=0)

    def descent(direction, x, y, domains):
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in direction]))
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, direction, strict=True):
                p.add_(RHO * g / norm)
        found = gradient(mean, x, y, domains)
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
        return found

    for step, batch in enumerate(global_batches(STEPS)):
        shares = [share(step, rank, world_size) for rank in range(world_size)]
        local = [tuple(column[mine] for column in batch) for mine in shares if mine]
        sizes = torch.tensor([len(mine) / len(batch[0]) for mine in shares if mine], dtype=torch.float64)
        even = torch.full_like(sizes, 1 / len(sizes))

        def averaged(gradients, weights):
            return [sum(w * g for w, g in zip(weights, of_p, strict=True)) for of_p in zip(*gradients, strict=True)]

        whole = gradient(penalised, *batch)
        if variant == "local mean":
            final = averaged([descent(whole, *part) for part in local], even)
        elif variant == "local variance":
            ascent = averaged([gradient(penalised, *part) for part in local], sizes)
            final = descent(ascent, *batch)
        elif variant == "perturbation per rank":
            final = averaged([descent(gradient(penalised, *part), *part) for part in local], sizes)
        else:
            final = averaged([descent(whole, *part) for part in local], sizes)
        for p, g in zip(params, final, strict=True):
            p.grad = g
        optimizer.step()
    return vector(params)


@pytest.mark.parametrize("variant", ["local mean", "local variance", "perturbation per rank"])
def test_row_04_what_is_not_exact_would_be_seen(one_process, variant):
    exact = one_process("reduce")["at_20"]
    assert (simulated("exact") - exact).abs().max() <= 1e-12
    assert (simulated(variant) - exact).abs().max() > 1e-3


def test_row_11_not_finite_on_one_rank_is_seen_by_all(ranks):
    for rank in ranks(2):
        assert not rank["not_finite_on_one_rank"]["finite"]
        assert rank["not_finite_on_one_rank"]["all_nan"]


def test_a_model_that_nobody_reduces_is_refused(ranks):
    assert all("reduce_gradients=True" in text(rank["nobody_reduces"]["message"]) for rank in ranks(2))


def test_row_04_a_batch_without_a_sample_on_any_rank_has_no_effect(ranks):
    for rank in ranks(2):
        assert not rank["every_rank_empty"]["finite"]
        assert rank["every_rank_empty"]["w"].tolist() == [1, 1]


def test_gradients_per_domain_are_not_left_to_a_wrapper(ranks):
    for rank in ranks(2):
        assert "hand over its no_sync" in text(rank["per_domain_under_a_wrapper"]["message"])
        assert rank["per_domain_under_a_wrapper"]["mode"], "auto takes the other mode"


def test_row_04_an_empty_rank_may_not_leave_a_wrapper_waiting(monkeypatch):
    """What a rank of several says before it would leave the others waiting."""
    monkeypatch.setattr("disam_peft.disam.ranks.dist.is_initialized", lambda: True)
    monkeypatch.setattr("disam_peft.disam.ranks.dist.get_world_size", lambda group: 2)
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"one sample with mask=\[False\]"):
        DISAM([w], num_domains=2).backward(lambda: torch.zeros(0), torch.tensor([]))
    with pytest.raises(ValueError, match=r"one sample with mask=\[False\]"):
        DISAM([w], num_domains=2).backward_accumulated([], [])


# -- sharded parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_fsdp_equals_one_process(ranks, name):
    options = TOWERS[name]
    one = disam_ranks.train_tower(0, 1, **options)["weights"]
    both = [rank[name]["weights"] for rank in ranks(2)]
    assert torch.equal(*both)
    assert (both[0] - one).abs().max() <= 1e-12
    assert (one - vector(disam_ranks.Tower().trained())).abs().max() > 0.1, "it did train"


def test_fsdp_modules_that_keep_unsharded_copies_are_refused(ranks):
    """Without the check pass 2 would run on the old weights, and SAM be SGD."""
    assert all("give DISAM reshard=" in text(rank["stale_copies"]["message"]) for rank in ranks(2))


def test_fsdp_shards_are_restored_by_an_interrupt(ranks):
    for rank in ranks(2):
        restored, perturbed, gradients_cleared = rank["interrupted_tower"]["as_it_should"]
        assert restored
        assert perturbed
        assert gradients_cleared


def test_fsdp_excludes_some_options(ranks):
    for rank in ranks(2):
        said = {name: text(message) for name, message in rank["refused_options"].items()}
        assert "FSDP reduces their gradients" in said["reduce"]
        assert "second backward" in said["cosine"]
        assert "5 of 6 parameters are sharded" in said["mixed"]


def text(code_points):
    return "".join(map(chr, code_points.tolist()))
