"""What ``train`` would do, without doing it: the plan of every run, and what it will take in time and memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from disam_peft.adapters.registry import ADAPTERS
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import require_frozen_part, stored_views
from disam_peft.common.progress import duration
from disam_peft.config.average import kept_averages, times_judged
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import resolve_workers
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.narrator import Narrator
from disam_peft.experiments.run_folder import Plan
from disam_peft.experiments.split_data import SplitData, checked_split
from disam_peft.training.rehearsal import Rehearsal


@dataclass(frozen=True)
class Estimate:
    """What one run will take, from measurements on this machine.

    Attributes:
        steps_seconds: all optimizer steps, with the loading of their images.
        store_seconds: building the feature stores, and passes over the training images before the first step (inferred
            domains, an adapter that starts from features); 0 without any.
        validation_seconds: all validations.
        judging_seconds: the zero-shot numbers and the evaluation at the end; sharpness is not counted.
        memory_bytes: of the main process, or on the GPU; None where the system does not tell.
        workers: processes that load images beside it, each with memory of its own.
    """

    steps_seconds: float
    store_seconds: float
    validation_seconds: float
    judging_seconds: float
    memory_bytes: int | None
    workers: int

    @property
    def seconds(self) -> float:
        return self.steps_seconds + self.store_seconds + self.validation_seconds + self.judging_seconds


def rehearse_runs(
    runs: Sequence[Recipe],
    plans: Sequence[Plan],
    dataset: DomainDataset,
    measure: Callable[..., Rehearsal],
    device: torch.device,
    processes: int,
    narrator: Narrator,
) -> list[Estimate]:
    """Say for each run what it would do, and estimate what it takes; one estimate per run that would train.

    Steps and evaluation are measured once, on the first run that would train: the runs of a recipe differ in their
    images alone. Domains that the recipe infers are not inferred; those of the data stand for them.

    Args:
        measure: ``training.rehearsal.rehearse`` with the accelerator of this process.

    Raises:
        UserError: what would stop the training before or in its first step.
    """
    estimates: list[Estimate] = []
    measured: Rehearsal | None = None
    for number, (recipe, plan) in enumerate(zip(runs, plans, strict=True), start=1):
        data, held_out = checked_split(recipe, dataset), recipe.protocol.domain
        folder = recipe.folder(held_out)
        narrator.run(folder, data, held_out, (number, len(runs)))
        if plan == "keep":
            narrator.say("  finished already: it would be kept")
            continue
        if measured is None:
            measured, classifier = _measure(recipe, data, dataset, measure, device)
            state = _state_of_training(recipe, classifier)
            narrator.model(recipe, classifier)
            narrator.training(recipe, data, device, processes)
        estimate = estimated(recipe, data, measured, state, processes)
        estimates.append(estimate)
        _tell(estimate, recipe, plan, narrator)
    narrator.say("dry run: nothing was trained, and no run's folder was written")
    return estimates


def _measure(
    recipe: Recipe,
    data: SplitData,
    dataset: DomainDataset,
    measure: Callable[..., Rehearsal],
    device: torch.device,
) -> tuple[Rehearsal, ClipClassifier]:
    if recipe.features.store:
        stored_views(recipe.augment, recipe.features)
    classifier = load_pretrained(recipe, dataset.prompt_names, device).with_new_adapter()
    if recipe.features.store:
        require_frozen_part(classifier.image_split)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        if recipe.domains.infer != "none":  # the domains of the data stand for those to come
            warnings.filterwarnings("ignore", message=r"(disam\w*|mixup) with one source domain")
        found = measure(
            classifier,
            data.training,
            data.validation,
            method=recipe.method,
            objective=recipe.objective,
            config=recipe.train,
            evaluation=recipe.evaluation,
            augment=recipe.augment,
            stored=recipe.features.store,
            seed=recipe.seed,
        )
    return found, classifier


def _state_of_training(recipe: Recipe, classifier: ClipClassifier) -> int:
    """Bytes that training keeps beside the weights and their gradient: the optimizer's moments, and for the weights and
    each average of them the best state, which is a copy."""
    size = sum(p.numel() * p.element_size() for p in classifier.trainable().values())
    averages = len(kept_averages(recipe.average))
    return size * ((2 if recipe.train.optimizer == "adamw" else 1) + averages + 1 + averages)


def estimated(recipe: Recipe, data: SplitData, measured: Rehearsal, state_bytes: int, processes: int = 1) -> Estimate:
    """The estimate for one run.

    Args:
        measured: on this machine, with this recipe's adapter and batch size.
        state_bytes: what training keeps beside what was measured.
    """
    config, workers = recipe.train, resolve_workers(recipe.train.workers)
    judging_workers = resolve_workers(recipe.evaluation.workers)
    batch = config.batch_size / processes
    splits = data.by_split()
    judged = sum(map(len, splits.values())) / processes
    validated = len(data.validation) / processes
    interval, averages = config.validation_interval, kept_averages(recipe.average)
    steps = 0 if takes_no_steps(recipe.adapter) else config.steps
    validations = math.ceil(steps / interval) if steps else 1
    validations += sum(times_judged(average, config.steps, interval) for average in averages)
    views = stored_views(recipe.augment, recipe.features) if measured.stored else 1
    store = 0.0
    if measured.stored:
        of_training = measured.load_seconds + measured.encode_seconds
        of_judged = _overlapped(measured.judge_load_seconds, measured.judge_seconds, judging_workers)
        store = len(data.training) * views * of_training / processes + judged * of_judged
        step, judge = measured.step_seconds, 0.0
    else:
        step = _overlapped(batch * measured.load_seconds, measured.step_seconds, workers)
        judge = _overlapped(measured.judge_load_seconds, measured.judge_seconds, judging_workers)
    passes_before = (recipe.domains.infer != "none") + ADAPTERS[type(recipe.adapter)].starts_from_features()
    store += passes_before * len(data.training) / processes * (measured.judge_load_seconds + measured.judge_seconds)
    return Estimate(
        steps_seconds=steps * step,
        store_seconds=store,
        validation_seconds=validations * (measured.judge_start_seconds + validated * judge),
        judging_seconds=(2 + len(averages)) * (len(splits) * measured.judge_start_seconds + judged * judge),
        memory_bytes=None if measured.memory_bytes is None else measured.memory_bytes + state_bytes,
        workers=max(workers, judging_workers),
    )


def _overlapped(load: float, compute: float, workers: int) -> float:
    """Time for what ``workers`` processes load while the main one computes; without them it does both in turn."""
    return max(load / workers, compute) if workers else load + compute


def _tell(estimate: Estimate, recipe: Recipe, plan: Plan, narrator: Narrator) -> None:
    parts = {
        "steps": estimate.steps_seconds,
        "feature stores and what comes before the steps": estimate.store_seconds,
        "validations": estimate.validation_seconds,
        "zero-shot and final evaluation": estimate.judging_seconds,
    }
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds > 0)
    narrator.say(f"  time: about {duration(estimate.seconds)} ({listed}), measured on a few batches on this machine")
    if estimate.memory_bytes is not None:
        loaders = "1 process that loads" if estimate.workers == 1 else f"{estimate.workers} processes that load"
        beside = f", and {loaders} images beside it" if estimate.workers else ""
        narrator.say(
            f"  memory: about {estimate.memory_bytes / 1e9:.1f} GB{beside}, measured on whole batches of training and "
            "evaluation"
        )
    left_out = [
        *(["what train.compile saves"] if recipe.train.compile else []),
        *(["what data.pixel_store saves"] if recipe.data.pixel_store is not None else []),
        *(["evaluation.sharpness"] if recipe.evaluation.sharpness is not None else []),
    ]
    if left_out:
        narrator.say(f"  not counted: {', '.join(left_out)}")
    if plan == "continue":
        narrator.say("  a part of it is done: --resume would go on from the last checkpoint")
