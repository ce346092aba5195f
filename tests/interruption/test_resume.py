"""A run that was interrupted and resumed ends in the same files as one that was not, to the last bit."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.records import append_event
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.penalties import FishrConfig, GroupDROConfig, IRMConfig, VRexConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.disam.perturbation import AscentDirection
from disam_peft.errors import Notice, UserError
from disam_peft.evaluation.protocols import Score
from disam_peft.experiments.run_folder import is_finished, plan
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.checkpoint import storage as checkpoints
from disam_peft.training.checkpoint.manager import CheckpointConfig
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from disam_peft.training.fit import fit
from disam_peft.training.guarded_optimizer import GuardedOptimizer
from tests.helpers.interrupted import ended, ends_itself, ends_itself_at_a_write, result, saved
from tests.helpers.terms import COMBINED

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="processes are forked and killed as POSIX systems do it"),
    pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice"),
]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_row_33_killed_again_and_again_a_run_ends_in_the_same_bits(finished, make_recipe, start, workers):
    changes = {"train": {"workers": workers}}
    began = time.monotonic()
    expected = finished(**changes)
    duration, rng = time.monotonic() - began, random.Random(workers)
    kills = {"perturbed": 0, "saving": 0, "any time": 0}
    for _ in range(4):
        recipe = make_recipe(**changes)
        for kind in kills:  # each goes on from what the one before left
            where = {
                "perturbed": (AscentDirection, "add_", rng.randint(1, 4)),
                "saving": (checkpoints, "write_through", rng.randint(1, 6)),  # three files each
            }.get(kind)
            if where is not None:
                pid = start(recipe, ends_itself(*where))
            else:
                pid = start(recipe)
                time.sleep(rng.uniform(0, duration / 2))  # it goes on in the middle, so it takes less than a whole run
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (0, -signal.SIGKILL)
            kills[kind] += code == -signal.SIGKILL
        assert ended(start(recipe)) == 0
        assert result(recipe) == expected
        shutil.rmtree(recipe.output)
    assert kills["perturbed"] >= 3 and kills["saving"] >= 3 and sum(kills.values()) >= 10, kills


# Five steps into the run Fishr begins to count; its averages are taken from the first step on.
WITH_STATE = ObjectiveConfig(
    penalties=[GroupDROConfig(eta=0.5), FishrConfig(weight=1e6, anneal=5, ema=0.8), IRMConfig(weight=3.0, anneal=7)]
)
AVERAGES = [
    {"kind": "ema", "decay": 0.8},
    {"kind": "swa", "start": 0.25, "every": 2, "judged": "always"},
    {"kind": "bma"},
    {"kind": "swad", "n_converge": 1, "n_tolerance": 2, "tolerance_ratio": 2.0},
    {"kind": "swad", "n_converge": 1, "n_tolerance": 2, "tolerance_ratio": 2.0, "variant": "published"},
]
"""Of each kind with a state, in the middle of a window."""

SMALL = {"samples": 2, "ascent_steps": 1, "hessian_iterations": 3, "slice_points": 3}
"""As little of sharpness as there can be."""

LORA = {"kind": "lora", "blocks": {"last": 1}, "rank": 2, "dropout": 0.3}


@pytest.mark.slow
def test_row_60_killed_before_any_write_at_the_end_of_a_run_it_is_completed(finished, make_recipe, start):
    """The folder is that of a run which was killed right after training; each child goes on from a copy of it."""
    changes = {"train": {"steps": 2, "save_every": 2}, "evaluation": {"sharpness": SMALL}}
    expected = finished(**changes)
    recipe = make_recipe(**changes)
    folder = recipe.folder("photo")
    assert ended(start(recipe, ends_itself_at_a_write(recipe, 1))) == -signal.SIGKILL
    trained = folder.with_name("trained")
    shutil.copytree(folder, trained)
    unfinished = 0
    for count in range(1, 200):
        shutil.rmtree(folder)
        shutil.copytree(trained, folder)
        code = ended(start(recipe, ends_itself_at_a_write(recipe, count)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        unfinished += not is_finished(folder)
        assert is_finished(folder) == (folder / "finished.json").is_file()
        if not is_finished(folder):
            with pytest.raises(UserError, match="did not finish; --resume continues it"):
                plan(recipe, lambda: load(recipe.data))
        assert ended(start(recipe)) == 0
        assert result(recipe) == expected, f"killed before change {count}"
    assert unfinished > 10 and count > unfinished, "before and after the last file"
    assert result(recipe) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"kind": "full", "towers": ["image", "text"], "logit_scale": "trained"}},
        {"adapter": {"kind": "lp_ft", "adapter": LORA}, "average": [{"kind": "bma"}, {"kind": "ema", "decay": 0.9}]},
        {"adapter": {"kind": "tip_adapter", "trained": "keys", "shots": 2, "search_step": [8, 5]}},
        {
            "adapter": {"kind": "maple", "context_tokens": 2, "memory_budget_gb": 1e-4},
            "features": {"store": True, "views": 2},
        },
        {"adapter": {"kind": "clap"}, "objective": {"anchors": [{"kind": "logits"}]}},
        {"data": {"pixel_store": 36}, "train": {"workers": 2}},
        {"features": {"store": True, "views": 2}, "adapter": {"kind": "cocoop", "context_tokens": 2}},
        {"augment": {"mixup": {}}, "train": {"class_sampling": "balanced", "workers": 2}},
        {"train": {"gradient_accumulation_steps": 2}},
        {"objective": {"penalties": [{"kind": "vrex", "weight": 5.0, "anneal": 5}]}},
        {"average": AVERAGES},
        {"objective": {"anchors": [{"kind": "logits"}, {"kind": "weights", "weight": 3.0}]}},
        {"objective": WITH_STATE.model_dump(mode="json")},
        {
            "objective": {"loss": {"kind": "contrastive"}},
            "prompts": {"templates": ["a photo of a {}.", "a {}."]},
        },
        {
            "objective": COMBINED.model_dump(mode="json"),
            "method": {"name": "disam_gsam"},
            "average": AVERAGES[2:],
            "train": {"gradient_accumulation_steps": 2},
        },
    ],
    ids=[
        "full towers",
        "probe first",
        "cache",
        "prompts of both towers",
        "held to zero-shot",
        "pixel store",
        "prompts of images from a feature store",
        "mixup",
        "accumulation",
        "penalty",
        "averages",
        "anchors",
        "state per domain",
        "captions",
        "combined",
    ],
)
def test_row_33_with_stores_and_accumulation(finished, make_recipe, start, changes):
    expected = finished(**changes)
    recipe = make_recipe(**changes)
    assert ended(start(recipe, ends_itself(AscentDirection, "add_", 6))) == -signal.SIGKILL
    assert saved(recipe) == ["step-000002", "step-000004"]
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected


def test_row_33_killed_after_the_probe_and_before_the_first_checkpoint(finished, make_recipe, start):
    """The probe is fitted again, to the same bits."""
    from disam_peft.adapters import lp_ft

    changes = {"adapter": {"kind": "lp_ft", "adapter": LORA}}
    expected, recipe = finished(**changes), make_recipe(**changes)
    for where in ((lp_ft, "fit_head"), (AscentDirection, "add_")):
        assert ended(start(recipe, ends_itself(*where, 1))) == -signal.SIGKILL
        assert saved(recipe) == []
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected


def test_row_33_killed_between_training_and_the_results(finished, make_recipe, start):
    """Nothing is trained twice, and a finished run has no checkpoints left."""
    from disam_peft.experiments import run

    expected, recipe = finished(), make_recipe()
    assert ended(start(recipe, ends_itself(run, "fit", 1))) == -signal.SIGKILL
    assert saved(recipe) == ["step-000010", "step-000012"]
    before = (recipe.folder("photo") / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    (recipe.folder("photo") / "adapter/adapter_model.safetensors").write_bytes(b"lost by a power cut")
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected, "the adapter is written again, from the checkpoint"
    assert before > 0
    shutil.rmtree(recipe.output)
    assert ended(start(recipe, ends_itself(run, "write_results", 1))) == -signal.SIGKILL
    assert saved(recipe)
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected


# -- the state, in this process ------------------------------------------------------------------------------


class Cut(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def trained(openclip_name, domains_folder, tmp_path):
    """Train afresh, or from where the last one was cut: (parameters as one vector, events, result)."""
    dataset = load(DataConfig(root=domains_folder))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))

    def run(
        *,
        adapter=None,
        resume=False,
        cut_at=None,
        scores=None,
        provenance=None,
        method=None,
        objective=None,
        **settings,
    ):
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        adapter = adapter or LoraAdapterConfig(seed=0, dropout=0.3, rank=2, blocks={"last": 1})
        classifier, records = ClipClassifier(backbone, build_adapter(adapter, backbone, prompts), prompts), []
        length = tmp_path / "length"  # the events without their numbers, in place of metrics.jsonl

        def on_event(name, **values):
            records.append((name, values))
            append_event(length, name, **{"step": values["step"]} if "step" in values else {})
            if name == "step" and values["step"] == cut_at:
                raise Cut

        values = {"steps": 6, "batch_size": 6, "workers": 0, "log_every": 1, **settings}
        outcome = fit(
            classifier,
            dataset,
            method=method,
            objective=objective,
            config=TrainConfig(**values),
            validate=None if scores is None else lambda: Score(*scores.pop(0)),
            on_event=on_event,
            checkpoints=CheckpointConfig(tmp_path / "saved", resume, provenance or {}, length),
        )
        vector = torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()])
        return vector, records, outcome, length.stat().st_size

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"save_every": 2},
        {"save_every": 2, "optimizer": "sgd", "schedule": "constant", "warmup_steps": 3},
        {"save_every": 2, "optimizer": "sgd", "momentum": 0.0},
        {"save_every": 3, "mixed_precision": "bf16", "clip_norm": 0.1},
        {"save_every": 3, "adapter": LinearProbeConfig(), "method": MethodConfig(name="erm")},
        {"save_every": 2, "method": MethodConfig.model_validate({"rho": {"kind": "linear", "from": 0, "to": 0.5}})},
        {
            "save_every": 2,
            "method": MethodConfig.model_validate(
                {"name": "disam_gsam", "rho": {"kind": "follow_lr", "max": 0.5, "min": 0.1}, "from": 0.3, "every": 2}
            ),
        },
        {
            "save_every": 3,
            "method": MethodConfig.model_validate(
                {
                    "name": "disam_sagm",
                    "rho": {"kind": "cosine", "from": 0.5, "to": 0.1, "warmup_steps": 2},
                    "variance_weight": {"kind": "linear", "from": 0.1, "to": 0.7},
                    "variance_scale": "relative",
                }
            ),
        },
        {"save_every": 100, "validate_every": 2},
        {"validate_every": 2},
        {"save_every": 2, "objective": ObjectiveConfig(penalties=[VRexConfig(weight=5.0, anneal=5)])},
        {"save_every": 2, "objective": WITH_STATE},
    ],
    ids=str,
)
def test_every_part_of_the_state_comes_back(trained, tmp_path, settings):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    expected, events, outcome, length = trained(**settings)
    shutil.rmtree(tmp_path / "saved")
    (tmp_path / "length").unlink()
    with pytest.raises(Cut):
        trained(cut_at=5, **settings)
    again, more, resumed, new_length = trained(resume=True, **settings)
    AcceleratorState._reset_state()
    assert torch.equal(again, expected)
    assert resumed == outcome
    assert new_length == length, "records are cut back to the checkpoint, then go on"
    begun_at = next(values["step"] for name, values in more if name == "step")
    assert begun_at == {2: 5, 3: 4, 100: 1, None: 5}[settings.get("save_every")]
    assert more == events[-len(more) :]


def test_the_best_state_before_the_cut_is_not_forgotten(trained, tmp_path):
    scores = [(0.5, -1.0), (0.9, -float("inf")), (0.9, -float("inf"))]
    expected, _, outcome, _ = trained(validate_every=2, scores=list(scores))
    assert outcome.best_step == 4
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(Cut):
        trained(validate_every=2, scores=list(scores), cut_at=6)
    again, _, resumed, _ = trained(validate_every=2, scores=scores[2:], resume=True)
    assert torch.equal(again, expected)
    assert (resumed.best_step, resumed.best_score) == (4, (0.9, -float("inf")))


def test_a_run_of_one_step_and_one_that_is_done(trained):
    expected = trained(steps=1)[0]
    again, events, outcome, _ = trained(steps=1, resume=True)
    assert torch.equal(again, expected)
    assert [name for name, _ in events] == ["trained"], "no step is left"
    assert outcome.best_step == 1


def test_the_number_of_checkpoints_kept(trained, tmp_path):
    trained(save_every=1, keep_checkpoints=4)
    assert len(list((tmp_path / "saved").iterdir())) == 4
    shutil.rmtree(tmp_path / "saved")
    trained(save_every=4)
    assert [path.name for path in sorted((tmp_path / "saved").iterdir())] == ["step-000004", "step-000006"]


def test_row_38_another_content_or_another_adapter_is_refused(trained):
    with pytest.raises(Cut):
        trained(save_every=2, cut_at=5, provenance={"images of art/red": "8", "weights": "abc"})
    with pytest.raises(UserError, match=r"images of art/red: 8 -> 7\n  images of art/tan: none -> 1"):
        trained(resume=True, provenance={"images of art/red": "7", "images of art/tan": "1", "weights": "abc"})
    same = {"images of art/red": "8", "weights": "abc"}
    with pytest.raises(UserError, match=r"its adapter differs"):
        trained(resume=True, provenance=same, adapter=LoraAdapterConfig(seed=0, rank=4, blocks={"last": 1}))
    with pytest.raises(UserError, match=r"its penalties differ \(here \['VRex'\]; saved \[\]\)"):
        trained(resume=True, provenance=same, objective=ObjectiveConfig(penalties=[VRexConfig(anneal=0)]))
    with pytest.raises(UserError, match=r"its optimizer differs"):
        trained(resume=True, provenance=same, optimizer="sgd")
    with pytest.warns(Notice, match=r"going on after step 4 \(of 6 steps\)"):
        trained(resume=True, provenance=same)


def test_the_loss_scaler_of_fp16_comes_back():
    """Through the state alone: Accelerate has no scaler on a CPU."""

    def guarded(weight):
        accelerator = start_accelerator("no")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return GuardedOptimizer(torch.optim.AdamW([weight]), ["weight"], accelerator), accelerator.scaler

    weight = torch.nn.Parameter(torch.ones(3))
    before, scaler = guarded(weight)
    for factor in (1.0, float("inf")):  # the second overflows and halves the scale
        weight.grad = None
        scaler.scale(weight.sum() * factor).backward()
        scaler.step(before.optimizer)
        scaler.update()
    state = from_json_and_tensors(*to_json_and_tensors(before.state_dict()))
    after, fresh = guarded(weight)
    after.load_state_dict(state)
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 2.0**9
    steps = [o.optimizer.state[weight]["step"] for o in (before, after)]
    assert steps[0] == steps[1] == 1
