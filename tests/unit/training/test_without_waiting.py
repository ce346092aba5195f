"""On a GPU no step waits for the device, unless it writes a record or validates: waiting is an error there."""

from functools import partial
from itertools import count

import pytest
import torch

from disam_peft.config.data import AugmentConfig, MixupConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.loading import feature_batches
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training import fit as loop
from disam_peft.training import trainer
from disam_peft.training.guarded_optimizer import GuardedOptimizer
from tests.helpers import accumulated_runs
from tests.helpers.guarded_optimizers import LooksFirst
from tests.helpers.losses import replace_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, FIRST = 8, 4  # the steps before warm up, the last one is recorded
METHODS = {
    "disam": MethodConfig(rho=0.3, variance_weight=0.6),
    "sam": MethodConfig(name="sam", rho=0.3),
    "erm": MethodConfig(name="erm"),
    "adaptive": MethodConfig(rho=1.0, variance_weight=0.6, adaptive=True),
    "gsam": MethodConfig(name="disam_gsam", rho=0.3, variance_scale="relative", rho_factors={"*": 0.5}),
    "sagm": MethodConfig(name="disam_sagm", rho=0.3, variance_form="entropic"),
    "changes": MethodConfig.model_validate({"rho": {"kind": "follow_lr", "max": 0.3}, "every": 2, "from": 0.2}),
}


@pytest.fixture
def strict(monkeypatch):
    """From ``FIRST`` to the step before the last, whoever waits for the device gets an error. Gives those steps."""
    real, steps = loop.training_batches, []

    def feed(*arguments, **options):
        batches = iter(real(*arguments, **options))
        for step in range(1, STEPS + 1):
            is_strict = FIRST <= step < STEPS
            torch.cuda.set_sync_debug_mode("error" if is_strict else "default")
            steps.extend([step] if is_strict else [])
            yield next(batches)

    monkeypatch.setattr(loop, "training_batches", feed)
    yield steps
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def run(twins, domains_folder, monkeypatch):
    """``accumulated_runs.run`` with few records: (weights, events)."""
    monkeypatch.setattr(accumulated_runs, "METHODS", METHODS)

    def of(pieces=1, *, augmented=False, steps=STEPS, log_every=1000, **options):
        changes = {name: options.pop(name) for name in ("optimizer", "schedule") if name in options}
        changes |= {"log_every": log_every, "validate_every": 1000}
        monkeypatch.setattr(accumulated_runs, "TrainConfig", lambda **given: TrainConfig(**{**given, **changes}))
        if augmented:
            augment = partial(AugmentConfig, grayscale=0.5)
            monkeypatch.setattr(accumulated_runs, "AugmentConfig", lambda kind, mixup: augment(mixup=mixup))
        weights, events = accumulated_runs.run(twins, domains_folder, pieces, steps=steps, **options)
        assert weights.is_cuda and torch.isfinite(weights).all()
        return weights, events

    return of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw"},
        {"clip_norm": 0.01},
        {"method": "adaptive"},
        {"method": "erm"},
        {"method": "gsam"},
        {"method": "sagm"},
        {"method": "changes"},
        {"log_ascent_cosine": True},
        {"family": "transformers"},
        {"cell": "lora-dropout"},
        {"cell": "lora-both"},
        {"cell": "coop-shared"},
        {"cell": "probe-zero_shot"},
        {"augmented": True},
        {"source": "pixel store"},
        {"source": "pixel store", "augmented": True},
        {"mixup": MixupConfig()},
        {"source": "pixel store", "augmented": True, "mixup": MixupConfig()},
    ],
    ids=str,
)
def test_images(run, strict, options):
    run(**options)
    assert strict == list(range(FIRST, STEPS))


@pytest.mark.parametrize("where", ["resident", "read ahead"])
@pytest.mark.parametrize("cell", ["lora-image", "coop-shared", "probe-zero_shot"])
def test_stored_features(run, strict, where, cell, monkeypatch):
    fits = []
    monkeypatch.setattr(feature_batches, "_fits", lambda *of: fits.append(1) or where == "resident")
    run(source="feature store", cell=cell)
    assert strict and len(fits) == 1


@pytest.mark.parametrize("source", ["images", "pixel store", "feature store"])
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("two_phase", {"pieces": 4, "batch": 13}),
        ("per_domain", {"pieces": 3}),
        ("mean", {"pieces": 3, "method": "sam"}),
        ("two_phase", {"pieces": 4, "batch": 13, "method": "gsam"}),
        ("two_phase", {"pieces": 4, "batch": 13, "method": "changes"}),
        ("whole", {"pieces": 4, "cell": "coop-shared"}),
    ],
)
def test_accumulation(run, strict, source, way, options):
    _, events = run(source=source, **options)
    assert strict and events[0] == ("accumulation", {**events[0][1], "way": way})


def test_one_look_at_the_device_would_be_seen(run, strict, monkeypatch):
    monkeypatch.setattr(trainer, "GuardedOptimizer", LooksFirst)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        run()
    assert strict == [FIRST]


@pytest.mark.parametrize("bad_steps", [(), (1,), (3, 4), (1, 2, 5, 8)], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_late_is_as_if_it_had_looked_first(run, bad_steps, optimizer, monkeypatch):
    """SAM, whose weights of samples no order of additions can change."""
    found = []
    for way in (GuardedOptimizer, LooksFirst):
        calls = count(2)
        monkeypatch.setattr(trainer, "GuardedOptimizer", way)

        def sometimes_nan(logits, labels, calls=calls):
            return cross_entropy(logits, labels) * (float("nan") if next(calls) // 2 in bad_steps else 1.0)

        replace_loss(sometimes_nan, monkeypatch)
        weights, events = run(method="sam", optimizer=optimizer, log_every=3)
        rates = [(v["step"], v["learning_rate"], v["skipped"]) for name, v in events if name == "step"]
        found.append((weights, rates))
    (ours, our_rates), (theirs, their_rates) = found
    assert torch.equal(ours, theirs)
    assert our_rates == their_rates
    assert [step for step, _, skipped in our_rates if skipped] == list(bad_steps)


def test_every_source_gives_the_samples_of_the_others(run):
    """To rounding: the frozen part's, and that of sums over domains."""
    weights = [run(source=source, pieces=pieces)[0] for source in ("images", "feature store") for pieces in (1, 3, 4)]
    assert max((other - weights[0]).abs().max() for other in weights) <= 1e-9
