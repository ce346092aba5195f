"""The training loop: data in, best adapter out. One optimizer step is ``Trainer.train_step``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.fit_start import Start, start_from_features
from disam_peft.classification.frozen_features import training_store
from disam_peft.common.progress import track
from disam_peft.config.average import KeptAverageConfig
from disam_peft.config.data import AugmentConfig, FeatureConfig, require_mixable
from disam_peft.config.feature_adapters import steps_conflict, takes_no_steps
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.batches import make_sampler, training_batches
from disam_peft.data.stores.features import FeatureStore
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.errors import UserError
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.averages.weight_averages import RAW, WeightAverages
from disam_peft.training.checkpoint.manager import CheckpointConfig, CheckpointManager, Stateful
from disam_peft.training.selection import BestStates, KeptState, Validation
from disam_peft.training.step_metrics import OnEvent
from disam_peft.training.trainer import Trainer


@dataclass(frozen=True)
class FitResult:
    """How a run of training went.

    Attributes:
        best_step: number of optimizer steps after which the chosen state was reached; the last one if nobody
            validated.
        best_score: its score, a tuple of numbers; None if nobody validated.
        first_loss, last_loss: mean training loss of the first and the last step, at w; NaN without a step.
        skipped_steps: steps without effect, because a loss or gradient was not finite.
        weights: whose state was chosen: ``raw``, the trained weights themselves, or the name of an average.
        states: the best state of the weights and of each average, for whoever judges them side by side.
    """

    best_step: int
    best_score: tuple[float, ...] | None
    first_loss: float
    last_loss: float
    skipped_steps: int
    weights: str = RAW
    states: Mapping[str, KeptState] = field(default_factory=dict, repr=False, compare=False)


def fit(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    *,
    method: MethodConfig | None = None,
    objective: ObjectiveConfig | None = None,
    config: TrainConfig | None = None,
    averages: Sequence[KeptAverageConfig] = (),
    augment: AugmentConfig | None = None,
    features: FeatureConfig | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    validate: Callable[[], Any] | None = None,
    held_back: DomainDataset | None = None,
    on_best: Callable[[str], None] | None = None,
    on_event: OnEvent | None = None,
    checkpoints: CheckpointConfig | None = None,
) -> FitResult:
    """Train the classifier's adapter on ``dataset``, which holds source data only; in the end it is in its best state.

    Args:
        classifier: moved to the accelerator's device.
        dataset: training samples; their labels index the classifier's classes.
        objective: what is descended; unset: the mean of the cross entropy.
        averages: averages of the weights that are kept and validated beside the weights themselves.
        features: whether to train from stored features of the frozen part; unset: from images.
        seed: of batches, augmentation and dropout.
        accelerator: from ``start_accelerator``; the default is one with the config's precision.
        validate: scores the present state on held-back source data: a number or a tuple of numbers, of which greater is
            better, or a ``selection.Validation``. Called at intervals and after the last step, for the weights and for
            each average in their place that is judged there; the state with the highest score (the first of equals) is
            the one that is kept. Unset: the last state of the weights is kept.
        held_back: images of the source domains that are not trained on, for an adapter that chooses settings by them
            before the first step (``Adapter.tune``); others do not look at them.
        on_best: called in that state, whenever it is a new best, to save it; after a resume once more at the end. It is
            told whose state it is: ``raw`` or the name of an average.
        on_event: called on the main process as ``on_event(name, **values)`` with the records of ``metrics.jsonl``.
        checkpoints: where to save at intervals, and whether to go on from there: whatever interrupted the run, the same
            processes then come to the same bits. SIGTERM and Ctrl-C save and end it. Unset: nothing is saved.

    Raises:
        UserError: nothing to train; a batch too small for the domains; losses that stay not finite (names the files);
            more micro-batches than images; mixup of images where features are read; a checkpoint that cannot be
            written, is damaged, or is of another run.
        Stopped: by a signal; with ``checkpoints`` alone.
    """
    method, config, augment = method or MethodConfig(), config or TrainConfig(), augment or AugmentConfig()
    accelerator = accelerator or start_accelerator(config.mixed_precision)
    emit = on_event if on_event is not None and accelerator.is_main_process else _ignore
    objective = objective or ObjectiveConfig()
    require_mixable(augment, features or FeatureConfig(), objective.loss.kind)
    adapter = classifier.adapter
    if adapter is None or not (classifier.trainable() or takes_no_steps(adapter.config)):
        raise UserError("the classifier has no adapter with trainable parameters; build one and hand it over")
    set_seed(seed, device_specific=True)  # other dropout masks on other ranks
    classifier.to(accelerator.device)
    start_it = partial(
        start_from_features,
        classifier,
        dataset,
        features,
        held_back=held_back,
        autocast=accelerator.autocast,
        workers=config.workers,
    )
    if takes_no_steps(adapter.config):
        if conflict := steps_conflict(adapter.config, averages):
            raise UserError(conflict)
        CheckpointManager(checkpoints, {}, [], config, accelerator).resume()  # records of an earlier try are cut
        return _fit_without_steps(classifier, start_it, validate, on_best, emit)
    trainer = Trainer(classifier, dataset, method, objective, config, averages, accelerator, emit, seed)
    if validate is None and (names := trainer.averages.needing_validation_loss):
        raise UserError(f"the average {names[0]} needs the validation loss, and nobody validates; hand over validate")
    best = BestStates(classifier, trainer.averages, validate, on_best)
    components: dict[str, Stateful] = {
        "adapter": trainer,
        "optimizer": trainer.optimizer,
        "schedule": trainer.schedule,
        "objective": trainer.objective,
        "averages": trainer.averages,
        "metrics": trainer.metrics,
        "best": best,
    }
    params: list[Tensor] = list(trainer.trained.values())
    manager = CheckpointManager(checkpoints, components, params, config, accelerator)
    trainer.steps_done = resumed_after = manager.resume()
    if resumed_after == 0:
        start = start_it()
        trainer.objective.remember_start(params)
        if start is not None:
            trainer.averages.begin()
            _tell(start, validate, emit)
        trainer.metrics.warn_at_the_start(params, adapter.config)
    sampler = make_sampler(
        dataset,
        config,
        seed,
        mixup=augment.mixup,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_step=resumed_after,
    )
    inputs = _inputs(classifier, dataset, augment, features, seed, config, accelerator)
    # Micro-batches are there to save memory: the images of each are sent to the device when it is its turn.
    images_on: Literal["device", "host"] = "host" if config.gradient_accumulation_steps > 1 else "device"
    batches = training_batches(
        dataset, sampler, inputs, accelerator.device, workers=config.workers, images_on=images_on
    )
    classifier.train()
    if trainer.micro_batches.count > 1 and resumed_after == 0:
        mb = trainer.micro_batches
        emit("accumulation", pieces=mb.count, images_at_once=mb.size, way=mb.mode)
    # what is recorded has one backward for each forward, where the cosine takes two, and keeps all of its activations
    repeated = config.log_ascent_cosine or config.gradient_checkpointing
    captured = nullcontext() if repeated else classifier.captured(accelerator.autocast)
    interval = config.validation_interval
    with manager.watching(), captured:
        for batch in track(batches, "training", total=config.steps - resumed_after, status=trainer.status):
            trainer.train_step(batch)
            step = trainer.steps_done
            is_validated = step % interval == 0 or step == config.steps
            if is_validated:
                trainer.optimizer.flush()
                for weights, validation in (best.offer(step) if trainer.metrics.has_trained else {}).items():
                    about = {} if weights == RAW else {"weights": weights}
                    trainer.validated = validation.words + "".join(f" ({name})" for name in about.values())
                    is_best = best.is_best(weights, step)
                    emit("validation", step=step, **about, **validation.numbers, is_best=is_best)
                    prefix = "validation" if weights == RAW else f"validation/{weights}"
                    trainer.metrics.track(step, {f"{prefix}/{name}": v for name, v in validation.numbers.items()})
            manager.end_of_step(step, validated=is_validated)
        trainer.metrics.require_training()

    trainer.metrics.warn_at_the_end(params, adapter.config)
    states = best.finish(config.steps, announce=resumed_after > 0)  # a power cut may have taken what was saved of it
    chosen = states[best.chosen]
    about = {"weights": best.chosen} if averages else {}
    for name, told in trainer.averages.about().items():
        emit("average", weights=name, **told)
    emit("trained", best_step=chosen.step, **about, **trainer.metrics.totals())
    return FitResult(
        best_step=chosen.step,
        best_score=chosen.score,
        first_loss=trainer.metrics.first_loss,
        last_loss=trainer.metrics.last_loss,
        skipped_steps=trainer.metrics.skipped,
        weights=best.chosen,
        states=states,
    )


def _fit_without_steps(
    classifier: ClipClassifier,
    start_it: Callable[[], Start | None],
    validate: Callable[[], Any] | None,
    on_best: Callable[[str], None] | None,
    emit: OnEvent,
) -> FitResult:
    """Fit an adapter that has nothing to descend: its start is all there is."""
    start = start_it()
    best = BestStates(classifier, WeightAverages((), (), 0), validate, on_best)
    found = best.offer(0)
    states = best.finish(0, announce=False)
    emit("start", **((start.numbers if start else None) or {}), **(found[RAW].numbers if RAW in found else {}))
    emit("trained", best_step=0, steps=0, skipped_steps=0)
    return FitResult(0, states[RAW].score, math.nan, math.nan, 0, RAW, states)


def _tell(start: Start, validate: Callable[[], Any] | None, emit: OnEvent) -> None:
    """Record how the start from features went, and how good it is on held-back source data."""
    if start.numbers is not None:
        emit("start", **start.numbers, **({} if validate is None else Validation.of(validate()).numbers))


def _ignore(name: str, **values: Any) -> None:
    """Nobody records."""


def _inputs(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    augment: AugmentConfig,
    features: FeatureConfig | None,
    seed: int,
    config: TrainConfig,
    accelerator: Accelerator,
) -> TrainTransform | FeatureStore:
    """What batches are made of: augmented images, or stored outputs of the frozen part."""
    if features is None or not features.store:
        return TrainTransform(classifier.backbone.preprocessing, augment, seed)
    return training_store(
        classifier, dataset, augment, seed, features, autocast=accelerator.autocast, workers=config.workers
    )
