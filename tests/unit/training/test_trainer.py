"""The loop: every field of its config changes what happens; the held-out data never comes near it."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import Diverged, Notice, UserError
from disam_peft.evaluation.protocols import Score
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training.accelerator import check_precision, start_accelerator
from disam_peft.training.fit import fit
from disam_peft.training.trainer import Trainer, rho_factors
from tests.helpers.losses import replace_loss

SETTINGS = {"steps": 3, "batch_size": 6, "workers": 0, "log_every": 1}


@pytest.fixture
def dataset(domains_folder):
    return load(DataConfig(root=domains_folder))


@pytest.fixture
def make_classifier(openclip_name, dataset):
    def make(config=None):
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
        return ClipClassifier(backbone, build_adapter(config or LoraAdapterConfig(seed=0), backbone, prompts), prompts)

    return make


@pytest.fixture
def trained(make_classifier, dataset):
    """Trains afresh and gives (trained parameters as one vector, events, result)."""

    def run(
        *, method=None, objective=None, adapter=None, samples=None, seed=0, augment=None, validate=None, **settings
    ):
        classifier, events = make_classifier(adapter), []
        result = fit(
            classifier,
            samples if samples is not None else dataset,
            method=method,
            objective=objective,
            config=TrainConfig(**{**SETTINGS, **settings}),
            augment=augment,
            seed=seed,
            validate=validate,
            on_event=lambda name, **values: events.append((name, values)),
        )
        vector = torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()])
        return vector, events, result

    return run


@pytest.mark.slow
def test_the_loss_on_the_sources_falls(trained):
    _, events, result = trained(steps=60, batch_size=12, learning_rate=1e-2, augment=AugmentConfig(kind="none"))
    losses = [values["loss"] for name, values in events if name == "step"]
    assert len(losses) == 60
    assert sum(losses[-10:]) / 10 < 0.7 * sum(losses[:5]) / 5
    assert (result.first_loss, result.last_loss) == (losses[0], losses[-1])
    assert result.best_step == 60


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(trained):
    dropout = LoraAdapterConfig(seed=0, dropout=0.3)
    first, again, other = (trained(adapter=dropout, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_bit(trained):
    dropout = LoraAdapterConfig(towers=["image", "text"], seed=0, dropout=0.3)
    assert torch.equal(trained(adapter=dropout)[0], trained(adapter=dropout, gradient_checkpointing=True)[0])


def test_gradient_checkpointing_says_where_it_does_nothing(trained):
    with pytest.warns(UserWarning, match="gradient_checkpointing=true does nothing here"):
        trained(adapter=LinearProbeConfig(), gradient_checkpointing=True, steps=1)


@pytest.mark.slow
def test_workers_do_not_change_the_result(trained):
    assert torch.equal(trained()[0], trained(workers=2)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 9},
        {"sampling": "proportional"},
        {"class_sampling": "balanced"},
        {"optimizer": "sgd"},
        {"learning_rate": 2e-3},
        {"weight_decay": 0.5},
        {"schedule": "constant"},
        {"warmup_steps": 2},
        {"clip_norm": 1e-3, "optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.5},
        {"mixed_precision": "bf16"},
        {"method": MethodConfig(name="erm")},
        {"method": MethodConfig(name="sam")},
        {"method": MethodConfig(rho=0.5)},
        {"method": MethodConfig(variance_weight=0.7)},
        {"method": MethodConfig(adaptive=True, rho=1.0)},
        {"method": MethodConfig(variance_scale="relative")},
        {"method": MethodConfig(variance_form="entropic")},
        {"method": MethodConfig(name="disam_gsam")},
        {"method": MethodConfig(name="disam_sagm")},
        {"method": MethodConfig(rho_factors={"*lora_A*": 0.5})},
        {"method": MethodConfig(every=2)},
        {"augment": AugmentConfig(kind="none")},
    ],
    ids=str,
)
def test_every_setting_changes_the_weights(trained, change):
    base = {"optimizer": "sgd"} if change.get("optimizer") == "sgd" and len(change) > 1 else {}
    before = trained(**base)[0]
    AcceleratorState._reset_state()  # Accelerate keeps one precision per process
    after = trained(**change)[0]
    AcceleratorState._reset_state()
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_a_pixel_store_feeds_the_same_samples_from_stored_images(trained, domains_folder):
    stored = load(DataConfig(root=domains_folder, pixel_store=36))
    weights, events, _ = trained(samples=stored)
    from_files, same_batches, _ = trained()
    assert not torch.equal(weights, from_files), "squeezed to 36 pixels, augmented on tensors"
    assert events[0][1]["loss"] == pytest.approx(same_batches[0][1]["loss"], rel=0.2)


@pytest.mark.slow
def test_row_25_erm_sam_and_disam_agree_where_they_must(trained):
    erm = trained(method=MethodConfig(name="erm", rho=0.3))[0]
    assert torch.equal(erm, trained(method=MethodConfig(name="disam", rho=0.0))[0])
    sam = trained(method=MethodConfig(name="sam", variance_weight=0.5))[0]
    assert torch.equal(sam, trained(method=MethodConfig(name="disam", variance_weight=0.0))[0])
    assert torch.equal(sam, trained(method=MethodConfig(name="gsam", alpha=0.0))[0])
    for name in ("gsam", "sagm"):
        plain = trained(method=MethodConfig(name=name))[0]
        assert torch.equal(plain, trained(method=MethodConfig(name=f"disam_{name}", variance_weight=0.0))[0])
        assert not torch.equal(plain, trained(method=MethodConfig(name=f"disam_{name}"))[0])
        assert not torch.equal(plain, trained(method=MethodConfig(name=name, alpha=0.7))[0]), "the alpha"
    assert not torch.equal(erm, sam)


@pytest.mark.slow
def test_row_02_one_source_domain_with_disam_warns_once_and_equals_sam(trained, dataset):
    art = dataset.with_domains(["art"])
    with pytest.warns(UserWarning, match=r"one source domain \('art'\).*equals sam bit for bit") as caught:
        disam = trained(samples=art)[0]
    assert len([w for w in caught if "one source domain" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(disam, trained(samples=art, method=MethodConfig(name="sam"))[0])


def test_records_name_the_domains_and_weights_sum_to_one(trained):
    _, events, _ = trained(log_ascent_cosine=True, method=MethodConfig(variance_weight=0.2))
    step = events[0][1]
    assert set(step["domain_loss"]) == {"art", "cartoon", "photo"}
    assert sum(step["domain_weight"].values()) == pytest.approx(1, abs=1e-12)
    assert 0 < step["ascent_cosine"] < 1
    assert step["ascent_norm"] > 0
    assert events[-1] == (
        "trained",
        {
            "best_step": 3,
            "steps": 3,
            "skipped_steps": 0,
            "one_domain_steps": 0,
            "zero_ascent_steps": 0,
            "negative_domain_weights": 0,
            "negative_by_variance": 0,
            "domain_weights": 9,
        },
    )


def test_row_27_negative_domain_weights_are_counted_and_warned_about(trained):
    with pytest.warns(UserWarning, match=r"of the domain weights were negative.*lower method.variance_weight=50"):
        _, events, _ = trained(method=MethodConfig(variance_weight=50.0))
    assert events[-1][1]["negative_domain_weights"] > 0
    assert any(weight < 0 for weight in events[0][1]["domain_weight"].values()), "not clamped"


def test_a_weight_that_a_penalty_makes_negative_is_not_blamed_on_the_variance(trained):
    vrex = ObjectiveConfig.model_validate({"penalties": [{"kind": "vrex", "weight": 50.0}]})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*domain weights were negative")
        _, events, _ = trained(method=MethodConfig(variance_weight=1e-3), objective=vrex)
    assert events[-1][1]["negative_domain_weights"] > 0
    assert events[-1][1]["negative_by_variance"] == 0
    told = "because of the variance.*more from a domain than its weight in the objective.*variance_weight=500"
    with pytest.warns(UserWarning, match=told):
        trained(method=MethodConfig(variance_weight=500.0), objective=vrex)


def test_a_method_that_cannot_act_is_said_once(trained):
    with pytest.warns(Notice) as caught:
        trained(steps=1, method=MethodConfig(variance_weight=1e-6, rho=100.0))
    texts = [str(w.message) for w in caught if w.category is Notice]
    assert len(texts) == 2
    assert "method.rho=100 is above the norm of all trained weights together" in texts[0]
    assert "at the start of the run" in texts[0] and "the run was SAM for all practical purposes" in texts[1]


def test_records_have_the_value_of_each_term(trained):
    terms = {"penalties": [{"kind": "coral", "weight": 2.0}, {"kind": "groupdro"}], "anchors": [{"kind": "weights"}]}
    _, events, _ = trained(objective=ObjectiveConfig.model_validate(terms | {"mean_over": "samples"}))
    steps = [values for name, values in events if name == "step"]
    assert [list(step["terms"]) for step in steps] == [["coral", "groupdro", "weights"]] * 3
    for step in steps:
        of = step["terms"]
        assert step["objective"] == pytest.approx(2.0 * of["coral"] + of["groupdro"] + 0.1 * of["weights"], rel=1e-6)
        assert set(step["groupdro_q"]) == set(step["domain_loss"])
        assert sum(step["groupdro_q"].values()) == pytest.approx(1, abs=1e-12)
    assert steps[0]["terms"]["weights"] == 0 < steps[2]["terms"]["weights"], "at w, before the update"
    assert steps[0]["groupdro_q"] != steps[2]["groupdro_q"]
    assert "terms" not in trained()[1][0][1]


def test_the_best_state_by_validation_is_kept_the_first_of_equals(make_classifier, dataset):
    classifier, states = make_classifier(), []
    scores = iter([Score(0.5, -1.0), Score(0.8, -1.0), Score(0.8, -1.0), Score(0.7, 0.0)])

    def validate():
        assert classifier.trainable(), "in the present state"
        states.append([p.detach().clone() for p in classifier.trainable().values()])
        return next(scores)

    saved = []
    result = fit(
        classifier,
        dataset,
        config=TrainConfig(**{**SETTINGS, "steps": 8}, validate_every=2),
        validate=validate,
        on_best=lambda weights: saved.append(len(states)),
    )
    assert (result.best_step, result.best_score) == (4, Score(0.8, -1.0))
    assert saved == [1, 2]
    final = list(classifier.trainable().values())
    assert all(torch.equal(a, b) for a, b in zip(final, states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(final, states[3], strict=True))


def test_row_11_losses_that_stay_nan_stop_the_run_and_name_the_files(make_classifier, dataset):
    classifier = make_classifier(LinearProbeConfig())
    with torch.no_grad():
        next(iter(classifier.trainable().values())).fill_(math.nan)
    events = []
    with pytest.raises(UserError, match=r"10 steps in a row.*lower train.learning_rate[\s\S]*\.png"):
        fit(
            classifier,
            dataset,
            config=TrainConfig(**{**SETTINGS, "steps": 30}),
            on_event=lambda name, **values: events.append(values),
        )
    assert [values["skipped"] for values in events] == [True] * 9, "the tenth raises"


def test_row_75_a_run_whose_every_step_was_skipped_is_an_error_and_nothing_is_saved(make_classifier, dataset):
    classifier = make_classifier(LinearProbeConfig())
    with torch.no_grad():
        next(iter(classifier.trainable().values())).fill_(math.nan)
    saved = []
    with pytest.raises(Diverged, match=r"nothing was trained: all 4 steps .* try a lower train.learning_rate"):
        fit(
            classifier,
            dataset,
            config=TrainConfig(**{**SETTINGS, "steps": 4, "validate_every": 1}),
            validate=lambda: 0.5,
            on_best=saved.append,
        )
    assert saved == []


def test_a_skipped_step_changes_nothing_and_does_not_advance_the_schedule(make_classifier, dataset, monkeypatch):
    calls = []

    def sometimes_nan(logits, labels):
        calls.append(1)
        return cross_entropy(logits, labels) * (math.nan if len(calls) in (3, 4) else 1.0)  # both passes of step 2

    replace_loss(sometimes_nan, monkeypatch)
    events = []
    result = fit(
        make_classifier(),
        dataset,
        config=TrainConfig(**SETTINGS),
        on_event=lambda name, **values: events.append((name, values)),
    )
    rates = [values["learning_rate"] for name, values in events if name == "step"]
    assert result.skipped_steps == 1
    assert rates[1] == rates[2] < rates[0]


def test_row_31_out_of_memory_leaves_the_weights_alone_and_says_what_to_do(make_classifier, dataset, monkeypatch):
    calls = []

    def exhausted(logits, labels):
        calls.append(1)
        if len(calls) == 4:  # pass 2 of the second step
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return cross_entropy(logits, labels)

    replace_loss(exhausted, monkeypatch)
    classifier, states = make_classifier(), []
    config = TrainConfig(**SETTINGS)

    def watch(name, **values):
        states.append([p.detach().clone() for p in classifier.trainable().values()])

    remedy = r"out of memory at step 2.*20 GiB.*Set train\.gradient_accumulation_steps=2.*or lower train\.batch_size"
    remedy += r".*train\.gradient_checkpointing=true"
    with pytest.raises(UserError, match=remedy):
        fit(classifier, dataset, config=config, on_event=watch)
    final = list(classifier.trainable().values())
    assert all(torch.equal(a, b) for a, b in zip(final, states[0], strict=True)), "as after step 1"


def test_row_05_a_batch_smaller_than_the_domains_is_an_error(trained):
    with pytest.raises(UserError, match="use at least 3"):
        trained(batch_size=2)


def test_row_23_nothing_to_train_is_an_error(openclip_name, dataset):
    backbone = load_backbone(BackboneConfig(name=openclip_name))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    with pytest.raises(UserError, match="no adapter with trainable parameters"):
        fit(ClipClassifier(backbone, None, prompts), dataset)


def test_row_30_precisions_that_the_device_does_not_have():
    with pytest.raises(UserError, match="fp16 does not exist on a CPU; use bf16"):
        start_accelerator("fp16")
    check_precision("bf16", torch.device("cpu"))


@pytest.mark.slow
def test_row_85_a_launch_that_would_shard_the_model_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"launched with FSDP.*train\.gradient_checkpointing=true"):
        start_accelerator("no")


def test_another_precision_in_the_same_process_is_an_error_that_says_so():
    script = (
        "from disam_peft.training.accelerator import start_accelerator\n"
        "start_accelerator('no'), start_accelerator('no')\n"
        "start_accelerator('bf16')"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(
        "disam_peft.errors.UserError: train.mixed_precision=bf16: this process"
    )


def test_row_30_bf16_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16; use fp16"):
        check_precision("bf16", torch.device("cuda"))


@pytest.mark.slow
def test_a_schedule_of_rho_and_lambda_takes_its_values_step_by_step(trained):
    linear = {"kind": "linear", "from": 0.0, "to": 0.3}
    _, events, _ = trained(method=MethodConfig.model_validate({"rho": linear}), steps=4)
    steps = [values for name, values in events if name == "step"]
    assert [values["rho"] for values in steps] == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-15)
    assert steps[0]["perturbed_loss"] == steps[0]["loss"], "rho 0: the plain gradient"
    assert all(values["perturbed_loss"] > values["loss"] for values in steps[1:])
    constant = trained(method=MethodConfig(rho=0.2, variance_weight=0.6))[0]
    same = {"rho": {**linear, "from": 0.2, "to": 0.2}, "variance_weight": {**linear, "from": 0.6, "to": 0.6}}
    assert torch.equal(trained(method=MethodConfig.model_validate(same))[0], constant)
    falling = {"rho": 0.2, "variance_weight": {**linear, "from": 0.6, "to": 0.0}}
    assert not torch.equal(trained(method=MethodConfig.model_validate(falling))[0], constant)


@pytest.mark.slow
def test_steps_without_a_perturbation_are_erm(trained):
    """The first half is that of a run of ERM, bit for bit."""
    half = MethodConfig.model_validate({"from": 0.5, "rho": 0.3})
    (_, events, _), (_, of_erm, _) = trained(method=half, steps=4), trained(method=MethodConfig(name="erm"), steps=4)
    steps, erm = ([values for name, values in found if name == "step"] for found in (events, of_erm))
    assert [values["rho"] for values in steps] == [0, 0, 0.3, 0.3] and "rho" not in erm[0]
    assert [values["perturbed_loss"] > values["loss"] for values in steps] == [False, False, True, True]
    assert [a["loss"] == b["loss"] for a, b in zip(steps, erm, strict=True)] == [True, True, True, False]
    trained_events = dict(event for event in events if event[0] == "trained")
    assert trained_events["trained"]["zero_ascent_steps"] == 0


def test_rho_follows_the_learning_rate_of_the_step_to_be_taken(trained):
    method = MethodConfig.model_validate({"rho": {"kind": "follow_lr", "max": 0.3, "min": 0.1}})
    _, events, _ = trained(method=method, steps=4, learning_rate=2e-3, warmup_steps=1)
    steps = [values for name, values in events if name == "step"]
    assert [values["rho"] for values in steps] == pytest.approx(
        [0.1 + 0.2 * values["learning_rate"] / 2e-3 for values in steps], rel=1e-14
    )
    assert steps[0]["rho"] == pytest.approx(0.3) and steps[-1]["rho"] < 0.2


def test_patterns_of_names_give_factors_on_rho():
    tensors = {name: torch.ones(1) for name in ("visual.0.lora_A", "visual.0.lora_B", "text.0.lora_A")}
    found = rho_factors(tensors, {"visual.*_A": 0.5, "text.*": 0.0, "*_B": 1.0})
    assert found == {tensors["visual.0.lora_A"]: 0.5, tensors["text.0.lora_A"]: 0.0}
    with pytest.raises(UserError, match=r"no trained tensor has a name like 'vision\.\*'.*the 3 names are visual\.0"):
        rho_factors(tensors, {"vision.*": 0.5})
    with pytest.raises(UserError, match=r"text\.0\.lora_A matches 'text\.\*' and '\*_A'"):
        rho_factors(tensors, {"text.*": 0.5, "*_A": 2.0})


def test_factors_on_rho_are_those_of_the_step(make_classifier, dataset):
    classifier = make_classifier()
    names = list(classifier.trainable())
    method = MethodConfig(rho_factors={names[0]: 0.25})
    config = TrainConfig(**SETTINGS)
    trainer = Trainer(classifier, dataset, method, ObjectiveConfig(), config, (), start_accelerator(), print)
    assert trainer.disam.rho_factors == {classifier.trainable()[names[0]]: 0.25}
