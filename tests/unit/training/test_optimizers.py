"""The learning rate over a run, by hand."""

import math

import pytest

from disam_peft.config.training import TrainConfig
from disam_peft.training.optimizers import learning_rate_factor


def factors(**settings):
    config = TrainConfig(**settings)
    return [learning_rate_factor(config, step) for step in range(config.steps)]


def test_warmup_then_cosine():
    values = factors(steps=8, warmup_steps=4, schedule="cosine")
    expected = [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert values == pytest.approx(expected, abs=1e-15)


def test_constant():
    assert factors(steps=4, warmup_steps=2, schedule="constant") == [0.5, 1.0, 1.0, 1.0]


def test_validation_happens_ten_times_a_run_unless_told_otherwise():
    assert TrainConfig(steps=200).validation_interval == 20
    assert TrainConfig(steps=5).validation_interval == 1
    assert TrainConfig(steps=200, validate_every=7).validation_interval == 7
