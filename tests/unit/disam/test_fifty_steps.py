"""Fifty steps on changing batches, with dropout: where DISAM must be another method, it is that method bit for bit."""

import copy

import pytest
import torch
from torch import nn

from disam_peft import DISAM

STEPS = 50
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def start():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 4))


def batches():
    """Of 1 to 12 samples in up to three domains, the sizes of the domains as they fall."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        n = 1 + 5 * step % 12
        yield (
            torch.randn(n, 6, generator=generator),
            torch.randint(0, 4, (n,), generator=generator),
            torch.randint(0, 3, (n,), generator=generator),
        )


def ours(model, optimizer, **options):
    disam = DISAM(model.parameters(), num_domains=3, **options)
    torch.manual_seed(2)
    for x, y, domains in batches():
        disam.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y, reduction="none"), domains)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def erm(model, optimizer):
    torch.manual_seed(2)
    for x, y, _ in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction="none").mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def sam(model, optimizer, rho):
    """As its paper has it (Foret et al. 2021, arXiv 2010.01412), both passes with the same dropout masks."""
    params = list(model.parameters())
    torch.manual_seed(2)
    for x, y, _ in batches():
        masks = torch.get_rng_state()
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="none").mean(), params)
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in gradients]))
        weights = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p.add_(g * (rho / norm))
        torch.set_rng_state(masks)
        second = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="none").mean(), params)
        with torch.no_grad():
            for p, w, g in zip(params, weights, second, strict=True):
                p.copy_(w)
                p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_row_25_rho_zero_is_erm_bit_for_bit_over_50_steps(name, adaptive):
    model = start()
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    wanted = erm(twin, OPTIMIZERS[name](twin.parameters()))
    found = ours(model, OPTIMIZERS[name](model.parameters()), rho=0.0, variance_weight=0.7, adaptive=adaptive)
    assert same_bits(found, wanted)
    nearby = ours(other, OPTIMIZERS[name](other.parameters()), rho=1e-3, variance_weight=0.7, adaptive=adaptive)
    assert not same_bits(nearby, wanted), "a small rho is seen"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_row_25_lambda_zero_is_sam_bit_for_bit_over_50_changing_batches(name):
    model = start()
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    wanted = sam(twin, OPTIMIZERS[name](twin.parameters()), rho=0.05)
    assert same_bits(ours(model, OPTIMIZERS[name](model.parameters()), rho=0.05, variance_weight=0.0), wanted)
    nearby = ours(other, OPTIMIZERS[name](other.parameters()), rho=0.05, variance_weight=1e-2)
    assert not same_bits(nearby, wanted), "a small lambda is seen"
