"""A small problem with three domains of unequal size, and objectives on it.

Imports no pytest: processes import this file. Run as a program it gives the gradients of every case on several ranks.
"""

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disam_peft.config.losses import (
    ContrastiveConfig,
    CrossEntropyConfig,
    FocalConfig,
    MarginSoftmaxConfig,
    SigmoidConfig,
)
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import CoralConfig, FishrConfig, GroupDROConfig, IRMConfig, MMDConfig, VRexConfig
from disam_peft.disam.disam import DISAM
from disam_peft.objectives.class_weights import balanced_weights
from disam_peft.objectives.objective import Objective
from tests.helpers.ranks import fork_ranks, gloo_group

DOMAINS = torch.tensor([0, 1, 2, 0, 0, 2, 1, 0, 1, 0, 0])  # 6, 3 and 2 samples
METHODS = {"erm": (0.0, 0.0), "sam": (0.3, 0.0), "disam": (0.3, 0.8)}
TRAIN_COUNTS = torch.tensor([148, 29, 87])  # of each domain, in a training set


SCALE, TEMPLATES = torch.tensor(3.0, dtype=torch.float64), 2


def weights_of_classes():
    return balanced_weights(Problem().y.bincount(minlength=4))


def penalised(*penalties, **settings):
    """A builder of an objective with these penalties."""

    def build():
        objective = Objective(ObjectiveConfig(penalties=list(penalties), **settings))
        objective.prepare(TRAIN_COUNTS)
        return objective

    return build


def coral_objective(weight=0.7, in_ascent=True):
    return penalised(CoralConfig(weight=weight, in_ascent=in_ascent))()


GROUPDRO = GroupDROConfig(weight=0.7, eta=0.5)
SAGAWA = GroupDROConfig(variant="sagawa", eta=0.5, normalize_loss=True, adjustment=2.0)

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
    "mmd": penalised(MMDConfig(weight=0.7)),
    "irm": penalised(IRMConfig(weight=3.0, anneal=0)),
    "irm v1": penalised(IRMConfig(variant="v1", weight=3.0, anneal=0)),
    "fishr": penalised(FishrConfig(weight=40.0, anneal=0, ema=0.5)),
    "fishr not climbed": penalised(FishrConfig(weight=40.0, anneal=0, ema=0.5, in_ascent=False)),
    "groupdro": penalised(GROUPDRO),
    "groupdro not climbed": penalised(GROUPDRO.model_copy(update={"in_ascent": False})),
    "groupdro sagawa": penalised(SAGAWA),
    "several": penalised(
        CoralConfig(weight=0.7),
        MMDConfig(weight=0.3, in_ascent=False),
        GROUPDRO,
        IRMConfig(weight=3.0, anneal=0),
        FishrConfig(weight=0.0, anneal=0),
        mean_over="samples",
    ),
    "weighed focal": lambda: Objective(
        ObjectiveConfig(loss=FocalConfig(class_weights="balanced")), class_weight_C=weights_of_classes()
    ),
    "margin softmax": lambda: Objective(ObjectiveConfig(loss=MarginSoftmaxConfig(margin=0.4))),
    "sigmoid": lambda: Objective(ObjectiveConfig(loss=SigmoidConfig())),
    "contrastive": lambda: Objective(ObjectiveConfig(loss=ContrastiveConfig()), seed=5),
    "vrex and contrastive": lambda: Objective(
        ObjectiveConfig(loss=ContrastiveConfig(), penalties=[VRexConfig(weight=3.0, anneal=0)]), seed=5
    ),
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
            return self.forwarded(self, objective, rows)

        return call

    def forwarded(self, model, objective, rows):
        """Of ``model``, which may wrap this one."""
        features, logits = model(self.x[rows])
        class_features_CE, captions_NE = self.class_features()
        return objective.forward(
            logits,
            self.y[rows],
            features,
            class_features_CE=class_features_CE,
            scale=SCALE.to(logits.dtype),
            place_B=rows,
            num_places=len(self.x),
            head_bias_C=self.head.bias,
            caption_features_NE=captions_NE,
        )

    def class_features(self):
        """Of the classes, and of two captions of each; the head is their text tower."""
        captions_CTE = self.head.weight[:, None] + torch.tensor([[[0.0], [0.5]]], dtype=self.head.weight.dtype)
        normalised_CTE = nn.functional.normalize(captions_CTE, dim=-1)
        return normalised_CTE[:, 0], normalised_CTE.flatten(0, 1)

    def begin(self, objective, micro_batches, masks=None):
        """Tell the objective of the batch of a step, of which this rank has these rows."""
        rows = torch.cat([*micro_batches, torch.zeros(0, dtype=torch.int64)])
        masks = [None] * len(micro_batches) if masks is None else masks
        mask_MB = [torch.ones(len(of)) > 0 if m is None else m for of, m in zip(micro_batches, masks, strict=True)]
        objective.begin_batch(
            self.y[rows],
            num_classes=4,
            templates=TEMPLATES,
            place_B=rows,
            num_places=len(self.y),
            mask_B=torch.cat([*mask_MB, torch.zeros(0) > 0]),
        )

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
        self.begin(objective, [micro_batches] if isinstance(micro_batches, torch.Tensor) else micro_batches, masks)
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
# Of four ranks the third has samples of domain 2 alone, and the last has none.
OF_FOUR = [torch.tensor(rows, dtype=torch.int64) for rows in ([3, 0, 1], [6, 4, 7, 8, 9, 10], [2, 5], [])]
DIVISIONS: dict[int, dict[str, list]] = {
    2: {"whole": SHARES, "micro-batches": IN_MICRO_BATCHES},
    4: {"whole": OF_FOUR, "micro-batches": [list(rows.split(max(1, len(rows) - 1))) for rows in OF_FOUR]},
}
WRAPPED = ["vrex", "coral", "coral not climbed", "mmd", "irm", "fishr", "groupdro"]
CASES = [(name, method) for name in OBJECTIVES for method in METHODS]


def on_rank(rank, size):
    """Gradients and values of every case, from this rank's share: at once, and in micro-batches of another number."""
    found = {}
    for name in WRAPPED if size == 2 else ():
        problem = Problem()
        wrapped = DistributedDataParallel(problem)
        objective, rows = OBJECTIVES[name](), SHARES[rank]

        def call(wrapped=wrapped, objective=objective, rows=rows, problem=problem):
            return problem.forwarded(wrapped, objective, rows)

        report = problem.disam("disam", num_domains=3).backward(call, DOMAINS[rows], objective=objective)
        found[f"{name}/disam/wrapped"] = {"gradients": problem.gradients(), "objective": report.objective}
    for name, method in CASES:
        for how, rows in ((how, of_ranks[rank]) for how, of_ranks in DIVISIONS[size].items()):
            objective = OBJECTIVES[name]()
            gradients, report = Problem().step(objective, method, rows, num_domains=3, reduce_gradients=True)
            found[f"{name}/{method}/{how}"] = {
                "gradients": gradients,
                "objective": report.objective,
                "loss": report.loss,
                "is_finite": report.is_finite,
                "terms": dict(report.terms) | dict(report.domain_terms),
                "state": {
                    f"{kind}/{key}": value
                    for kind, state in objective.state_dict()["penalties"].items()
                    for key, value in state.items()
                },
            }
    return found


def main(folder, size):
    torch.set_num_threads(1)

    def work(rank):
        with gloo_group(folder, rank, size):
            torch.save(on_rank(rank, size), f"{folder}/{rank}.pt")

    fork_ranks(size, work)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
