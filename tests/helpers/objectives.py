"""A small problem with three domains of unequal size, objectives on it, and penalties of a test's own.

Imports no pytest: processes import this file. Run as a program it gives the gradients of every case on two ranks.
"""

import sys
from itertools import combinations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disam_peft.config.objective import BasePenaltyConfig, CrossEntropyConfig, ObjectiveConfig, VRexConfig
from disam_peft.disam.disam import DISAM
from disam_peft.objectives.base import Penalty
from disam_peft.objectives.objective import Objective
from tests.helpers.ranks import fork_ranks, gloo_group

DOMAINS = torch.tensor([0, 1, 2, 0, 0, 2, 1, 0, 1, 0, 0])  # 6, 3 and 2 samples
METHODS = {"erm": (0.0, 0.0), "sam": (0.3, 0.0), "disam": (0.3, 0.8)}


class Coral(Penalty):
    """Distance of the domains' means and unbiased covariances, as DomainBed has it. A pair with a domain of one sample
    compares the means alone."""

    num_statistics = 2

    def statistics(self, outputs, domains):
        return domains.sums(outputs.features), domains.outer_sums(outputs.features)

    def value(self, sums):
        sum_DE, outer_DEE = sums.statistics
        mean_DE, count_D11 = sums.mean_of(sum_DE), sums.count_D[:, None, None]
        scatter_DEE = outer_DEE - count_D11 * mean_DE[:, :, None] * mean_DE[:, None, :]
        covariance_DEE = scatter_DEE / (count_D11 - 1).clamp(min=1)
        present, has_two = sums.present_D.tolist(), (sums.count_D > 1).tolist()
        pairs = list(combinations([d for d, there in enumerate(present) if there], 2))
        total = sum_DE.new_zeros(())
        for a, b in pairs:
            total = total + (mean_DE[a] - mean_DE[b]).square().mean()
            if has_two[a] and has_two[b]:
                total = total + (covariance_DEE[a] - covariance_DEE[b]).square().mean()
        return total / max(1, len(pairs))


class WorstDomain(Penalty):
    """A weighted loss as in GroupDRO: q_d grows with the losses, and is the same in both passes of a step. (Without its
    care for domains that are absent for some steps only.)"""

    def __init__(self, config, eta=0.5):
        super().__init__(config)
        self.eta, self.q_D = eta, None

    def begin_step(self, sums):
        mean_D = sums.mean_of(sums.sum_D)
        q_D = torch.ones_like(mean_D) if self.q_D is None else self.q_D.to(mean_D.device)
        moved_D = sums.present_D * q_D * (self.eta * mean_D).exp()
        moved_D = moved_D / moved_D.sum()
        self.q_D = torch.where(torch.isfinite(moved_D).all(), moved_D, q_D)

    def value(self, sums):
        return (self.q_D * sums.mean_of(sums.sum_D)).sum()

    def state_dict(self):
        return {} if self.q_D is None else {"q_D": self.q_D}

    def load_state_dict(self, state):
        self.q_D = state.get("q_D")


def coral_objective(weight=0.7, in_ascent=True):
    config = ObjectiveConfig(mean_over="domains")
    return Objective(config, penalties=[Coral(BasePenaltyConfig(weight=weight, in_ascent=in_ascent))])


OBJECTIVES = {
    "mean over samples": Objective,
    "mean over domains": lambda: Objective(ObjectiveConfig(mean_over="domains")),
    "label smoothing": lambda: Objective(ObjectiveConfig(loss=CrossEntropyConfig(label_smoothing=0.2))),
    "vrex": lambda: Objective(ObjectiveConfig(penalties=[VRexConfig(weight=3.0, anneal=0)])),
    "vrex over samples": lambda: Objective(
        ObjectiveConfig(
            loss=CrossEntropyConfig(label_smoothing=0.2),
            mean_over="samples",
            penalties=[VRexConfig(weight=3.0, anneal=0)],
        )
    ),
    "vrex not climbed": lambda: Objective(
        ObjectiveConfig(penalties=[VRexConfig(weight=3.0, anneal=0, in_ascent=False)])
    ),
    "coral": coral_objective,
    "coral not climbed": lambda: coral_objective(in_ascent=False),
    "worst domain": lambda: Objective(penalties=[WorstDomain(BasePenaltyConfig(weight=2.0))]),
}


class Problem(nn.Module):
    """A network from inputs to features and logits, and a batch."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)
        self.head = nn.Linear(5, 4, bias=False).to(dtype)
        self.params = list(self.parameters())
        self.x = torch.randn(len(DOMAINS), 6, generator=generator, dtype=torch.float64)
        self.x = (self.x * (1.0 + DOMAINS[:, None])).to(dtype)  # or the domains would look the same
        self.y = torch.randint(0, 4, (len(DOMAINS),), generator=generator)

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)

    def call(self, objective, rows):
        """For ``DISAM.backward``."""

        def call():
            features, logits = self(self.x[rows])
            return objective.forward(logits, self.y[rows], features)

        return call

    def disam(self, method, **options):
        return DISAM(self.params, *METHODS[method], **options)

    def losses(self):
        """The plain losses of the whole batch."""
        return nn.functional.cross_entropy(self.head(self.body(self.x)), self.y, reduction="none")

    def gradients(self):
        return torch.cat([p.grad.reshape(-1) for p in self.params])

    def step(self, objective, method, micro_batches, mode="auto", masks=None, **options):
        """(gradients of all parameters, report) of one step over these rows: all at once, or in micro-batches."""
        disam = self.disam(method, **options)
        if isinstance(micro_batches, torch.Tensor):
            report = disam.backward(self.call(objective, micro_batches), DOMAINS[micro_batches], objective=objective)
        else:
            report = disam.backward_accumulated(
                [self.call(objective, rows) for rows in micro_batches],
                [DOMAINS[rows] for rows in micro_batches],
                masks,
                mode=mode,
                objective=objective,
            )
        return self.gradients(), report


EVERYTHING = torch.arange(len(DOMAINS))
SHARES = [torch.tensor([0, 1, 3, 4, 6, 7, 8]), torch.tensor([9, 10, 2, 5])]  # rank 1 has no sample of domain 1
IN_MICRO_BATCHES = [[SHARES[0][:2], SHARES[0][2:3], SHARES[0][3:]], [SHARES[1][:3], SHARES[1][3:]]]
CASES = [(name, method) for name in OBJECTIVES for method in METHODS]


def on_rank(rank):
    """Gradients and values of every case, from this rank's share: at once, and in micro-batches of another number."""
    found = {}
    for name in ("vrex", "coral", "coral not climbed"):
        problem = Problem()
        wrapped = DistributedDataParallel(problem)
        objective, rows = OBJECTIVES[name](), SHARES[rank]

        def call(wrapped=wrapped, objective=objective, rows=rows, problem=problem):
            features, logits = wrapped(problem.x[rows])
            return objective.forward(logits, problem.y[rows], features)

        report = problem.disam("disam", num_domains=3).backward(call, DOMAINS[rows], objective=objective)
        found[f"{name}/disam/wrapped"] = {"gradients": problem.gradients(), "objective": report.objective}
    for name, method in CASES:
        for how, rows in (("whole", SHARES[rank]), ("micro-batches", IN_MICRO_BATCHES[rank])):
            objective = OBJECTIVES[name]()
            gradients, report = Problem().step(objective, method, rows, num_domains=3, reduce_gradients=True)
            found[f"{name}/{method}/{how}"] = {
                "gradients": gradients,
                "objective": report.objective,
                "loss": report.loss,
                "is_finite": report.is_finite,
            }
    return found


def main(folder):
    torch.set_num_threads(1)

    def work(rank):
        with gloo_group(folder, rank, 2):
            torch.save(on_rank(rank), f"{folder}/{rank}.pt")

    fork_ranks(2, work)


if __name__ == "__main__":
    main(sys.argv[1])
