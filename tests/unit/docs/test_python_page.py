"""The loop of docs/guide/python.md with an objective, run as it stands there, against plain autograd."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from disam_peft.objectives.coral import coral
from tests.helpers.paths import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/guide/python.md").read_text(encoding="utf-8"), re.M | re.S)
DOMAINS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 0])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        self.head = nn.Linear(5, 4).double()


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(DOMAINS), 6)
    images = [torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + DOMAINS[:, None]) for _ in range(3)]
    return [(image, torch.randint(0, 4, (len(DOMAINS),), generator=generator), DOMAINS) for image in images]


def by_definition(model: Model, log_q: Tensor, images: Tensor, labels: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """(objective, mean losses of the domains) by the formulas of docs/mathematics.md, q given."""
    features = normalize(model.body(images), dim=-1)
    plain = cross_entropy(model.head(features), labels, reduction="none")
    focal = (1 - (-plain).exp()) ** 2 * plain
    mean_D = torch.stack([focal[d == DOMAINS].mean() for d in range(3)])
    weighed = (log_q.softmax(0) * mean_D).sum()
    value = 0.5 * mean_D.mean() + 0.5 * weighed + 0.5 * coral(features, DOMAINS)
    return value - lambda_ * mean_D.var(correction=0), mean_D


def test_the_loop_with_an_objective_is_the_one_of_the_definitions() -> None:
    [block] = [block for block in BLOCKS if "objective.forward(" in block]
    model, other = Model(), Model()
    params = list(model.parameters())
    given = {"params": params, "body": model.body, "head": model.head, "loader": batches()}
    exec(block, {**given, "optimizer": torch.optim.SGD(params, lr=0.5)})

    weights, log_q = list(other.parameters()), torch.zeros(3, dtype=torch.float64)
    for images, labels, _ in batches():
        log_q = log_q + 0.01 * by_definition(other, log_q, images, labels, 0.0)[1].detach()
        ascent = torch.autograd.grad(by_definition(other, log_q, images, labels, 0.1)[0], weights)
        norm = torch.cat([g.flatten() for g in ascent]).norm()
        moves = [0.05 * g / norm for g in ascent]
        with torch.no_grad():
            torch._foreach_add_(weights, moves)
        gradients = torch.autograd.grad(by_definition(other, log_q, images, labels, 0.0)[0], weights)
        with torch.no_grad():
            torch._foreach_sub_(weights, moves)
            torch._foreach_sub_(weights, [0.5 * g for g in gradients])
    for found, expected, start in zip(params, weights, Model().parameters(), strict=True):
        assert (found - expected).abs().max() <= 1e-12
        assert (expected - start).abs().max() > 1e-2
