"""Notes on a method that could not act: each by hand on both sides of its bound; their counts after a resume."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.disam.disam import DISAM
from disam_peft.disam.step_report import StepReport
from disam_peft.errors import Notice
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from disam_peft.training.guarded_optimizer import StepOutcome
from disam_peft.training.idle_method import IdleMethod
from disam_peft.training.step_metrics import FinishedStep, StepMetrics

LORA = LoraAdapterConfig()
NORM_5 = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]


def report(weights: Sequence[float], plain: Sequence[float], loss: float = 1.0) -> StepReport:
    weights_D, plain_D = torch.tensor(weights, dtype=torch.float64), torch.tensor(plain, dtype=torch.float64)
    value = torch.tensor(loss, dtype=torch.float64)
    ids_D = torch.arange(len(weights))
    finite = torch.tensor(True)
    return StepReport(value, value, value, ids_D, ids_D + 1, weights_D, weights_D, plain_D, value, finite)


def idle(steps: int = 10, domains: int = 3, **method: Any) -> IdleMethod:
    config = TrainConfig(steps=steps, warmup_steps=0)
    return IdleMethod(MethodConfig.model_validate(method), config, domains, torch.device("cpu"))


def notices(watched: IdleMethod, adapter: Config = LORA, steps: int = 10) -> list[str]:
    """What is said of a run with LoRA, at its start and at its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched.notice_at_the_start(NORM_5, adapter)
        watched.notice_at_the_end(NORM_5, adapter, steps)
    assert {w.category for w in caught} <= {Notice}
    return [str(w.message) for w in caught]


PLAIN = [0.5, 0.2, 0.3]


def shifted(by: float) -> list[float]:
    """``PLAIN``, in which the weight that changes most is larger by this share of it."""
    return [0.5 - 0.2 * by, 0.2 + 0.2 * by, 0.3]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({}, "SAM for all .* With method.variance_weight=1.2 the largest change would be about 10 %; or .*name=sam$"),
        ({"variance_form": "entropic", "variance_weight": 0.4}, "SAM for all .* With method.variance_weight=5 "),
        ({"name": "disam_gsam"}, "GSAM for all .*method.name=gsam$"),
        ({"variance_weight": {"from": 0.1, "to": 0.2}}, "With a method.variance_weight that is 12 times as large "),
    ],
    ids=str,
)
def test_weights_that_the_variance_leaves_alone_are_said_with_a_lambda(method: dict[str, Any], told: str) -> None:
    watched = idle(rho=0.25, **method)
    for by in (0.002, 0.008, 0.0):
        watched.count(report(shifted(by), PLAIN), is_perturbed=True)
    watched.count(report(shifted(0.5), PLAIN), is_perturbed=False)  # nothing is perturbed along these
    [text] = notices(watched)
    assert text.startswith(
        "in no step did the variance change a domain's weight in the ascent by more than 0.8 % of it"
    )
    assert re.search(told, text)
    watched.count(report(shifted(0.011), PLAIN), is_perturbed=True)
    assert notices(watched) == [], "one domain in one step is enough"


def test_from_a_change_of_rounding_no_lambda_is_computed() -> None:
    watched = idle(rho=0.25)
    assert notices(watched) == [], "no step, or all of one domain"
    watched.count(report(shifted(1e-12), PLAIN), is_perturbed=True)
    [text] = notices(watched)
    assert text.endswith("at the same cost. Take method.name=sam")


def test_absent_domains_and_weights_of_zero_are_no_small_change() -> None:
    watched = idle(rho=0.25)
    watched.count(report([0.501, 0.499, 0.0], [0.5, 0.5, 0.0]), is_perturbed=True)
    assert len(notices(watched)) == 1, "an absent domain has 0 of 0"
    watched.count(report([0.4999, 0.5, 0.0001], [0.5, 0.5, 0.0]), is_perturbed=True)
    assert notices(watched) == [], "a penalty's 0, which the variance changed"


@pytest.mark.parametrize("change", [{"name": "sam"}, {"domains": 1}, {"variance_weight": 0.0}], ids=str)
def test_without_a_variance_its_weights_are_not_judged(change: dict[str, Any]) -> None:
    watched = idle(**({"rho": 0.25} | change))
    watched.count(report(shifted(0.005), PLAIN), is_perturbed=True)
    assert notices(watched) == []


LOW = "method.rho=0.049 is 0.98 % of the norm of all trained weights together, 5 at the end .* method.rho=0.25 "
HIGH = "method.rho=5.1 is above the norm of all trained weights together, 5 at the start .* method.rho=0.25 "


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"rho": 0.049}, LOW),
        ({"rho": 0.051}, None),
        ({"rho": 4.9}, None),
        ({"rho": 5.1}, HIGH),
        ({"rho": 0.0}, None),
        ({"rho": 0.001, "name": "erm"}, None),
        ({"rho": 5.1, "adaptive": True}, None),
        ({"rho": {"from": 0.049, "to": 0.0}}, LOW),
        ({"rho": {"from": 0.051, "to": 0.0}}, None),
        ({"rho": {"from": 5.1, "to": 0.1}}, HIGH),
        ({"rho": {"from": 5.1, "to": 0.1}, "from": 0.1}, None),  # the first steps are not perturbed
        ({"rho": {"kind": "follow_lr", "max": 5.1}, "from": 0.5}, None),
        ({"rho": 0.049, "rho_factors": {"*a": 0.0}}, LOW),
        ({"rho": 0.049, "rho_factors": {"*a": 2.0}}, None),
        ({"rho": 5.1, "rho_factors": {"*a": 2.0}}, HIGH),
        ({"rho": 5.1, "rho_factors": {"*a": 0.5}}, None),
    ],
    ids=str,
)
def test_a_radius_out_of_proportion_is_said_once_with_one_to_try(method: dict[str, Any], told: str | None) -> None:
    texts = notices(idle(**({"name": "sam"} | method)))
    assert len(texts) == (told is not None)
    assert told is None or re.search(told, texts[0])


@pytest.mark.parametrize(
    ("adapter", "judged"),
    [
        (CoOpConfig(), True),
        (LinearProbeConfig(), True),
        (PeftAdapterConfig(method="dora"), True),
        (PeftAdapterConfig(method="ln_tuning"), False),
        (LoraAdapterConfig(init="pissa"), False),
        (FullConfig(), False),
        (LpFtConfig(), False),
    ],
    ids=str,
)
def test_beside_the_norm_of_pretrained_weights_no_radius_is_called_small(adapter: Config, judged: bool) -> None:
    assert len(notices(idle(name="sam", rho=0.049), adapter)) == judged
    [above] = notices(idle(name="sam", rho=5.1), adapter)
    assert above.endswith("at about method.rho=0.25 (5 % of the norm)" if judged else "at the published 0.05")


def test_tensors_that_start_at_zero_are_judged_at_the_end() -> None:
    watched = idle(name="sam", rho=5.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched.notice_at_the_start([torch.zeros(3)], LORA)
    with pytest.warns(Notice, match="5 at the end of the run"):
        watched.notice_at_the_end(NORM_5, LORA, 10)


def test_a_loss_at_zero_in_more_than_half_of_the_steps_is_said_for_all_methods() -> None:
    watched = idle(name="erm")
    for loss in (0.5, 0.011, 0.009, 0.0):
        watched.count(report(PLAIN, PLAIN, loss), is_perturbed=False)
    assert notices(watched, steps=4) == []
    watched.count(report(PLAIN, PLAIN, 0.009), is_perturbed=False)
    [text] = notices(watched, steps=5)
    assert text.startswith("the mean training loss was below 0.01 nats in 3 of 5 steps")


def squares(weight: Tensor, inputs_B: Tensor, targets_B: Tensor) -> Tensor:
    return (weight * inputs_B - targets_B).square()


def test_micro_batches_see_what_the_whole_batch_sees() -> None:
    """Eight samples in proportions of 5 to 3, cut where both domains are in one part."""
    inputs, targets = torch.linspace(-1, 2, 8, dtype=torch.float64), torch.tensor([0.0, 1.0] * 4, dtype=torch.float64)
    domains = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1])
    found = []
    for size in (8, 3):
        weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        parts = list(zip(inputs.split(size), targets.split(size), strict=True))
        losses = [partial(squares, weight, *part) for part in parts]
        watched = idle()
        step = DISAM([weight], rho=0.05, variance_weight=0.004).backward_accumulated(losses, domains.split(size))
        watched.count(step, is_perturbed=True)
        found.append(watched.state_dict()["shift"].item())
    mean_D = [squares(torch.tensor(0.3), inputs, targets)[domains == d].mean().item() for d in (0, 1)]
    by_hand = 0.004 * abs(mean_D[0] - mean_D[1]) / 2 * 8 / 3  # (2 lambda / 2) |L_d - mean| / (n_d / N), of the smaller
    assert found == pytest.approx([by_hand, by_hand], rel=1e-6) and by_hand > 1e-4


@pytest.fixture
def metrics(domains_folder: Path) -> Callable[[], StepMetrics]:
    """Makes what counts the steps of a run, afresh."""
    dataset = load(DataConfig(root=domains_folder))

    def make() -> StepMetrics:
        config = TrainConfig(steps=100, log_every=100)
        return StepMetrics(
            dataset, MethodConfig(rho=0.25), config, lambda *a, **b: None, Accelerator(cpu=True), ObjectiveConfig()
        )

    return make


def feed(metrics: StepMetrics, shifts: Sequence[float], *, skipped: bool = False) -> StepMetrics:
    """Steps of these shifts, which are their losses too."""
    for by in shifts:
        seen = report(shifted(by), PLAIN, loss=by)
        outcome = StepOutcome(torch.tensor(not skipped))
        outcome.resolve(skipped)
        metrics.record(FinishedStep(2, torch.arange(3), seen, seen.loss, 0.1, 0.25, 0.1), outcome)
    return metrics


def said(metrics: StepMetrics) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics.warn_at_the_end(NORM_5, LORA)
    return [str(w.message) for w in caught]


def test_counts_come_back_to_the_bit_and_skipped_steps_are_none(metrics: Callable[[], StepMetrics]) -> None:
    whole = feed(metrics(), [0.001, 1 / 137, 0.002])
    half = feed(feed(metrics(), [0.001, 1 / 137]), [0.9], skipped=True)
    resumed = metrics()
    resumed.load_state_dict(from_json_and_tensors(*to_json_and_tensors(half.state_dict())))
    feed(resumed, [0.002])
    assert said(resumed) == said(whole)
    assert [text.split()[2] for text in said(whole)] == ["step", "training"], "the weights, and the loss at zero"
    states = [each.state_dict()["idle_method"] for each in (resumed, whole)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("shift", "steps_at_zero"))


def test_a_state_of_a_version_that_did_not_count_says_nothing_of_those_steps(
    metrics: Callable[[], StepMetrics],
) -> None:
    state = feed(metrics(), [0.5, 0.5]).state_dict()
    del state["idle_method"]
    resumed = metrics()
    resumed.load_state_dict(from_json_and_tensors(*to_json_and_tensors(state)))
    feed(resumed, [0.001, 0.001])
    assert said(resumed) == [], "two of four steps at zero; the largest change may have been before"
    again = metrics()
    again.load_state_dict(from_json_and_tensors(*to_json_and_tensors(resumed.state_dict())))
    assert [text.split()[2] for text in said(feed(again, [0.001]))] == ["training"], "three of five"
