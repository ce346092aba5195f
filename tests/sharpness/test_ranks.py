"""Several processes against one: the same weights, whoever reduces the gradients."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disam_peft import DISAM

STEPS, BATCH = 20, 12
# Unequal shares of each global batch; with two ranks, rank 1 never sees domain 2.
SHARES = {1: [range(12)], 2: [range(8), range(8, 12)], 3: [range(5), range(5, 7), range(7, 12)]}
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 1, 0])


def train(rank: int, world_size: int, mode: str, num_domains: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    wrapped = DistributedDataParallel(model) if mode == "ddp" and world_size > 1 else model
    params = list(model.parameters())
    disam = DISAM(params, 0.1, 0.8, num_domains=num_domains, reduce_gradients=mode == "reduce")
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    mine = list(SHARES[world_size][rank])
    for _ in range(STEPS):
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)[mine]
        y = torch.randint(0, 4, (BATCH,), generator=generator)[mine]
        disam.backward(lambda x=x, y=y: nn.functional.cross_entropy(wrapped(x), y, reduction="none"), DOMAINS[mine])
        optimizer.step()
    return nn.utils.parameters_to_vector(params).detach()


def worker(rank: int, world_size: int, port: int, mode: str, num_domains: int | None, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.save(train(rank, world_size, mode, num_domains), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(world_size: int, mode: str, num_domains: int | None, folder: Path) -> list[torch.Tensor]:
    mp.spawn(worker, (world_size, free_port(), mode, num_domains, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over spawned processes is tested on POSIX systems")
@pytest.mark.parametrize(("world_size", "mode", "num_domains"), [(2, "ddp", 3), (2, "reduce", None), (3, "reduce", 3)])
def test_row_04_ranks_equal_one_process(tmp_path, world_size, mode, num_domains):
    ranks = on_ranks(world_size, mode, num_domains, tmp_path)
    one = train(0, 1, "none", None)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:]), "replicas are bit-equal"
    assert (ranks[0] - one).abs().max() <= 1e-12


def test_a_model_that_nobody_reduces_is_refused(tmp_path):
    with pytest.raises(Exception, match="reduce_gradients=True"):
        on_ranks(2, "none", 3, tmp_path)
