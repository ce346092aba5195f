"""A step in pieces: the same training as with the whole batch, whatever the way, the source and the adapter."""

import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from disam_peft.config.data import DataConfig, MixupConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.training import micro_batching as gradient
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient, choose_micro_batches
from tests.helpers import accumulated_runs
from tests.helpers.adapter_cells import tiny_backbone, tiny_classifier
from tests.helpers.paths import environment


@pytest.fixture
def run(twins, domains_folder):
    def of(pieces, **options):
        return accumulated_runs.run(twins, domains_folder, pieces, **options)

    return of


@pytest.fixture
def two_phase(monkeypatch):
    """No room for a gradient per domain."""
    monkeypatch.setattr(gradient, "MAX_STORED_GRADIENT_BYTES", 0)


def accumulation(events):
    found = [values for name, values in events if name == "accumulation"]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pieces", "batch", "way"),
    [
        (2, 13, "two_phase"),
        (4, 13, "two_phase"),
        (7, 13, "two_phase"),
        (13, 13, "per_domain"),
        (3, 12, "per_domain"),
        (6, 12, "per_domain"),
        (7, 22, "per_domain"),
    ],
)
def test_pieces_train_as_the_whole_batch_does(run, pieces, batch, way):
    whole, events = run(1, batch=batch)
    assert accumulation(events) is None
    in_pieces, in_events = run(pieces, batch=batch)
    assert accumulation(in_events)["way"] == way
    assert (in_pieces - whole).abs().max() <= 1e-12
    assert (run(1, batch=batch, method="sam")[0] - whole).abs().max() > 1e-4, "the variance matters here"
    for (name, values), (_, others) in zip(events, [e for e in in_events if e[0] != "accumulation"], strict=True):
        if name == "step":
            assert values["loss"] == pytest.approx(others["loss"], abs=1e-12)
            assert values["domain_weight"] == pytest.approx(others["domain_weight"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [3, 6])
def test_both_ways_give_the_same(run, pieces, monkeypatch):
    per_domain, events = run(pieces)
    monkeypatch.setattr(gradient, "MAX_STORED_GRADIENT_BYTES", 0)
    two_phase, other_events = run(pieces)
    assert [accumulation(e)["way"] for e in (events, other_events)] == ["per_domain", "two_phase"]
    assert (per_domain - two_phase).abs().max() <= 1e-12


@pytest.mark.parametrize("method", ["erm", "sam", "adaptive"])
def test_every_method_in_pieces(run, method):
    in_pieces, events = run(4, method=method)
    assert accumulation(events)["way"] == ("two_phase" if method == "adaptive" else "mean")
    assert (in_pieces - run(1, method=method)[0]).abs().max() <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode"),
    [("disam_gsam", "two_phase"), ("disam_sagm", "two_phase"), ("follows", "mean"), ("second half", "two_phase")],
)
def test_gsam_sagm_and_schedules_in_pieces(run, method, mode):
    in_pieces, events = run(4, method=method)
    whole = run(1, method=method)[0]
    assert accumulation(events)["way"] == mode
    assert (in_pieces - whole).abs().max() <= 1e-12
    assert (run(1, method="disam")[0] - whole).abs().max() > 1e-4
    assert torch.equal(run(1, method=method, scale=2.0**12)[0], whole), "whatever the loss scale"


def test_a_step_that_perturbs_nothing_takes_one_pass_over_its_pieces(run, monkeypatch):
    """Three steps, of which the last two perturb: of four pieces the first needs four forward passes, and the others
    the seven of a gradient whose weights need all losses, and four more."""
    forwards = []
    outputs = gradient.ClipClassifier.outputs
    monkeypatch.setattr(
        gradient.ClipClassifier, "outputs", lambda self, frozen: forwards.append(len(frozen)) or outputs(self, frozen)
    )
    _, events = run(4, method="second half")
    assert len(forwards) == 2 * 4 + 11
    steps = [values for name, values in events if name == "step"]
    assert [values["rho"] for values in steps] == [0, 0, 0.3]
    assert [values["perturbed_loss"] == values["loss"] for values in steps] == [True, True, False]
    trained = next(values for name, values in events if name == "trained")
    assert trained["zero_ascent_steps"] == 0, "none was meant to have an ascent"


@pytest.mark.slow
@pytest.mark.parametrize("cell", sorted(accumulated_runs.CELLS))
def test_every_adapter_in_pieces(run, cell):
    in_pieces, events = run(3, cell=cell, steps=2)
    on_features = ("clap", "clip_adapter", "closed_form_probe", "lp_plus_plus", "task_res", "tip_adapter")
    frozen_images = cell.startswith(("coop", "probe", *on_features)) or cell == "lora-text"
    assert accumulation(events)["way"] == ("whole" if frozen_images else "per_domain")
    assert (in_pieces - run(1, cell=cell, steps=2)[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("source", ["pixel store", "feature store"])
@pytest.mark.parametrize("cell", ["lora-image", "probe-random", pytest.param("visual_prompts", marks=pytest.mark.slow)])
def test_every_source_in_pieces(run, source, cell):
    whole, in_pieces = (run(pieces, cell=cell, source=source, steps=2)[0] for pieces in (1, 4))
    assert (in_pieces - whole).abs().max() <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pixel store", "feature store"])
@pytest.mark.parametrize("cell", ["lora-image", "coop-shared", "probe-zero_shot"])
def test_penalties_from_every_source_in_pieces(run, source, cell):
    options = {"cell": cell, "batch": 13, "objective": "penalties", "steps": 2}
    whole, in_pieces = (run(pieces, source=source, **options)[0] for pieces in (1, 4))
    assert (in_pieces - whole).abs().max() <= 1e-12
    assert (run(1, source=source, **{**options, "objective": None})[0] - whole).abs().max() > 1e-6, "they matter"
    if source == "feature store":
        assert (run(1, **options)[0] - whole).abs().max() <= 1e-12, "as from images"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "cell", "of"),
    [
        ("images", "lora-image", "images"),
        ("pixel store", "coop-shared", "images"),
        ("feature store", "lora-image", "features"),
    ],
)
def test_mixup_in_pieces(run, source, cell, of):
    """Each piece has the other classes and the shares of its own samples. Objectives of every kind read them."""
    options = {"source": source, "cell": cell, "batch": 13, "steps": 2, "mixup": MixupConfig(of=of)}
    whole, in_pieces = (run(pieces, **options)[0] for pieces in (1, 4))
    assert (in_pieces - whole).abs().max() <= 1e-12
    assert (run(1, **{**options, "mixup": None})[0] - whole).abs().max() > 1e-4, "it is mixed"
    unlike = {**options, "mixup": MixupConfig(of=of, alpha=3.0)}
    assert (run(1, **unlike)[0] - whole).abs().max() > 1e-4, "by alpha"


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["balanced", "proportional"])
def test_proportional_batches_in_pieces_of_one_domain(run, sampling):
    """Domains of a batch vary in number and may be absent; the transformers family, for a change."""
    options = {"sampling": sampling, "family": "transformers", "batch": 6}
    in_pieces, events = run(6, **options)
    assert accumulation(events) == {"pieces": 6, "images_at_once": 1, "way": "per_domain"}
    assert (in_pieces - run(1, **options)[0]).abs().max() <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "method", "pieces", "mode"),
    [
        ("vrex", "disam", 4, "two_phase"),
        ("vrex", "disam", 6, "per_domain"),
        ("vrex", "sam", 4, "two_phase"),
        ("vrex", "erm", 4, "two_phase"),
        ("vrex", "erm", 6, "per_domain"),
        ("vrex not climbed", "sam", 4, "two_phase"),
        ("vrex not climbed", "erm", 4, "two_phase"),
        ("domains", "sam", 4, "mean"),
        ("domains", "disam", 4, "two_phase"),
        ("penalties", "disam", 4, "two_phase"),
        ("penalties", "erm", 6, "two_phase"),
    ],
)
def test_every_objective_in_pieces(run, objective, method, pieces, mode):
    batch = 13 if objective == "domains" else 12  # of unequal domains, where their mean is another one
    options = {"method": method, "objective": objective, "batch": batch, "steps": 2}
    whole, events = run(1, **options)
    in_pieces, in_events = run(pieces, **options)
    assert accumulation(in_events)["way"] == mode
    assert (in_pieces - whole).abs().max() <= 1e-12
    assert (run(1, **{**options, "objective": None})[0] - whole).abs().max() > 1e-6, "the objective matters"
    steps, others = ([values for name, values in found if name == "step"] for found in (events, in_events))
    for ours, theirs in zip(steps, others, strict=True):
        for name in ("loss", "objective", "perturbed_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-12)
        if objective == "vrex":
            assert abs(ours["objective"] - ours["loss"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("pieces", "cell"), [(3, "lora-image"), (4, "lora-image"), (3, "full-both")])
def test_a_loss_scaler_changes_no_bit(run, pieces, cell):
    assert torch.equal(run(pieces, scale=2.0**10, cell=cell)[0], run(pieces, cell=cell)[0])


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [3, 4])
def test_both_passes_see_the_same_dropout_in_each_piece(run, pieces, monkeypatch):
    """With rho near 0 the passes compute one function of the weights: the losses of both are the same."""
    monkeypatch.setitem(accumulated_runs.METHODS, "tiny", MethodConfig(rho=1e-11, variance_weight=0.6))
    weights, events = run(pieces, cell="lora-dropout", method="tiny")
    for name, values in events:
        if name == "step":
            assert values["perturbed_loss"] == pytest.approx(values["loss"], abs=1e-9)
    assert torch.equal(weights, run(pieces, cell="lora-dropout", method="tiny")[0])
    other_masks = run(1, cell="lora-dropout", method="tiny")[0]
    assert (weights - other_masks).abs().max() > 1e-4, "dropout was on"


def test_the_frozen_part_runs_once_a_piece_and_no_pass_takes_more_than_a_piece(run, monkeypatch, two_phase):
    from disam_peft.classification.classifier import ClipClassifier

    encoded, computed = [], []
    encode, outputs = ClipClassifier.encode_frozen, ClipClassifier.outputs
    monkeypatch.setattr(ClipClassifier, "encode_frozen", lambda s, x: encoded.append(len(x)) or encode(s, x))
    monkeypatch.setattr(ClipClassifier, "outputs", lambda s, x, *more: computed.append(len(x)) or outputs(s, x, *more))
    run(4, batch=13, steps=1)
    assert encoded == [3, 3, 3, 4]
    losses, weighted, pass_2 = [3, 3, 3], [4, 3, 3, 3], [3, 3, 3, 4]  # the last piece keeps its graph
    assert computed == losses + weighted + pass_2


def test_a_text_side_that_is_trained_runs_once_a_pass(run, monkeypatch):
    """Only the images, which are frozen there, are encoded in micro-batches: each would repeat CoOp's prompts."""
    from disam_peft.classification.classifier import ClipClassifier

    encoded, computed = [], []
    encode, outputs = ClipClassifier.encode_frozen, ClipClassifier.outputs
    monkeypatch.setattr(ClipClassifier, "encode_frozen", lambda s, x: encoded.append(len(x)) or encode(s, x))
    monkeypatch.setattr(ClipClassifier, "outputs", lambda s, x, *more: computed.append(len(x)) or outputs(s, x, *more))
    run(4, steps=1, cell="coop-shared")
    assert (encoded, computed) == ([3, 3, 3, 3], [12, 12])


@pytest.mark.parametrize(("pieces", "calls_a_step"), [(1, 1), (4, 3 + 4 + 4)])
def test_frozen_layers_of_the_first_trained_block_run_once_a_step(run, monkeypatch, pieces, calls_a_step):
    """In pieces there is no memory for that: a look at three of four, and both passes over all four."""
    calls, build = [], gradient.StepGradient.__init__

    def counted(self, classifier, *others):
        build(self, classifier, *others)
        split = classifier.adapter.image_split
        norm = next(t.name for t in classifier.backbone.targets() if (t.block, t.projection) == (split, "norm1"))
        layer = classifier.model.get_submodule(norm)
        compute = layer.forward
        layer.forward = lambda x: calls.append(len(x)) or compute(x)

    monkeypatch.setattr(gradient.StepGradient, "__init__", counted)
    run(pieces, steps=2, batch=13)
    assert len(calls) == 2 * calls_a_step


class Waits(TorchDispatchMode):
    """Counts reads of single numbers, for which an accelerator has to finish everything first."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # the check of the domains and the question about the range of a norm are left out on a GPU, and images are
        # made ready on the CPU
        on_cpu_alone = {
            ("micro_batches.py", "_checked_domains"),
            ("perturbation.py", "__init__"),
            ("augment.py", "__call__"),
        }
        if func is torch.ops.aten._local_scalar_dense.default and on_cpu_alone.isdisjoint(
            (Path(frame.filename).name, frame.name) for frame in traceback.extract_stack()
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(("pieces", "a_step"), [(1, 1), (4, 1), (3, 1)])
def test_a_step_waits_for_the_device_once(run, monkeypatch, pieces, a_step):
    """For what became of the step. (That a GPU is not even waited for then: test_without_waiting.)"""
    monkeypatch.setattr(accumulated_runs, "TrainConfig", lambda **of: TrainConfig(**{**of, "log_every": 1000}))
    run(pieces, steps=1)  # what is computed once and kept
    counts = []
    for steps in (2, 7):
        with Waits() as waits:
            run(pieces, steps=steps)
        counts.append(waits.count)
    assert counts[1] - counts[0] == 5 * a_step


def test_pieces_of_one_domain_hold_every_sample_once():
    domains_B = torch.tensor([2, 0, 0, 2, 0, 2, 2, 0, 0, 1])
    pieces = MicroBatches(3, 4, "per_domain").indices(domains_B)
    assert sorted(torch.cat(pieces).tolist()) == list(range(10))
    assert [len(piece) for piece in pieces] == [3, 2, 1, 4]
    assert all(len(domains_B[piece].unique()) == 1 for piece in pieces)
    assert [s.stop - s.start for s in MicroBatches(4, 3, "two_phase").indices(domains_B)] == [2, 3, 2, 3]


@pytest.mark.parametrize(
    ("pieces", "batch", "processes", "way", "size"),
    [
        (1, 12, 1, "whole", 12),
        (3, 12, 1, "per_domain", 4),
        (3, 24, 2, "per_domain", 4),
        (2, 12, 1, "two_phase", 6),  # three pieces in place of two
        (5, 30, 1, "two_phase", 6),  # of 10 images of a domain, 6 and 4
        (6, 30, 1, "per_domain", 5),
        (6, 12, 2, "per_domain", 1),
    ],
)
def test_the_way_follows_from_the_sizes(twins, domains_folder, pieces, batch, processes, way, size):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), "lora-image")
    config = TrainConfig(batch_size=batch, gradient_accumulation_steps=pieces)
    chosen = choose_micro_batches(classifier, load(DataConfig(root=domains_folder)), config, MethodConfig(), processes)
    assert (chosen.mode, chosen.size) == (way, size)


def test_expected_images_of_a_domain_follow_from_how_batches_are_drawn():
    """Classes 0 and 1 are balanced over all data: of class 1, with four images, domain 8 has three."""
    dataset = SimpleNamespace(domain_ids=np.array([2] * 9 + [8] * 3), labels=np.array([0] * 8 + [1] * 4))

    def images(**settings):
        return gradient._images_per_domain(dataset, TrainConfig(batch_size=160, **settings), 1)

    assert images() == images(class_sampling="balanced") == [80, 80]
    assert images(sampling="proportional") == [120, 40]
    assert images(sampling="proportional", class_sampling="balanced") == [100, 60]


def test_more_pieces_than_images_are_an_error(run, twins, domains_folder):
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), "lora-image")
    config = TrainConfig(batch_size=13, gradient_accumulation_steps=7)
    message = r"=7 divides .* but there are 6 \(train.batch_size=13 over 2 processes\); use at most 6"
    with pytest.raises(UserError, match=message):
        choose_micro_batches(classifier, load(DataConfig(root=domains_folder)), config, MethodConfig(), 2)
    with pytest.raises(ValueError, match="13 images into more micro-batches than it has; use at most 13"):
        TrainConfig(batch_size=13, gradient_accumulation_steps=14)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        TrainConfig(gradient_accumulation_steps=0)


def test_row_31_the_remedy_for_too_little_memory_can_be_followed():
    assert "gradient_accumulation_steps=8, with the same result" in MicroBatches(4, 3, "two_phase").memory_remedy
    assert "gradient_accumulation_steps=10," in MicroBatches(5, 2, "mean").memory_remedy
    assert MicroBatches(8, 1, "two_phase").memory_remedy == "Lower train.batch_size."


@pytest.mark.slow
def test_nobody_else_accumulates(run, monkeypatch):
    """``accelerate launch`` hands its own setting over in the environment; it would divide every loss."""
    wanted = run(3, scale=1.0)[0]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert torch.equal(run(3, scale=1.0)[0], wanted)
    with pytest.raises(UserError, match="gradient_accumulation_steps=2 and would divide every loss"):
        monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
        accelerator = Accelerator(gradient_accumulation_steps=2)
        StepGradient(None, None, MicroBatches(1, 1, "whole"), accelerator)
    start_accelerator()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo between forks is tested on POSIX systems")
def test_two_processes_in_pieces(run, twins, domains_folder, tmp_path):
    """Unequal parts in unequal pieces, of another number on each rank, against the whole batch on one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, accumulated_runs.__file__, str(port), *twins, str(domains_folder), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() == accumulated_runs.ON_TWO.keys()
    for name, options in accumulated_runs.ON_TWO.items():
        one = run(**{**options, "pieces": 1})[0]
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert (ranks[0][name] - one).abs().max() <= 1e-12, name
