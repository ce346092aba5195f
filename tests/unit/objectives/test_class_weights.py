"""Class weights: their formulas, their mean, and what they multiply."""

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.config.losses import CrossEntropyConfig, FocalConfig, MarginSoftmaxConfig, SigmoidConfig
from disam_peft.config.objective import ObjectiveConfig, VRexConfig
from disam_peft.errors import UserError
from disam_peft.objectives.class_weights import balanced_weights, class_weights, effective_number_weights
from disam_peft.objectives.objective import Objective
from disam_peft.objectives.run_objective import build_objective

COUNTS = torch.tensor([50, 10, 2])
LABELS = torch.arange(3).repeat_interleave(COUNTS)
NAMES = ("dog", "guitar", "house")


def test_balanced():
    assert balanced_weights(COUNTS).tolist() == pytest.approx([62 / 150, 62 / 30, 62 / 6], abs=1e-14)


@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_effective_number(beta):
    wanted = torch.tensor([(1 - beta) / (1 - beta**n) for n in (50, 10, 2)], dtype=torch.float64)
    found = effective_number_weights(COUNTS, beta)
    assert (found / found[0] - wanted / wanted[0]).abs().max() <= 1e-12
    assert (found * COUNTS).sum().item() == pytest.approx(62, abs=1e-10)


def test_the_limits_of_beta():
    assert effective_number_weights(COUNTS, 0.0).tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-14)
    assert (effective_number_weights(COUNTS, 1 - 1e-12) - balanced_weights(COUNTS)).abs().max() <= 1e-6


@pytest.mark.parametrize("weights", ["balanced", "effective_number", {"guitar": 3.0, "dog": 0.0}])
def test_the_mean_over_the_training_samples_is_1(weights):
    found = class_weights(CrossEntropyConfig(class_weights=weights), LABELS, NAMES)
    assert found is not None
    assert found[LABELS].mean().item() == pytest.approx(1.0, abs=1e-14)
    if isinstance(weights, dict):
        assert (found / found[2]).tolist() == pytest.approx([0.0, 3.0, 1.0], abs=1e-14)


def test_a_class_without_training_samples_spoils_nothing():
    for weights in ("balanced", "effective_number"):
        found = class_weights(CrossEntropyConfig(class_weights=weights), LABELS, (*NAMES, "horse"))
        assert found is not None
        assert found[3].item() == 1.0
        assert found[LABELS].mean().item() == pytest.approx(1.0, abs=1e-14)


def test_a_class_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"has the class 'gitar', which the data do not have; did you mean 'guitar'"):
        class_weights(FocalConfig(class_weights={"gitar": 2.0}), LABELS, NAMES)
    with pytest.raises(UserError, match="gives every training sample the weight 0"):
        class_weights(FocalConfig(class_weights=dict.fromkeys(NAMES, 0.0)), LABELS, NAMES)


def test_none_is_none():
    assert class_weights(CrossEntropyConfig(), LABELS, NAMES) is None
    with pytest.raises(ValueError, match=r"needs the training labels; give class_weight_C="):
        Objective(ObjectiveConfig(loss=CrossEntropyConfig(class_weights="balanced")))


@pytest.mark.parametrize("config", [CrossEntropyConfig, FocalConfig, MarginSoftmaxConfig, SigmoidConfig])
def test_they_multiply_the_losses_and_leave_counts_and_records(config):
    """The mean stays one over samples, V-REx sees the weighed losses, and records show the plain cross entropy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(62, 3, generator=generator, dtype=torch.float64)
    text = nn.functional.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=-1)
    domains, scale = torch.arange(62) % 3, torch.tensor(2.0, dtype=torch.float64)
    weigh = {"loss": config(class_weights="balanced"), "penalties": [VRexConfig(anneal=0, weight=2.0)]}
    given = {"class_features_CE": text, "scale": scale}
    weighed = build_objective(ObjectiveConfig(**weigh), ["a", "b", "c"], 9, labels_N=LABELS, class_names=NAMES)
    plain_B = Objective(ObjectiveConfig(loss=config())).forward(logits, LABELS, **given).loss_B
    loss_B = plain_B * balanced_weights(COUNTS)[LABELS]
    logits.requires_grad_()
    report = DISAM([logits], 0.0).backward(lambda: weighed.forward(logits, LABELS, **given), domains, objective=weighed)
    mean_D = torch.stack([loss_B[domains == d].mean() for d in range(3)])
    wanted = mean_D.mean() + 2.0 * mean_D.var(correction=0)
    assert report.objective.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert report.loss.item() == pytest.approx(nn.functional.cross_entropy(logits, LABELS).item(), abs=1e-12)
    assert report.domain_counts.tolist() == [21, 21, 20]
