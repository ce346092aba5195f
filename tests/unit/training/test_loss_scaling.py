"""The loop under a loss scaler, in float32 arithmetic: what a GPU's fp16 asks of it, shown on a CPU."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.average import BmaConfig, EmaConfig, SwaConfig, SwadConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.averages.bma import beta_weight
from disam_peft.training.averages.ema import ema
from disam_peft.training.averages.swad import swad
from disam_peft.training.fit import fit
from disam_peft.training.optimizers import learning_rate_factor
from disam_peft.training.selection import Validation
from tests.helpers.losses import replace_loss
from tests.helpers.overflow import Overflow

STEPS, BAD_STEP, SCALE = 6, 4, 2.0**16


class WatchedScaler(torch.amp.GradScaler):
    """Keeps what every step found and left: (weights, optimizer's state, scale) twice."""

    def __init__(self):
        super().__init__("cpu", init_scale=SCALE)
        self.steps = []

    def _look(self, optimizer):
        weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        state = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return weights, state, self.get_scale()

    def step(self, optimizer, *arguments, **options):
        self._optimizer, self._before = optimizer, self._look(optimizer)
        return super().step(optimizer, *arguments, **options)

    def update(self, new_scale=None):
        super().update(new_scale)
        self.steps.append((self._before, self._look(self._optimizer)))


@pytest.fixture
def scaled(monkeypatch):
    accelerator, scaler = start_accelerator("no"), WatchedScaler()
    accelerator.scaler, accelerator.native_amp = scaler, True
    # Accelerate unscales where it believes in fp16; the arithmetic stays as it is
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    monkeypatch.setattr(accelerator, "autocast", nullcontext)
    return accelerator, scaler


def same_bits(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


FOLLOWS = {"name": "disam_gsam", "rho": {"kind": "follow_lr", "max": 0.1, "min": 0.02}}


@pytest.fixture
def overflowing_run(scaled, domains_folder, openclip_name, monkeypatch):
    """Train with one overflow, in a pass of step ``BAD_STEP``: what ``fit`` gives, and the values of the steps."""
    accelerator, _ = scaled

    def run(bad_pass, where, method, **options):
        calls, steps = [], []

        def overflowing(logits, labels):
            calls.append(1)
            loss_B = cross_entropy(logits, labels)
            if len(calls) != 2 * (BAD_STEP - 1) + bad_pass:
                return loss_B
            return loss_B * torch.inf if where == "loss" else Overflow.apply(loss_B)

        replace_loss(overflowing, monkeypatch)
        dataset = load(DataConfig(root=domains_folder))
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
        classifier = ClipClassifier(backbone, build_adapter(LoraAdapterConfig(seed=0), backbone, prompts), prompts)
        result = fit(
            classifier,
            dataset,
            method=MethodConfig.model_validate(method),
            config=TrainConfig(steps=STEPS, batch_size=6, workers=0, log_every=1, validate_every=1),
            augment=AugmentConfig(kind="none"),
            accelerator=accelerator,
            on_event=lambda name, **values: steps.append(values) if name == "step" else None,
            **options,
        )
        return result, steps

    return run


@pytest.mark.parametrize("bad_pass", [1, 2], ids=["pass 1", "pass 2"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(
    "method",
    [
        {},
        pytest.param(FOLLOWS, marks=pytest.mark.slow),
        pytest.param({"name": "disam_sagm", "variance_form": "entropic"}, marks=pytest.mark.slow),
    ],
    ids=["disam", "gsam", "sagm"],
)
def test_row_29_an_overflow_in_the_loop_changes_nothing_but_the_scale(bad_pass, where, method, scaled, overflowing_run):
    _, scaler = scaled
    result, steps = overflowing_run(bad_pass, where, method)
    rates = [values["learning_rate"] for values in steps]
    assert len(scaler.steps) == len(rates) == STEPS and result.skipped_steps == 1
    for step, ((weights, state, scale), (weights_after, state_after, scale_after)) in enumerate(scaler.steps, start=1):
        if step == BAD_STEP:
            assert same_bits(weights, weights_after) and same_bits(state, state_after)
            assert scale_after == scale / 2 == SCALE / 2, "halved once, not once per pass"
        else:
            assert not same_bits(weights, weights_after)
            assert scale_after == scale
    kept = rates[BAD_STEP - 1]
    assert rates[BAD_STEP - 2] > kept == rates[BAD_STEP] > rates[BAD_STEP + 1], "the schedule waits for the step"
    if method is FOLLOWS:
        planned = [learning_rate_factor(TrainConfig(steps=STEPS), step) for step in range(STEPS)]
        assert [values["rho"] for values in steps] == pytest.approx([0.02 + 0.08 * rate for rate in planned])


@pytest.mark.parametrize("bad_pass", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_row_29_a_step_that_the_scaler_skipped_is_in_no_average(bad_pass, scaled, overflowing_run):
    """Each average is of the weights after the steps that were taken, and beta weights are those of their steps."""
    window = {"n_converge": 1, "n_tolerance": 2}
    averages = [EmaConfig(decay=0.5), SwaConfig(start=0.0), BmaConfig(), SwadConfig(**window)]
    averages.append(SwadConfig(**window, variant="published"))
    judged = []

    def validate():
        judged.append(1)  # the last state that is judged is the best one
        return Validation((float(len(judged)),), {}, loss=0.5)

    result, _ = overflowing_run(bad_pass, "gradient", {}, averages=averages, validate=validate)
    steps = scaled[1].steps
    start_P = flat(steps[0][0][0])
    rows_TP = torch.stack([flat(after) for number, (_, (after, *_)) in enumerate(steps, start=1) if number != BAD_STEP])
    weights_T = torch.tensor([beta_weight(step, 0.5, STEPS) for step in range(STEPS + 1) if step != BAD_STEP])
    expected = {
        "raw": rows_TP[-1],
        "ema": ema(rows_TP, 0.5)[-1],
        "swa": rows_TP.mean(dim=0),
        "bma": (weights_T[:, None] * torch.cat([start_P[None], rows_TP])).sum(dim=0) / weights_T.sum(),
        "swad": rows_TP.mean(dim=0),
        "swad_2": swad(rows_TP, [0.5] * len(rows_TP), eval_every=1, **window, variant="published").final,
    }
    assert set(result.states) == set(expected)
    for name, expected_P in expected.items():
        found_P = flat(result.states[name].tensors.values())
        assert (found_P - expected_P).abs().max() <= 1e-6 * expected_P.abs().max(), name
    assert (expected["swa"] - expected["ema"]).abs().max() > 1e-5


def flat(tensors):
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors])
