"""Averages beside the weights: every config has its class, names, standing in for the weights, and a whole run."""

from typing import get_args

import pytest
import torch

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.average import (
    AverageConfig,
    BmaConfig,
    EmaConfig,
    NoAverageConfig,
    SwaConfig,
    SwadConfig,
    kept_averages,
    named,
    times_judged,
    too_slow,
)
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.training.averages.weight_averages import AVERAGES, WeightAverages
from disam_peft.training.checkpoint.manager import CheckpointConfig
from disam_peft.training.fit import fit
from disam_peft.training.guarded_optimizer import StepOutcome
from disam_peft.training.selection import Validation


def test_the_union_of_configs_is_the_table():
    union = get_args(get_args(AverageConfig)[0])
    assert set(AVERAGES) == set(union) - {NoAverageConfig}
    assert [AVERAGES[config].kind for config in AVERAGES] == [
        config.model_fields["kind"].default for config in AVERAGES
    ]


def test_names_tell_averages_of_one_kind_apart():
    configs = kept_averages([EmaConfig(), NoAverageConfig(), EmaConfig(decay=0.5)])
    assert {name: config.decay for name, config in named(configs).items()} == {"ema": 0.999, "ema_2": 0.5}
    assert kept_averages(NoAverageConfig()) == []


def test_an_average_stands_in_for_the_weights_and_they_come_back_to_the_bit():
    w = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
    averages = WeightAverages([EmaConfig(decay=0.5)], [w], 2)
    for _ in range(2):
        with torch.no_grad():
            w += 0.3
        averages.update(StepOutcome(torch.tensor(True)))
    before = w.detach().clone()
    with pytest.raises(RuntimeError, match="interrupt"), averages.in_place_of_weights("ema"):
        assert (w.detach() - (before - 0.15)).abs().max() < 1e-6
        raise RuntimeError("interrupt")
    assert torch.equal(w.detach(), before)
    with averages.in_place_of_weights("raw"):
        assert torch.equal(w.detach(), before)


@pytest.fixture
def trained(openclip_name, domains_folder, tmp_path):
    """A short run with averages: (classifier, result, events, whose states were saved)."""
    dataset = load(DataConfig(root=domains_folder))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))

    def run(averages, validate=lambda classifier: 0.5, *, resume=False, cut_at=None, **settings):
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        adapter = build_adapter(LoraAdapterConfig(seed=0), backbone, prompts)
        classifier, events, saved = ClipClassifier(backbone, adapter, prompts), [], []

        def on_event(name, **values):
            events.append((name, values))
            if name == "step" and values["step"] == cut_at:
                raise InterruptedError

        values = {"steps": 6, "batch_size": 6, "workers": 0, "log_every": 1, "validate_every": 2, "learning_rate": 1e-2}
        result = fit(
            classifier,
            dataset,
            config=TrainConfig(**{**values, **settings}),
            averages=averages,
            validate=None if validate is None else lambda: validate(classifier),
            on_best=saved.append,
            on_event=on_event,
            checkpoints=CheckpointConfig(tmp_path / "saved", resume),
        )
        return classifier, result, events, saved

    return run


def vector(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def small(classifier):
    """Prefers small weights: those of an average that lags behind."""
    return -float(vector(classifier.trainable()).norm())


def test_a_decay_that_is_too_slow_for_the_run_is_said_with_one_that_fits():
    assert too_slow(EmaConfig(decay=0.999), 2000) is None
    assert too_slow(EmaConfig(decay=0.95), 40) is None
    message = too_slow(EmaConfig(), 40)
    assert message is not None
    assert "1 / (1 - decay) = 1,000 steps, and the run has 40: 96% of it stay" in message
    assert "decay=0.9 fits" in message and too_slow(EmaConfig(decay=0.9), 40) is None
    assert "the run has 1,999: 14% of it" in str(too_slow(EmaConfig(), 1999))
    assert "decay=0 fits" in str(too_slow(EmaConfig(), 3)) and too_slow(EmaConfig(decay=0), 3) is None


def test_a_run_warns_of_a_decay_that_is_too_slow(trained):
    with pytest.warns(UserWarning, match=r"decay=0.999 averages over .* and the run has 2: .*decay=0 fits"):
        trained([EmaConfig()], steps=2)


@pytest.mark.slow
def test_an_average_does_not_change_what_is_trained(trained):
    plain, _, events, _ = trained([])
    beside, result, more, _ = trained([EmaConfig(decay=0.9)])
    assert torch.equal(vector(plain.trainable()), vector(beside.trainable())), "raw, the first of equals"
    assert result.weights == "raw"
    assert [e for e in more if e[1].get("weights", "raw") == "raw" and e[0] != "trained"] == events[:-1]
    assert more[-1] == ("trained", {**events[-1][1], "weights": "raw"})


def test_the_better_of_weights_and_average_is_kept_and_both_can_be_judged(trained):
    classifier, result, events, saved = trained([EmaConfig(decay=0.99)], validate=small)
    assert result.weights == "ema" and saved[-1] == "ema"
    assert set(result.states) == {"raw", "ema"}
    assert torch.equal(vector(classifier.trainable()), vector(result.states["ema"].tensors))
    assert not torch.equal(vector(result.states["raw"].tensors), vector(result.states["ema"].tensors))
    by_weights = [values.get("weights", "raw") for name, values in events if name == "validation"]
    assert by_weights == ["raw", "ema"] * 3


def test_with_nobody_validating_the_last_weights_are_kept_and_the_average_is_there(trained):
    classifier, result, _, saved = trained([EmaConfig(decay=0.9)], validate=None)
    assert (result.weights, result.best_score, saved) == ("raw", None, [])
    assert torch.equal(vector(classifier.trainable()), vector(result.states["raw"].tensors))
    assert not torch.equal(vector(result.states["raw"].tensors), vector(result.states["ema"].tensors))


def test_swad_learns_the_losses_of_the_weights_and_is_judged_in_the_end(trained):
    """Six validations of the weights with falling, then rising losses; the seventh is that of the average."""
    losses, norms = [0.8, 0.5, 0.6, 0.7, 0.8, 0.6], []

    def validate(classifier):
        norms.append(small(classifier))
        return Validation((0.5,), {"score": 0.5}, loss=losses[len(norms) - 1] if len(norms) <= 6 else 9.0)

    config = SwadConfig(n_converge=2, n_tolerance=2, tolerance_ratio=0.2)
    _, result, events, _ = trained([config], validate=validate, validate_every=1)
    judged = [(values["step"], values.get("weights", "raw")) for name, values in events if name == "validation"]
    assert judged == [*((step, "raw") for step in range(1, 7)), (6, "swad")]
    [told] = [values for name, values in events if name == "average"]
    assert told == {
        "weights": "swad",
        "converge_step": 2,
        "dead_at_step": 5,
        "start_step": 2,
        "end_step": 3,
        "averaged": 2,
    }
    assert norms[6] not in norms[:6] and set(result.states) == {"raw", "swad"}


@pytest.mark.parametrize(
    ("validate", "told"),
    [(None, ", and nobody validates"), (lambda classifier: 0.5, ".* selection.Validation with loss=")],
)
def test_swad_without_a_validation_loss_is_an_error(trained, validate, told):
    with pytest.raises(UserError, match=f"average swad needs the validation loss{told}"):
        trained([EmaConfig(), SwadConfig()], validate=validate)


def test_averages_of_all_kinds_side_by_side_are_judged_when_they_say(trained):
    def validate(classifier):
        return Validation((small(classifier),), {"score": small(classifier)}, loss=0.5)

    averages = [EmaConfig(), SwaConfig(start=0.5, judged="always"), BmaConfig(), SwadConfig(n_converge=2)]
    _, result, events, _ = trained(averages, validate=validate)
    judged = [(values["step"], values.get("weights", "raw")) for name, values in events if name == "validation"]
    assert judged == [
        *[(2, "raw"), (2, "ema")],
        *[(4, "raw"), (4, "ema"), (4, "swa")],
        *[(6, "raw"), (6, "ema"), (6, "swa"), (6, "bma"), (6, "swad")],
    ]
    foretold = {name: times_judged(config, 6, 2) for name, config in named(averages).items()}
    assert foretold == {name: [weights for _, weights in judged].count(name) for name in foretold}
    assert len({round(float(vector(state.tensors).norm()), 6) for state in result.states.values()}) == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice")
def test_a_run_with_averages_goes_on_in_the_same_bits(trained, tmp_path):
    averages = [EmaConfig(decay=0.9), EmaConfig(decay=0.5)]
    _, expected, events, _ = trained(averages, validate=small)
    for path in (tmp_path / "saved").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(InterruptedError):
        trained(averages, validate=small, cut_at=5)
    _, result, more, _ = trained(averages, validate=small, resume=True)
    assert more == events[-len(more) :] and more[0][1]["step"] == 5
    assert result == expected
    assert all(
        torch.equal(vector(result.states[name].tensors), vector(expected.states[name].tensors))
        for name in ("raw", "ema", "ema_2")
    )


@pytest.mark.slow
def test_row_38_a_checkpoint_with_other_averages_is_refused(trained):
    with pytest.raises(InterruptedError):
        trained([EmaConfig()], cut_at=5)
    with pytest.raises(UserError, match="is of another run: its averages differ"):
        trained([], resume=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice")
def test_what_was_saved_last_is_what_is_chosen_also_in_a_tie_and_after_a_resume(trained):
    """raw draws level with an earlier state of the average: the first of equals stays, on the disk as in the result."""
    scores = iter([0.5, 0.6, 0.5, 0.7, 0.7, 0.6])
    _, result, _, saved = trained([EmaConfig(decay=0.5)], validate=lambda classifier: next(scores))
    assert (result.weights, result.best_step, saved) == ("ema", 4, ["raw", "ema", "ema"])
    _, resumed, _, again = trained([EmaConfig(decay=0.5)], resume=True)
    assert (resumed.weights, resumed.best_step, again) == ("ema", 4, ["ema"])
