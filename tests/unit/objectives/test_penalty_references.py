"""Every case of penalties.npz: numbers of the authors' own code."""

import json

import numpy as np
import pytest
import torch

from disam_peft import DISAM
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import (
    CoralConfig,
    FishrConfig,
    GroupDROConfig,
    IRMConfig,
    MMDConfig,
    VRexConfig,
)
from disam_peft.objectives.coral import coral
from disam_peft.objectives.fishr import fishr
from disam_peft.objectives.group_dro import GroupDRO, group_dro, group_dro_sagawa
from disam_peft.objectives.irm import irm, irm_v1
from disam_peft.objectives.mmd import mmd
from disam_peft.objectives.objective import Objective
from disam_peft.objectives.vrex import vrex
from disam_peft.objectives.whole_batch import mean_over_domains
from tests.helpers.paths import REFERENCE

VALUES = np.load(REFERENCE / "penalties.npz")
CASES = json.loads(str(VALUES["meta"]))["cases"]
OF_METHOD: dict[str, list[str]] = {}
for _name in sorted(CASES):
    OF_METHOD.setdefault(CASES[_name]["method"], []).append(_name)
CLOSE = 1e-10


def of_case(name, *keys):
    found = [torch.from_numpy(np.asarray(VALUES[f"{name}/{key}"])) for key in keys]
    return found[0] if len(keys) == 1 else found


def gradients(value, *leaves):
    """Zeros where the value does not depend on a leaf, as without a pair of domains."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def assert_close(found, expected):
    assert (found.detach() - expected).abs().max() <= CLOSE


def test_every_case_is_driven():
    assert {method: len(names) for method, names in OF_METHOD.items()} == {
        "coral": 5,
        "mmd": 5,
        "vrex": 10,
        "irm": 10,
        "irmv1": 5,
        "groupdro_domainbed": 10,
        "groupdro_sagawa": 4,
        "fishr": 10,
        "fishr_missing": 1,
    }


# -- the functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["as it is", "shuffled", "gap"])
@pytest.mark.parametrize("name", OF_METHOD["coral"] + OF_METHOD["mmd"])
def test_coral_and_mmd(name, order):
    features, labels, domains, classifier = of_case(name, "features", "labels", "domains", "classifier")
    rows = torch.arange(len(domains))
    if order == "shuffled":
        rows = torch.randperm(len(domains), generator=torch.Generator().manual_seed(0))
    features, labels, domains = features[rows].requires_grad_(), labels[rows], domains[rows]
    penalty = {"coral": coral, "mmd": mmd}[CASES[name]["method"]](
        features, domains * 3 + 1 if order == "gap" else domains
    )
    prefix = "convention_" if name == "coral_single_sample" else ""
    assert_close(penalty, of_case(name, prefix + "penalty"))
    expected = of_case(name, "convention_grad_features" if prefix else "penalty_grad_features")
    assert_close(gradients(penalty, features)[0], expected[rows])
    loss = mean_over_domains(features @ classifier.T, labels, domains)
    assert_close(loss, of_case(name, "update_loss"))
    if not prefix:
        objective = loss + CASES[name]["gamma"] * penalty
        assert_close(gradients(objective, features)[0], of_case(name, "objective_grad_features")[rows])


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", OF_METHOD["vrex"] + OF_METHOD["irm"] + OF_METHOD["irmv1"])
def test_vrex_and_irm(name, gap):
    logits, labels, domains = of_case(name, "logits", "labels", "domains")
    logits.requires_grad_()
    function = {"vrex": vrex, "irm": irm, "irmv1": irm_v1}[CASES[name]["method"]]
    penalty = function(logits, labels, domains * 2 + 4 if gap else domains)
    assert_close(penalty, of_case(name, "penalty"))
    if CASES[name]["method"] == "irmv1":
        assert_close(gradients(penalty, logits)[0], of_case(name, "penalty_grad_logits"))
        return
    objective = mean_over_domains(logits, labels, domains) + CASES[name]["penalty_weight"] * penalty
    assert_close(objective, of_case(name, "loss"))
    assert_close(gradients(objective, logits)[0], of_case(name, "objective_grad_logits"))


@pytest.mark.parametrize("name", OF_METHOD["irm"])
def test_irm_pairs_rows_by_their_order_within_a_domain(name):
    """Rows of other domains between them change nothing; another order within a domain does."""
    logits, labels, domains = of_case(name, "logits", "labels", "domains")
    interleaved = torch.cat([torch.where(torch.arange(len(domains)) % 2 == half)[0] for half in (0, 1)])
    rank = torch.stack([(domains[:i] == d).sum() for i, d in enumerate(domains)])
    mixed = rank.argsort(stable=True)  # the first of each domain, the second of each, ...
    assert_close(irm(logits[mixed], labels[mixed], domains[mixed]), of_case(name, "penalty"))
    other = irm(logits[interleaved], labels[interleaved], domains[interleaved])
    assert abs(other - of_case(name, "penalty")) > 1e-6


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", OF_METHOD["groupdro_domainbed"] + OF_METHOD["groupdro_sagawa"])
def test_groupdro(name, gap):
    logits, labels, domains, q_T, loss_T, gradient_T = of_case(
        name, "logits", "labels", "domains", "q", "loss", "loss_grad_logits"
    )
    about, count = CASES[name], q_T.shape[1]
    is_sagawa = about["method"] == "groupdro_sagawa"
    q = torch.full((count,), 1 / count if is_sagawa else 1.0, dtype=torch.float64)
    for step in range(about["steps"]):
        leaf = logits[step].clone().requires_grad_()
        ids = domains if domains.ndim == 1 else domains[step]
        ids = ids * 2 + 5 if gap else ids
        if is_sagawa:
            loss, q = group_dro_sagawa(
                leaf,
                labels[step],
                ids,
                q,
                eta=about["eta"],
                normalize_loss=about["normalize_loss"],
                adjustment=about["adjustment"] or 0.0,
                group_counts=of_case(name, "group_counts"),
                ids=[2 * d + 5 for d in range(count)] if gap else None,
            )
        else:
            loss, q = group_dro(leaf, labels[step], ids, q, eta=about["eta"])
        assert_close(q, q_T[step])
        assert_close(loss, loss_T[step])
        assert_close(gradients(loss, leaf)[0], gradient_T[step])


def fishr_steps(name):
    """(features, labels, domains, penalty, gradients by features, weight and bias) of each step."""
    keys = [
        "features",
        "labels",
        "domains",
        "penalty",
        *(f"penalty_grad_{of}" for of in ("features", "weight", "bias")),
    ]
    for step in range(CASES[name]["steps"]):
        if CASES[name]["method"] == "fishr_missing":
            yield of_case(f"{name}/step{step}", *keys)
        else:
            yield [of_case(name, key) if key == "domains" else of_case(name, key)[step] for key in keys]


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", OF_METHOD["fishr"] + OF_METHOD["fishr_missing"])
def test_fishr(name, gap):
    weight, bias = (tensor.requires_grad_() for tensor in of_case(name, "weight", "bias"))
    average, all_ids = None, [1, 4, 7] if gap else [0, 1, 2]
    for features, labels, domains, penalty, *expected in fishr_steps(name):
        leaf = features.clone().requires_grad_()
        found, average = fishr(
            leaf,
            leaf @ weight.T + bias,
            labels,
            domains * 3 + 1 if gap else domains,
            average,
            bias=bias,
            ema=CASES[name]["ema"],
            ids=all_ids if CASES[name]["method"] == "fishr_missing" else None,
        )
        assert_close(found, penalty)
        for gradient, wanted in zip(gradients(found, leaf, weight, bias), expected, strict=True):
            assert_close(gradient, wanted)


def test_a_domain_that_the_ids_lack_is_told():
    logits, labels, domains = of_case("groupdro_two_eta0.5", "logits", "labels", "domains")
    with pytest.raises(ValueError, match=r"domains that are none of ids=\[0, 2\]: \[0, 1\]"):
        group_dro(logits[0], labels[0], domains, torch.ones(2), ids=[0, 2])
    with pytest.raises(ValueError, match=r"q has 3 entries for the domains \[0, 1\]"):
        group_dro(logits[0], labels[0], domains, torch.ones(3))
    with pytest.raises(ValueError, match="needs the number of training samples of each domain"):
        group_dro_sagawa(logits[0], labels[0], domains, torch.ones(2), adjustment=1.0)


# -- the members, in the step ----------------------------------------------------------------------------------


def step(objective, leaf, domains, forward, count):
    """(gradient, report) of a plain step in ``count`` micro-batches of shuffled rows."""
    leaf.grad = None
    shuffled = torch.randperm(len(domains), generator=torch.Generator().manual_seed(1)) if count > 1 else None
    rows = (torch.arange(len(domains)) if shuffled is None else shuffled).tensor_split(count)
    report = DISAM([leaf], rho=0.0).backward_accumulated(
        [lambda of=of: forward(of) for of in rows], [domains[of] for of in rows], objective=objective
    )
    return leaf.grad, report


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("name", OF_METHOD["coral"] + OF_METHOD["mmd"] + OF_METHOD["irm"])
def test_members_without_state(name, gap, count):
    """The ids have a domain between them that the batch lacks; micro-batches mix the rows."""
    about = CASES[name]
    of_features = about["method"] != "irm"
    features, labels, domains = of_case(name, "features" if of_features else "logits", "labels", "domains")
    features.requires_grad_()
    classifier = of_case(name, "classifier") if of_features else torch.eye(features.shape[1], dtype=torch.float64)
    weight = about["gamma"] if of_features else about["penalty_weight"]
    config = {"coral": CoralConfig, "mmd": MMDConfig, "irm": IRMConfig}[about["method"]](weight=weight, anneal=0)

    def forward(of):
        logits = features[of] @ classifier.T
        return objective.forward(logits, labels[of], features[of], place_B=of, num_places=len(labels))

    objective = Objective(ObjectiveConfig(mean_over="domains"))
    plain, about_plain = step(objective, features, domains * 2 if gap else domains, forward, count)
    plain = plain.clone()
    objective = Objective(ObjectiveConfig(penalties=[config]))
    found, report = step(objective, features, domains * 2 if gap else domains, forward, count)
    prefix = "convention_" if name == "coral_single_sample" else ""
    [penalty] = [of_case(name, prefix + "penalty")]
    assert report.objective.item() - about_plain.objective.item() == pytest.approx(weight * penalty.item(), abs=CLOSE)
    if prefix:
        assert_close((found - plain) / weight, of_case(name, "convention_grad_features"))
    else:
        assert_close(found, of_case(name, "objective_grad_features" if of_features else "objective_grad_logits"))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", OF_METHOD["groupdro_domainbed"] + OF_METHOD["groupdro_sagawa"])
def test_groupdro_in_the_place_of_the_mean(name, count):
    """With the ids as they are in training: all that there are, the batch may lack some."""
    logits, labels, domains, q_T, gradient_T = of_case(name, "logits", "labels", "domains", "q", "loss_grad_logits")
    about, domain_count = CASES[name], q_T.shape[1]
    is_sagawa = about["method"] == "groupdro_sagawa"
    settings = {}
    if is_sagawa:
        settings = {"normalize_loss": about["normalize_loss"], "adjustment": about["adjustment"] or 0.0}
    config = GroupDROConfig(variant="sagawa" if is_sagawa else "domainbed", eta=about["eta"], **settings)
    objective = Objective(ObjectiveConfig(penalties=[config]))
    if is_sagawa:
        objective.prepare(torch.cat([of_case(name, "group_counts"), torch.zeros(1)]))  # of a domain that is held out
    for t in range(about["steps"]):
        leaf, of = logits[t].clone().requires_grad_(), domains if domains.ndim == 1 else domains[t]
        rows = torch.arange(len(of)).tensor_split(count)
        DISAM([leaf], rho=0.0, num_domains=domain_count + 1).backward_accumulated(
            [lambda r=r, leaf=leaf, t=t: objective.forward(leaf[r], labels[t][r]) for r in rows],
            [of[r] for r in rows],
            objective=objective,
        )
        assert_close(leaf.grad, gradient_T[t])
        if is_sagawa:
            [penalty] = objective.penalties
            assert isinstance(penalty, GroupDRO)
            assert_close(penalty.q_D, torch.cat([q_T[t], torch.zeros(1)]))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("num_domains", [None, 4])
@pytest.mark.parametrize("name", OF_METHOD["fishr"] + OF_METHOD["fishr_missing"])
def test_fishr_over_steps(name, num_domains, count):
    """Whether the ids in play are known beforehand, or come and go with the batches."""
    weight, bias = of_case(name, "weight", "bias")
    objective = Objective(ObjectiveConfig(penalties=[FishrConfig(weight=1.0, anneal=0, ema=CASES[name]["ema"])]))
    for features, labels, domains, penalty, expected, *_ in fishr_steps(name):
        leaf = features.clone().requires_grad_()

        def forward(of, objective, leaf=leaf, labels=labels):
            logits = leaf[of] @ weight.T + bias
            return objective.forward(logits, labels[of], leaf[of], head_bias_C=bias)

        found = {}
        for key, of_key in (("plain", Objective()), ("fishr", objective)):
            leaf.grad = None
            rows = torch.arange(len(domains)).tensor_split(count)
            report = DISAM([leaf], rho=0.0, num_domains=num_domains).backward_accumulated(
                [lambda r=r, of_key=of_key: forward(r, of_key) for r in rows],
                [domains[r] for r in rows],
                objective=of_key,
            )
            found[key] = leaf.grad, report.objective
        assert_close(found["fishr"][0] - found["plain"][0], expected)
        assert_close(found["fishr"][1] - found["plain"][1], penalty)


def test_the_published_defaults():
    defaults = {
        config.kind: (config.weight, config.anneal)
        for config in (CoralConfig(), FishrConfig(), GroupDROConfig(), IRMConfig(), MMDConfig(), VRexConfig())
    }
    assert defaults == {
        "coral": (1.0, 0),
        "fishr": (1000.0, 1500),
        "groupdro": (1.0, 0),
        "irm": (100.0, 500),
        "mmd": (1.0, 0),
        "vrex": (10.0, 500),
    }
    assert FishrConfig().ema == 0.95 and GroupDROConfig().eta == 0.01
