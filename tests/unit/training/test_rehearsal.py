"""The measurement of a few batches: it changes nothing, and processes measure equally many."""

from __future__ import annotations

import pytest
import torch

from disam_peft.config.data import AugmentConfig, DataConfig, MixupConfig
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.experiments.build import load_pretrained
from disam_peft.training import rehearsal
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.rehearsal import rehearse


@pytest.fixture
def classifier(domains_folder, openclip_name):
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "lora", "rank": 2, "blocks": {"last": 1}, "dropout": 0.5},
            "data": {"root": domains_folder},
            "protocol": "all",
        }
    )
    return load_pretrained(recipe, ("red", "green", "blue", "grey")).with_new_adapter()


def measured(classifier, domains_folder, *, stored=False, batch_size=6, mixup=None, method=None, steps=1):
    dataset = load(DataConfig(root=domains_folder))
    return rehearse(
        classifier,
        dataset,
        dataset,
        method=method or MethodConfig(),
        objective=ObjectiveConfig(),
        config=TrainConfig(steps=steps, batch_size=batch_size, workers=0),
        evaluation=EvaluationConfig(batch_size=8, workers=0),
        augment=AugmentConfig(mixup=mixup),
        stored=stored,
        seed=0,
        accelerator=start_accelerator(),
    )


@pytest.mark.parametrize("stored", [False, True])
def test_weights_gradients_and_the_number_of_steps_stay_as_they_were(classifier, domains_folder, stored):
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    before |= {name: tensor.clone() for name, tensor in classifier.adapter_tensors().items()}
    found = measured(classifier, domains_folder, stored=stored)
    after = {**classifier.state_dict(), **classifier.adapter_tensors()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in classifier.parameters())
    assert not classifier.training
    assert min(found.load_seconds, found.step_seconds, found.judge_load_seconds, found.judge_seconds) > 0
    assert found.judge_start_seconds >= 0
    assert found.stored is stored and (found.encode_seconds > 1e-5) == stored


def test_processes_decide_together_when_they_have_enough(classifier, domains_folder, monkeypatch):
    batches = []
    step = rehearsal.Trainer.rehearse_step

    def counted(self, batch):
        batches.append(len(batch["labels"]))
        step(self, batch)

    monkeypatch.setattr(rehearsal.Trainer, "rehearse_step", counted)
    measured(classifier, domains_folder, mixup=MixupConfig())
    assert batches == [6] * rehearsal.BATCHES
    batches.clear()
    monkeypatch.setattr(rehearsal, "largest", lambda number, device: 1)  # another process has had enough
    measured(classifier, domains_folder)
    assert batches == [6]


def test_memory_that_runs_out_is_told_as_in_training(classifier, domains_folder, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("disam_peft.training.micro_batching.StepGradient.__call__", full)
    with pytest.raises(UserError, match=r"out of memory at step 1: no room.*gradient_accumulation_steps"):
        measured(classifier, domains_folder)


def test_steps_that_perturb_nothing_are_measured_by_themselves(classifier, domains_folder, monkeypatch):
    """And count by their share of the run: here one of four steps has two passes."""
    method = MethodConfig.model_validate({"every": 4, "rho": 0.2})
    assert rehearsal.share_of_perturbed_steps(method, TrainConfig(steps=8)) == 0.25
    now, seen = [0.0], []

    def step(self, batch):
        seen.append(self.disam.rho)
        now[0] += 8.0 if self.disam.rho > 0 else 4.0

    monkeypatch.setattr(rehearsal.Trainer, "rehearse_step", step)
    monkeypatch.setattr(rehearsal, "_now", lambda accelerator: now[0])
    assert measured(classifier, domains_folder, method=method, steps=8).step_seconds == 0.25 * 8 + 0.75 * 4
    assert set(seen) == {0.2, 0.0}
    seen.clear()
    assert measured(classifier, domains_folder, method=MethodConfig(name="erm")).step_seconds == 4
    assert set(seen) == {0.0}
