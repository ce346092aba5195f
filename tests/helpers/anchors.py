"""The small problem of ``objectives.py`` with a zero-shot reference, anchors on it, and their definitions.

Imports no pytest: processes import this file. Run as a program it gives the gradients of every case on two ranks.
"""

import sys

import torch
from torch import nn

from disam_peft.config.anchors import (
    ClassFeaturesAnchorConfig,
    ImageFeaturesAnchorConfig,
    LogitsAnchorConfig,
    WeightsAnchorConfig,
)
from disam_peft.config.objective import ObjectiveConfig, VRexConfig
from disam_peft.objectives.base import Reference
from disam_peft.objectives.objective import Objective
from tests.helpers.objectives import DOMAINS, IN_MICRO_BATCHES, METHODS, SHARES, Problem
from tests.helpers.ranks import fork_ranks, gloo_group

EVERY = (
    LogitsAnchorConfig(weight=0.7),
    ImageFeaturesAnchorConfig(weight=3.0, distance="squared"),
    ClassFeaturesAnchorConfig(weight=2.0),
    WeightsAnchorConfig(weight=0.3),
)
CONFIGS = {
    "kl": ObjectiveConfig(anchors=[LogitsAnchorConfig(weight=0.7)]),
    "logits l1": ObjectiveConfig(anchors=[LogitsAnchorConfig(distance="l1")]),
    "image l1": ObjectiveConfig(anchors=[ImageFeaturesAnchorConfig()]),
    "image squared": ObjectiveConfig(anchors=[ImageFeaturesAnchorConfig(distance="squared", weight=2.0)]),
    "image cosine": ObjectiveConfig(anchors=[ImageFeaturesAnchorConfig(distance="cosine", weight=2.0)]),
    "class l1": ObjectiveConfig(anchors=[ClassFeaturesAnchorConfig(distance="l1", weight=25.0)]),
    "class squared": ObjectiveConfig(anchors=[ClassFeaturesAnchorConfig()]),
    "class cosine": ObjectiveConfig(anchors=[ClassFeaturesAnchorConfig(distance="cosine")]),
    "class not climbed": ObjectiveConfig(anchors=[ClassFeaturesAnchorConfig(in_ascent=False)]),
    "weights": ObjectiveConfig(anchors=[WeightsAnchorConfig(weight=0.8)]),
    "weights not climbed": ObjectiveConfig(anchors=[WeightsAnchorConfig(weight=0.8, in_ascent=False)]),
    "all over domains": ObjectiveConfig(anchors=list(EVERY), mean_over="domains"),
    "all and vrex": ObjectiveConfig(anchors=list(EVERY), penalties=[VRexConfig(weight=3.0, anneal=0)]),
}
CASES = [(name, method) for name in CONFIGS for method in METHODS]


class AnchoredProblem(Problem):
    """At weights away from where it started, on images whose zero-shot outputs are others than its own."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        unit = nn.functional.normalize
        self.reference = Reference(drawn(len(DOMAINS), 4), unit(drawn(len(DOMAINS), 5)), unit(drawn(4, 5)))
        self.start = [p.detach().clone() for p in self.params]
        self.moves = [0.2 * drawn(*p.shape) for p in self.params]
        self.move()

    @torch.no_grad()
    def move(self, factor=1.0):
        for p, move in zip(self.params, self.moves, strict=True):
            p.add_(factor * move)

    def started(self, config):
        """The objective of a config, which knows where this problem started."""
        objective, now = Objective(config), [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, start in zip(self.params, self.start, strict=True):
                p.copy_(start)
            objective.remember_start(self.params)
            for p, moved in zip(self.params, now, strict=True):
                p.copy_(moved)
        return objective

    def call(self, objective, rows):
        def call():
            features = nn.functional.normalize(self.body(self.x[rows]), dim=1)
            of = self.reference
            return objective.forward(
                self.head(features),
                self.y[rows],
                features,
                class_features_CE=nn.functional.normalize(self.head.weight, dim=1),
                reference=Reference(of.logits_BC[rows], of.features_BE[rows], of.class_features_CE),
            )

        return call


def distances(problem, anchor, features, logits):
    """The distances of an anchor from its definition: one for each sample, or one."""
    of = problem.reference
    if anchor.kind == "weights":
        pairs = zip(problem.params, problem.start, strict=True)
        return sum(0.5 * torch.dot((w - w0).flatten(), (w - w0).flatten()) for w, w0 in pairs)
    if anchor.kind == "logits" and anchor.distance == "kl":
        p, q = of.logits_BC.exp(), logits.exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        return (p * (p / q).log()).sum(1)
    if anchor.kind == "logits":
        return sum((logits[:, c] - of.logits_BC[:, c]).abs() for c in range(4)) / 4
    a, b = features, of.features_BE
    if anchor.kind == "class_features":
        a, b = problem.head.weight / problem.head.weight.norm(dim=1, keepdim=True), of.class_features_CE
    if anchor.distance == "l1":
        found = sum((a[:, e] - b[:, e]).abs() for e in range(5)) / 5
    else:
        found = (1 - nn.functional.cosine_similarity(a, b)) * (2 if anchor.distance == "squared" else 1)
    return sum(found) / 4 if anchor.kind == "class_features" else found


def definition(problem, config, *, climbed):
    """(objective, losses (B,), plain cross entropy (B,)) of the whole batch with a graph, from the definitions."""
    features = problem.body(problem.x)
    features = features / features.norm(dim=1, keepdim=True)
    logits = problem.head(features)
    plain_B = nn.functional.cross_entropy(logits, problem.y, reduction="none")
    loss_B, rest = plain_B, 0.0
    for anchor in config.anchors:
        distance = anchor.weight * distances(problem, anchor, features, logits)
        if distance.ndim:
            loss_B = loss_B + distance
        elif anchor.in_ascent or not climbed:
            rest = rest + distance
    mean_K = torch.stack([loss_B[d == DOMAINS].mean() for d in range(3)])
    value = (mean_K.mean() if config.effective_mean_over == "domains" else loss_B.mean()) + rest
    for penalty in config.penalties:
        value = value + penalty.weight * mean_K.var(correction=0)
    return value, loss_B, plain_B


def expected_step(name, method):
    """(gradients, objective at w, plain cross entropy at w) of one step by autograd through the definitions."""
    problem, config, (rho, variance_weight) = AnchoredProblem(), CONFIGS[name], METHODS[method]
    objective, _, plain_B = definition(problem, config, climbed=False)
    if rho > 0:
        value, loss_B, _ = definition(problem, config, climbed=True)
        mean_K = torch.stack([loss_B[d == DOMAINS].mean() for d in range(3)])
        ascent = torch.autograd.grad(value - variance_weight * mean_K.var(correction=0), problem.params)
        norm = torch.cat([g.reshape(-1) for g in ascent]).norm()
        with torch.no_grad():
            for p, g in zip(problem.params, ascent, strict=True):
                p.add_(rho * g / norm)
    gradients = torch.autograd.grad(definition(problem, config, climbed=False)[0], problem.params)
    return torch.cat([g.reshape(-1) for g in gradients]), objective.item(), plain_B.mean().item()


def step(name, method, micro_batches, **options):
    """(gradients, report) of one step of a case."""
    problem = AnchoredProblem()
    return problem.step(problem.started(CONFIGS[name]), method, micro_batches, **options)


def on_rank(rank):
    """Gradients and values of every case, from this rank's share: at once, and in micro-batches of another number."""
    found = {}
    for name, method in CASES:
        for how, rows in (("whole", SHARES[rank]), ("micro-batches", IN_MICRO_BATCHES[rank])):
            gradients, report = step(name, method, rows, num_domains=3, reduce_gradients=True)
            of_step = {"gradients": gradients, "objective": report.objective, "terms": dict(report.terms)}
            found[f"{name}/{method}/{how}"] = of_step
    return found


def main(folder):
    torch.set_num_threads(1)

    def work(rank):
        with gloo_group(folder, rank, 2):
            torch.save(on_rank(rank), f"{folder}/{rank}.pt")

    fork_ranks(2, work)


if __name__ == "__main__":
    main(sys.argv[1])
