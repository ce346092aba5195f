"""A step without effect, of which the host learns late: the same bits, schedule and records as if it had looked."""

import copy
import math
import os
import signal
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import Stopped, UserError
from disam_peft.evaluation.protocols import Score
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training import trainer as loop
from disam_peft.training.checkpoint.manager import CheckpointConfig
from disam_peft.training.fit import fit
from disam_peft.training.guarded_optimizer import GuardedOptimizer
from tests.helpers.guarded_optimizers import Late, LooksFirst
from tests.helpers.losses import replace_loss

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, 0.1, weight_decay=0.3, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, 0.1, 0.9, weight_decay=0.3, fused=True),
    "plain sgd": lambda params: torch.optim.SGD(params, 0.1, weight_decay=0.3, fused=True),
    "not fused": lambda params: torch.optim.AdamW(params, 0.1, weight_decay=0.3, fused=False),
}


def bits(weights, optimizer):
    """Weights and the optimizer's state, by name."""
    found = {f"weight {number}": w.detach().clone() for number, w in enumerate(weights)}
    for number, slots in optimizer.state_dict()["state"].items():
        found |= {f"{slot} {number}": value.clone() for slot, value in slots.items() if value is not None}
    return found


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("way", [GuardedOptimizer, Late])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("bad", [{1}, {1, 2}, {3}, {1, 4, 5}], ids=str)
@pytest.mark.parametrize("where", ["gradient", "losses"])
def test_an_update_without_effect_touches_nothing(optimizer, way, bad, where):
    """Beside an optimizer that never hears of those steps; the first one is where its state would be made."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(37, generator=generator)) for _ in range(2)]
    twins = copy.deepcopy(weights)
    ours, theirs = OPTIMIZERS[optimizer](weights), OPTIMIZERS[optimizer](twins)
    seen = []
    guarded = way(ours, ["first", "second"], Accelerator())
    for step in range(1, 7):
        for w, twin in zip(weights, twins, strict=True):
            w.grad = torch.randn(37, generator=generator)
            twin.grad = w.grad.clone()
        before = bits(weights, ours)
        if step in bad and where == "gradient":
            weights[0].grad.view(-1)[3] = math.nan
        norm = guarded.clip_gradients(None)
        is_finite = torch.tensor(step not in bad or where == "gradient") & torch.isfinite(norm)
        outcome = guarded.step(is_finite)
        outcome.when_known(lambda skipped, step=step: seen.append((step, skipped)))
        guarded.flush()
        if step in bad:
            assert same(bits(weights, ours), before)
        else:
            theirs.step()
        assert same(bits(weights, ours), bits(twins, theirs))
    assert seen == [(step, step in bad) for step in range(1, 7)]
    assert not hasattr(ours, "found_inf"), "it would skip whatever came next"


def test_it_is_told_one_step_later_and_once():
    weight = torch.nn.Parameter(torch.ones(3))
    seen = []
    guarded = Late(OPTIMIZERS["sgd"]([weight]), ["weight"], Accelerator())
    for step, norm in enumerate([1.0, math.inf, 2.0], start=1):
        weight.grad = torch.ones(3)
        outcome = guarded.step(torch.isfinite(torch.tensor(norm)))
        outcome.when_known(lambda skipped, step=step: seen.append((step, skipped)))
        assert [number for number, _ in seen] == list(range(1, step))
    for _ in range(2):
        guarded.flush()
        assert seen == [(1, False), (2, True), (3, False)]


# -- in the loop ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained(openclip_name, domains_folder, monkeypatch):
    """Train with losses that are NaN in some steps: (weights, events, result), or what was raised in its place."""
    dataset = load(DataConfig(root=domains_folder))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))

    def run(way, bad_steps, *, optimizer="adamw", at_call=lambda number: None, checkpoints=None, **settings):
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        adapter = build_adapter(LoraAdapterConfig(seed=0, dropout=0.2), backbone, prompts)
        classifier, calls, events = ClipClassifier(backbone, adapter, prompts), [], []

        def sometimes_nan(logits, labels):
            calls.append(1)
            at_call(len(calls))
            return cross_entropy(logits, labels) * (math.nan if (len(calls) + 1) // 2 in bad_steps else 1.0)

        replace_loss(sometimes_nan, monkeypatch)
        monkeypatch.setattr(loop, "GuardedOptimizer", way)
        outcome: Any
        try:
            outcome = fit(
                classifier,
                dataset,
                config=TrainConfig(**{"steps": 9, "batch_size": 6, "workers": 0, "optimizer": optimizer, **settings}),
                validate=lambda: Score(len(events) % 5, 0.0),
                on_event=lambda name, **values: events.append((name, values)),
                checkpoints=checkpoints,
            )
        except (UserError, Stopped) as error:
            outcome = error
        return torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()]), events, outcome

    return run


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("settings", [{"log_every": 4}, {"log_every": 100, "validate_every": 3}], ids=str)
@pytest.mark.parametrize("bad_steps", [(1,), (3, 4), (1, 2, 5, 8, 9)], ids=str)
def test_late_is_as_if_it_had_looked_first(trained, optimizer, settings, bad_steps):
    expected, events, outcome = trained(LooksFirst, bad_steps, optimizer=optimizer, **settings)
    assert outcome.skipped_steps == len(bad_steps)
    assert [values["step"] for name, values in events if name == "step" and values["skipped"]] == list(bad_steps)
    for way in (GuardedOptimizer, Late):
        weights, same_events, same_outcome = trained(way, bad_steps, optimizer=optimizer, **settings)
        assert torch.equal(weights, expected)
        assert repr(same_events) == repr(events), "not ==: a loss that is NaN"
        assert repr(same_outcome) == repr(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [4, 100])
@pytest.mark.parametrize("first", [1, 3])
def test_row_11_ten_in_a_row_name_the_files_of_the_tenth(trained, first, log_every):
    bad_steps = range(first, 40)
    expected, events, error = trained(LooksFirst, bad_steps, steps=30, log_every=log_every)
    assert isinstance(error, UserError) and ".png" in str(error)
    weights, same_events, same_error = trained(Late, bad_steps, steps=30, log_every=log_every)
    assert str(same_error) == str(error)
    assert torch.equal(weights, expected)
    assert repr(same_events) == repr(events)


@pytest.mark.slow
def test_row_31_out_of_memory_does_not_lose_the_step_before(trained):
    def full(number):
        if number == 2 * 4 + 1:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    expected, events, error = trained(LooksFirst, (4,), at_call=full, log_every=100)
    weights, same_events, same_error = trained(Late, (4,), at_call=full, log_every=100)
    assert "out of memory at step 5" in str(error) and str(same_error) == str(error)
    assert torch.equal(weights, expected)
    assert [values["step"] for name, values in events if name == "step"] == [1, 4]
    assert repr(same_events) == repr(events)


@pytest.mark.slow
@pytest.mark.parametrize("bad_steps", [(1,), (4, 5)], ids=str)
@pytest.mark.parametrize("stop_at", [1, 5])
def test_row_32_what_a_signal_saves_knows_of_its_step(trained, tmp_path, bad_steps, stop_at):
    """Checkpoints of every other step, and of the one in which the signal came: byte for byte the same."""

    def stop(number):
        if number == 2 * stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    found, handler = {}, signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for way in (LooksFirst, Late):
            folder = tmp_path / way.__name__
            weights, _, error = trained(
                way, bad_steps, at_call=stop, checkpoints=CheckpointConfig(folder), save_every=2, log_every=100
            )
            assert isinstance(error, Stopped)
            files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            assert any(f"step-{stop_at:06}" in name for name in files)
            found[way] = weights, files
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert torch.equal(found[LooksFirst][0], found[Late][0])
    assert found[LooksFirst][1] == found[Late][1]
