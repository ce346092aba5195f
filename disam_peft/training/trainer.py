"""The training loop: data in, best adapter out. ``Trainer.train_step`` is one optimizer step, in order.

Shapes in this file: B samples of this process's part of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.fit_start import start_from_features
from disam_peft.classification.frozen_features import training_store
from disam_peft.common.progress import track
from disam_peft.config.average import KeptAverageConfig
from disam_peft.config.data import AugmentConfig, FeatureConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.batches import training_batches
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureStore
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.objectives.objective import build_objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.averages.weight_averages import RAW, WeightAverages
from disam_peft.training.checkpoint.manager import CheckpointConfig, CheckpointManager, Stateful
from disam_peft.training.compiled_blocks import CompiledBlocks
from disam_peft.training.guarded_optimizer import GuardedOptimizer
from disam_peft.training.micro_batching import StepGradient, choose_micro_batches
from disam_peft.training.optimizers import Schedule, build_optimizer
from disam_peft.training.selection import BestStates, KeptState, same_tensors
from disam_peft.training.step_metrics import FinishedStep, OnEvent, StepMetrics

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class FitResult:
    """How a run of training went.

    Attributes:
        best_step: number of optimizer steps after which the chosen state was reached; the last one if nobody
            validated.
        best_score: its score, a tuple of numbers; None if nobody validated.
        first_loss, last_loss: mean training loss of the first and the last step, at w.
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


class Trainer:
    """All that takes part in one optimizer step after another.

    Args:
        classifier: on the accelerator's device, with an adapter that has trainable parameters.
        dataset: training samples, of source domains only.
        averages: one config for each average of the weights.
        on_event: gets the records of ``metrics.jsonl``.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        dataset: DomainDataset,
        method: MethodConfig,
        objective: ObjectiveConfig,
        config: TrainConfig,
        averages: Sequence[KeptAverageConfig],
        accelerator: Accelerator,
        on_event: OnEvent,
    ) -> None:
        self.classifier, self.config, self.accelerator = classifier, config, accelerator
        self.trained = classifier.trainable()
        params = list(self.trained.values())
        # A fused optimizer would hide from Accelerate that a loss scaler skipped its step.
        fused = accelerator.scaler is None and accelerator.device.type in ("cpu", "cuda")
        optimizer = build_optimizer(params, config, fused=fused)
        self.schedule = Schedule(optimizer, config)  # before Accelerate wraps the optimizer's step
        self.optimizer = GuardedOptimizer(optimizer, list(self.trained), accelerator)
        self.objective = build_objective(objective, dataset.present_domains, config.steps)
        self.micro_batches = choose_micro_batches(
            classifier, dataset, config, method, accelerator.num_processes, self.objective
        )
        self.method, self.disam = method, _disam(params, method, config, dataset, accelerator)
        self.gradient = StepGradient(
            classifier, self.disam, self.micro_batches, accelerator, self.objective, config.batch_size
        )
        self.averages = WeightAverages(averages, params)
        self.metrics = StepMetrics(dataset, method, config, on_event, accelerator)
        self.compiled = CompiledBlocks.of(classifier) if config.compile else nullcontext()
        self.steps_done = 0
        self.validated = ""
        """The last validation, in words."""

    def train_step(self, batch: Batch) -> None:
        """One optimizer step: gradient, clipping, update of the weights, schedule, averages, records.

        A step whose loss or gradient is not finite changes nothing. On a GPU the host learns that one step later, so
        the schedule and the records of a step may follow when the passes of the next one are queued.

        Args:
            batch: ``pixels`` (B, 3, H, W) or ``frozen`` (stored outputs of the frozen part), ``labels``, ``domains``
                and ``indices`` (B,).

        Raises:
            UserError: ten steps in a row were skipped, or memory ran out.
        """
        step = self.steps_done + 1
        self.disam.rho = self.method.rho_in_step(self.steps_done, self.config.steps)
        self.disam.variance_weight = self.method.variance_weight_in_step(self.steps_done, self.config.steps)
        try:
            with self.compiled:
                report = self.gradient(batch)  # both passes: p.grad is the gradient at w + e, the weights are w again
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(step, error) from error
        self.optimizer.flush()  # of the step before: while these passes run on a GPU, waiting for it costs nothing
        gradient_norm = self.optimizer.clip_gradients(self.config.clip_norm)
        learning_rate = self.schedule.learning_rate
        outcome = self.optimizer.step(report.is_finite & torch.isfinite(gradient_norm))
        self.schedule.step(outcome)
        self.averages.update(outcome)
        self.metrics.record(FinishedStep(step, batch["indices"], report, gradient_norm, learning_rate), outcome)
        if self.metrics.is_logged(step):
            self.optimizer.flush()
        self.steps_done = step

    def rehearse_step(self, batch: Batch) -> None:
        """The passes of a step, which leave a gradient and the weights as they were. It shows what a step costs.

        Raises:
            UserError: memory ran out.
        """
        try:
            self.gradient(batch)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(self.steps_done + 1, error) from error

    def status(self) -> str:
        """The newest numbers that are known without waiting for the device, for a progress bar."""
        loss = self.metrics.recorded_loss
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        return ", ".join([*parts, *([self.validated] if self.validated else [])])

    def state_dict(self) -> dict[str, Any]:
        """The adapter's tensors."""
        return {"adapter": dict(self.classifier.adapter_tensors()), "order": list(self.trained)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the tensors are those of another adapter.
        """
        here, saved = self.classifier.adapter_tensors(), state["adapter"]
        if not same_tensors(here, saved) or list(self.trained) != state["order"]:
            ours, theirs = ({name: tuple(t.shape) for name, t in found.items()} for found in (here, saved))
            raise UserError(f"its adapter differs (here {str(ours)[:300]}; saved {str(theirs)[:300]})")
        for name, tensor in here.items():
            tensor.copy_(saved[name])

    def _out_of_memory(self, step: int, error: torch.OutOfMemoryError) -> UserError:
        self.optimizer.flush()  # the step before is not lost
        hint = " ".join(getattr(error, "__notes__", []))  # the step restored the weights and notes what may help
        return UserError(f"out of memory at step {step}: {error} {hint} {self.micro_batches.memory_remedy}")


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
            each average in their place; the state with the highest score (the first of equals) is the one that is
            kept. Unset: the last state of the weights is kept.
        on_best: called in that state, whenever it is a new best, to save it; after a resume once more at the end. It is
            told whose state it is: ``raw`` or the name of an average.
        on_event: called on the main process as ``on_event(name, **values)`` with the records of ``metrics.jsonl``.
        checkpoints: where to save at intervals, and whether to go on from there: whatever interrupted the run, the same
            processes then come to the same bits. SIGTERM and Ctrl-C save and end it. Unset: nothing is saved.

    Raises:
        UserError: nothing to train; a batch too small for the domains; losses that stay not finite (names the files);
            more micro-batches than images; a checkpoint that cannot be written, is damaged, or is of another run.
        Stopped: by a signal; with ``checkpoints`` alone.
    """
    method, config = method or MethodConfig(), config or TrainConfig()
    accelerator = accelerator or start_accelerator(config.mixed_precision)
    emit = on_event if on_event is not None and accelerator.is_main_process else _ignore
    if not classifier.trainable():
        raise UserError("the classifier has no adapter with trainable parameters; build one and hand it over")
    set_seed(seed, device_specific=True)  # other dropout masks on other ranks
    classifier.to(accelerator.device)
    trainer = Trainer(classifier, dataset, method, objective or ObjectiveConfig(), config, averages, accelerator, emit)
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
    manager = CheckpointManager(checkpoints, components, list(trainer.trained.values()), config, accelerator)
    trainer.steps_done = resumed_after = manager.resume()
    if resumed_after == 0:
        start_from_features(classifier, dataset, features, autocast=accelerator.autocast, workers=config.workers)
    sampler = DomainBatches(
        dataset.domain_ids,
        config.batch_size,
        seed,
        config.steps,
        sampling=config.sampling,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_step=resumed_after,
    )
    inputs = _inputs(classifier, dataset, augment or AugmentConfig(), features, seed, config, accelerator)
    # Micro-batches are there to save memory: the images of each are sent to the device when it is its turn.
    images_on: Literal["device", "host"] = "host" if config.gradient_accumulation_steps > 1 else "device"
    batches = training_batches(
        dataset, sampler, inputs, accelerator.device, workers=config.workers, images_on=images_on
    )
    classifier.train()
    if trainer.micro_batches.count > 1 and resumed_after == 0:
        mb = trainer.micro_batches
        emit("accumulation", pieces=mb.count, images_at_once=mb.size, way=mb.mode)
    # the cosine takes a second backward through each forward, which what is recorded does not have
    captured = nullcontext() if config.log_ascent_cosine else classifier.captured(accelerator.autocast)
    interval = config.validation_interval
    with manager.watching(), captured:
        for batch in track(batches, "training", total=config.steps - resumed_after, status=trainer.status):
            trainer.train_step(batch)
            step = trainer.steps_done
            is_validated = step % interval == 0 or step == config.steps
            if is_validated:
                trainer.optimizer.flush()
                for weights, validation in (best.offer(step) if trainer.metrics.has_trained else {}).items():
                    trainer.validated = validation.words
                    about = {} if weights == RAW else {"weights": weights}
                    is_best = best.is_best(weights, step)
                    emit("validation", step=step, **about, **validation.numbers, is_best=is_best)
                    prefix = "validation" if weights == RAW else f"validation/{weights}"
                    trainer.metrics.track(step, {f"{prefix}/{name}": v for name, v in validation.numbers.items()})
            manager.end_of_step(step, validated=is_validated)
        trainer.metrics.require_training()

    trainer.metrics.warn_at_the_end()
    states = best.finish(config.steps, announce=resumed_after > 0)  # a power cut may have taken what was saved of it
    chosen = states[best.chosen]
    about = {"weights": best.chosen} if averages else {}
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


def _disam(
    params: list[torch.nn.Parameter],
    method: MethodConfig,
    config: TrainConfig,
    dataset: DomainDataset,
    accelerator: Accelerator,
) -> DISAM:
    if method.name == "disam" and len(dataset.present_domains) == 1:
        warnings.warn(
            f"disam with one source domain ({dataset.present_domains[0]!r}): the variance over domains is 0 and the "
            "run equals sam bit for bit; add a domain, or use method.name=sam",
            stacklevel=3,
        )
    return DISAM(
        params,
        rho=method.effective_rho,
        variance_weight=method.effective_variance_weight,
        variance_over=method.variance_over,
        adaptive=method.adaptive,
        num_domains=len(dataset.domains),
        backward=accelerator.backward,
        # An adapter's gradients fit one flat buffer: one collective per pass, and no wrapper around the model that the
        # frozen part, its split and the text features would have to be called through.
        reduce_gradients=True,
        ascent_cosine=config.log_ascent_cosine,
    )
