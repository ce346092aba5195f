"""What the processes of a test run, and how they are started. Imports no pytest: each process imports this file.

A case is a function of (rank, world size) in ``CASES``; one start of the processes serves all cases of a world size,
since starting takes longer than they do. Ranks are forks of a process that has imported torch (POSIX only).
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from disam_peft import DISAM
from tests.helpers.paths import environment
from tests.helpers.ranks import fork_ranks, gloo_group

STEPS, BATCH, RHO, LAMBDA = 20, 12, 0.1, 0.8
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 1, 0])
# Unequal shares of each global batch. With two ranks, rank 1 never sees domain 2, and rank 1 or 0 is empty at times;
# with four, there is always an empty rank.
SHARES = {
    1: [[range(12)]],
    2: [[range(8), range(8, 12)], [range(12), range(0)], [range(9), range(9, 12)], [range(0), range(12)]],
    4: [[range(5), range(5, 7), range(0), range(7, 12)], [range(0), range(1), range(1, 10), range(10, 12)]],
}


def make_model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def global_batches(steps, dtype=torch.float64):
    """(x, y, domains) of each step; in every third, domain 2 is missing on all ranks."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(0, 4, (BATCH,), generator=generator)
        yield x, y, DOMAINS.clamp(max=1) if step % 3 == 2 else DOMAINS


def share(step, rank, world_size):
    plans = SHARES[world_size]
    return list(plans[step % len(plans)][rank])


def vector(params):
    return nn.utils.parameters_to_vector(params).detach().clone()


def train(
    rank,
    world_size,
    *,
    how="plain",
    steps=STEPS,
    dtype=torch.float64,
    num_domains=None,
    method=(RHO, LAMBDA),
    **options,
):
    """The weights after ``STEPS`` and after ``steps`` steps of SGD with momentum.

    ``how``: plain (nobody reduces), reduce, ddp, ddp_mask (an empty rank runs one masked sample), pieces (micro-batches
    of at most three samples, a rank may have none), ddp_pieces_per_domain (micro-batches of one domain, in no_sync).
    """
    model = make_model(dtype)
    wrapped = DistributedDataParallel(model) if how.startswith("ddp") and world_size > 1 else model
    params = list(model.parameters())
    disam = DISAM(params, *method, num_domains=num_domains, reduce_gradients=how in ("reduce", "pieces"), **options)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    at_steps = torch.zeros(0)
    for step, (x, y, domains) in enumerate(global_batches(steps, dtype)):
        mine = share(step, rank, world_size)
        mask = None
        if how == "ddp_mask":
            mask = torch.tensor([True] * len(mine) if mine else [False])
            mine = mine or [3]
        x, y, domains = x[mine], y[mine], domains[mine]

        def losses(of, x=x, y=y):
            if not len(of) and how == "reduce":
                return torch.zeros(0, dtype=dtype)  # no forward, no graph
            return cross_entropy(wrapped(x[of]), y[of], reduction="none")

        if how == "pieces":
            pieces = torch.arange(len(mine)).split(3) if mine else ()
            report = disam.backward_accumulated(
                [lambda of=of: losses(of) for of in pieces], [domains[p] for p in pieces]
            )
        elif how == "ddp_pieces_per_domain":
            pieces = [(domains == d).nonzero()[:, 0] for d in domains.unique()]
            no_sync = wrapped.no_sync if world_size > 1 else None
            calls = [lambda of=of: losses(of) for of in pieces]
            report = disam.backward_accumulated(calls, [domains[p] for p in pieces], no_sync=no_sync)
            assert report.mode == "per_domain"
        else:
            everything = torch.arange(len(mine))
            report = disam.backward(lambda of=everything: losses(of), domains, mask)
        optimizer.step()
        if step == STEPS - 1:
            at_steps = vector(params)
    return {"at_20": at_steps, "at_end": vector(params), "loss": report.loss, "counts": report.domain_counts}


def not_finite_on_one_rank(rank, world_size):
    """Rank 1's losses are NaN: what each rank decides, and its gradients."""
    model = make_model()
    params = list(model.parameters())
    [(x, y, domains)] = global_batches(1)
    mine = share(0, rank, world_size)
    factor = torch.nan if rank == 1 else 1.0
    report = DISAM(params, RHO, LAMBDA, reduce_gradients=True).backward(
        lambda: cross_entropy(model(x[mine]), y[mine], reduction="none") * factor, domains[mine]
    )
    return {"finite": report.is_finite, "all_nan": torch.stack([p.grad.isnan().all() for p in params]).all()}


def message_of(error_type, call):
    """The message of the error, as a tensor of code points."""
    try:
        call()
    except error_type as error:
        return torch.tensor([ord(c) for c in str(error)])
    return torch.tensor([], dtype=torch.int64)


def nobody_reduces(rank, world_size):
    return {"message": message_of(ValueError, lambda: train(rank, world_size, how="plain", steps=1))}


def every_rank_empty(rank, world_size):
    w = torch.ones(2, requires_grad=True)
    report = DISAM([w], reduce_gradients=True).backward(lambda: torch.zeros(0), torch.tensor([]))
    return {"finite": report.is_finite, "w": w.detach()}


def per_domain_under_a_wrapper(rank, world_size):
    """Asked for, it is refused; ``auto`` takes another mode."""
    model = make_model()
    wrapped = DistributedDataParallel(model)
    [(x, y, domains)] = global_batches(1)
    of = [domains == rank]
    call = [lambda: cross_entropy(wrapped(x[of[0]]), y[of[0]], reduction="none")]
    disam = DISAM(model.parameters(), RHO, LAMBDA)
    message = message_of(ValueError, lambda: disam.backward_accumulated(call, [domains[of[0]]], mode="per_domain"))
    report = disam.backward_accumulated(call, [domains[of[0]]])
    return {"message": message, "mode": torch.tensor(report.mode == "two_phase")}


# -- FSDP2 -------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """A frozen tower with small trained parts between its layers; a scale of one element has an empty shard."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
        self.adapters = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(2)])
        self.head = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self.blocks.requires_grad_(False)
        self.double()

    def forward(self, x):
        for block, adapter in zip(self.blocks, self.adapters, strict=True):
            x = x + block(x) + adapter(x)
        return self.head(x) * self.scale

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]


def train_tower(rank, world_size, *, how="whole", adaptive=False, reshard="default", steps=STEPS, **options):
    """The trained weights, gathered. ``how``: whole, pieces, beside (the trained part is not sharded)."""
    model = Tower()
    ignored = set(model.trained()) if how == "beside" else None
    if world_size > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model, ignored_params=ignored)
        if reshard != "default":
            model.set_reshard_after_backward(False)
    params = model.trained()

    def reshard_all():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    disam = DISAM(
        params,
        0.3,
        LAMBDA,
        adaptive,
        reduce_gradients=how == "beside",
        reshard=reshard_all if reshard == "hook" else None,
        **options,
    )
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    for step, (x, y, domains) in enumerate(global_batches(steps)):
        mine = share(step, rank, world_size)
        x, y, domains = x[mine], y[mine], domains[mine]
        if how == "pieces":
            pieces = [torch.arange(len(mine))[k::2] for k in range(2)]
            calls = [lambda of=of, x=x, y=y: cross_entropy(model(x[of]), y[of], reduction="none") for of in pieces]
            disam.backward_accumulated(calls, [domains[of] for of in pieces])
        else:
            disam.backward(lambda x=x, y=y: cross_entropy(model(x), y, reduction="none"), domains)
        optimizer.step()
    return {"weights": gathered(params)}


def gathered(params):
    return vector([p.full_tensor() if hasattr(p, "full_tensor") else p for p in params])


def stale_copies(rank, world_size):
    return {"message": message_of(ValueError, lambda: train_tower(rank, world_size, reshard="never"))}


def interrupted_tower(rank, world_size):
    """Ctrl-C in pass 2: the shards, before and after, and whether pass 2 saw others."""
    model = Tower()
    fully_shard(model)
    params = model.trained()
    before, calls = [p.to_local().detach().clone() for p in params], []
    [(x, y, domains)] = global_batches(1)

    def loss():
        calls.append([p.to_local().detach().clone() for p in params])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return cross_entropy(model(x), y, reduction="none")

    try:
        DISAM(params, 0.3).backward(loss, domains)
    except KeyboardInterrupt:
        after = [p.to_local() for p in params]
        restored = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        perturbed = not all(torch.equal(a, b) for a, b in zip(before, calls[1], strict=True))
        cleared = all(p.grad is None for p in params)
        return {"as_it_should": torch.tensor([restored, perturbed, cleared])}
    raise AssertionError("pass 2 was not interrupted")


def refused_options(rank, world_size):
    model = Tower()
    fully_shard(model)
    params = [*model.trained()]
    return {
        "reduce": message_of(ValueError, lambda: DISAM(params, reduce_gradients=True)),
        "cosine": message_of(ValueError, lambda: DISAM(params, ascent_cosine=True)),
        "mixed": message_of(ValueError, lambda: DISAM([*params, torch.ones(1, requires_grad=True)])),
    }


GSAM, SAGM = {"descent": "gsam", "alpha": 0.4}, {"descent": "sagm", "alpha": 0.1}
ENTROPIC, RELATIVE = {"variance_form": "entropic"}, {"variance_scale": "relative"}
TRAINED = {
    "reduce": {"how": "reduce", "num_domains": 3, "steps": 100},
    "reduce_unknown_domains": {"how": "reduce"},
    "ddp": {"how": "ddp", "num_domains": 4},
    "ddp_mask": {"how": "ddp_mask"},
    "pieces": {"how": "pieces", "num_domains": 3},
    "pieces_of_sam": {"how": "pieces", "method": (RHO, 0.0)},
    "ddp_pieces_per_domain": {"how": "ddp_pieces_per_domain", "num_domains": 3},
    "float32": {"how": "reduce", "dtype": torch.float32, "steps": 100},
    "gsam": {"how": "reduce", "num_domains": 3, **GSAM},
    "gsam_ddp": {"how": "ddp_mask", **GSAM},
    "gsam_pieces": {"how": "pieces", "num_domains": 3, **GSAM, **RELATIVE},
    "sagm": {"how": "reduce", "num_domains": 3, **SAGM, **ENTROPIC},
    "sagm_ddp": {"how": "ddp_pieces_per_domain", "num_domains": 3, **SAGM},
    "sagm_pieces": {"how": "pieces", "num_domains": 3, **SAGM, **ENTROPIC},
}
# Four processes on few cores are slow; what depends on the number of ranks is in these.
TRAINED_ON = {
    2: list(TRAINED),
    4: ["reduce", "ddp_mask", "pieces", "ddp_pieces_per_domain", "float32", "gsam_pieces", "sagm"],
}
TOWERS = {
    "fsdp": {},
    "fsdp_adaptive": {"adaptive": True},
    "fsdp_pieces": {"how": "pieces"},
    "fsdp_beside": {"how": "beside"},
    "fsdp_hook": {"reshard": "hook"},
    "fsdp_gsam": GSAM,
    "fsdp_sagm": {"adaptive": True, **SAGM},
}
SPECIAL = {
    2: [
        not_finite_on_one_rank,
        nobody_reduces,
        every_rank_empty,
        per_domain_under_a_wrapper,
        stale_copies,
        interrupted_tower,
        refused_options,
    ],
    4: [],
}


def cases(rank, world_size):
    """Every case of this world size, as {name: {key: tensor}}."""
    results = {name: train(rank, world_size, **TRAINED[name]) for name in TRAINED_ON[world_size]}
    if world_size == 2:
        results |= {name: train_tower(rank, world_size, **options) for name, options in TOWERS.items()}
    return results | {case.__name__: case(rank, world_size) for case in SPECIAL[world_size]}


def fork_cases(world_size, folder, case):
    """``case(rank, world size)`` on each rank, in forks of this process, which must not have touched a device."""

    def work(rank):
        with gloo_group(folder, rank, world_size):
            torch.save(case(rank, world_size), f"{folder}/{rank}.pt")

    fork_ranks(world_size, work)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world_size)]


def on_ranks(world_size, folder: Path):
    """All cases' results on each rank, from a fresh process: it imports torch once, and forks the ranks."""
    command = [sys.executable, __file__, str(world_size), str(folder)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_cases(int(sys.argv[1]), sys.argv[2], cases)
