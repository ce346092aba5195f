"""The training loop: data in, best adapter out. Shapes in this file: B samples of this rank, D domains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.progress import track
from disam_peft.config.data import AugmentConfig, FeatureConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.checkpoint.manager import Checkpoints, Saver
from disam_peft.training.checkpoint.state import TrainingState
from disam_peft.training.compiled_blocks import CompiledBlocks
from disam_peft.training.feed import feed
from disam_peft.training.guarded_optimizer import Taken, Updates
from disam_peft.training.micro_batching import StepGradient, choose_micro_batches
from disam_peft.training.optimizers import learning_rate_factor
from disam_peft.training.selection import BestState
from disam_peft.training.step_metrics import StepCounters

MAX_SKIPPED_IN_A_ROW = 10
OnEvent = Callable[..., None]


@dataclass(frozen=True)
class FitResult:
    """How a run of training went.

    Attributes:
        best_step: number of optimizer steps after which the chosen state was reached; the last one if nobody
            validated.
        best_score: its score; None if nobody validated. Where it was found before the run was resumed: the same
            numbers as a plain tuple.
        first_loss, last_loss: mean training loss of the first and the last step, at w.
        skipped_steps: steps without effect, because a loss or gradient was not finite.
    """

    best_step: int
    best_score: Any
    first_loss: float
    last_loss: float
    skipped_steps: int


def fit(
    classifier: ClipClassifier,
    dataset: DomainDataset,
    *,
    method: MethodConfig | None = None,
    config: TrainConfig | None = None,
    augment: AugmentConfig | None = None,
    features: FeatureConfig | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    validate: Callable[[], Any] | None = None,
    on_best: Callable[[], None] | None = None,
    on_event: OnEvent | None = None,
    checkpoints: Checkpoints | None = None,
) -> FitResult:
    """Train the classifier's adapter on ``dataset``, which holds source data only; in the end it is in its best state.

    Args:
        classifier: moved to the accelerator's device.
        dataset: training samples; their labels index the classifier's classes.
        features: whether to train from stored features of the frozen part; unset: from images.
        seed: of batches, augmentation and dropout.
        accelerator: from ``start_accelerator``; the default is one with the config's precision.
        validate: scores the present state on held-back source data; greater is better. Called at intervals and after
            the last step; the state with the highest score (the first of equals) is the one that is kept. Unset: the
            last state is kept.
        on_best: called in that state, whenever it is a new best, to save it; after a resume once more at the end.
        on_event: called on the main process as ``on_event(name, **values)`` with the records of ``metrics.jsonl``.
        checkpoints: where to save at intervals, and whether to go on from there: whatever interrupted the run, the same
            processes then come to the same bits. SIGTERM and Ctrl-C save and end it. Unset: nothing is saved.

    Raises:
        UserError: nothing to train; a batch too small for the domains; losses that stay not finite (names the files);
            more pieces of gradient accumulation than images; a checkpoint that cannot be written, is damaged, or is of
            another run.
        Stopped: by a signal; with ``checkpoints`` alone.
    """
    method, config = method or MethodConfig(), config or TrainConfig()
    accelerator = accelerator or start_accelerator(config.mixed_precision)
    emit = on_event if on_event is not None and accelerator.is_main_process else _ignore
    trainable = classifier.trainable()
    if not trainable:
        raise UserError("the classifier has no adapter with trainable parameters; build one and hand it over")
    set_seed(seed, device_specific=True)  # other dropout masks on other ranks
    classifier.to(accelerator.device)
    params = list(classifier.trainable().values())
    optimizer = _optimizer(params, config, accelerator)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))
    stepper = accelerator.prepare_optimizer(optimizer)
    pieces = choose_micro_batches(classifier, dataset, config, method, accelerator.num_processes)
    disam = _disam(params, method, config, dataset, accelerator)
    gradient = StepGradient(classifier, disam, pieces, accelerator)
    counters = StepCounters(dataset.domains, len(dataset.present_domains), method)
    best = BestState(classifier, validate, on_best)
    state = TrainingState(classifier, optimizer, scheduler, accelerator.scaler, counters, best)
    saver = Saver(checkpoints, state, config, accelerator)
    saver.resume()
    resumed_after = state.step

    def is_logged(step: int) -> bool:
        return step % config.log_every == 0 or step in (1, config.steps)

    def settled(taken: Taken, skipped: bool) -> None:
        """What follows from a step: for the schedule, the state and the records."""
        if not skipped:
            scheduler.step()
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        if state.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(_diverged(dataset, taken.indices_B, config))
        state.losses = (state.losses[0] if state.losses else taken.report.loss, taken.report.loss)
        counters.count(taken.report, skipped)
        if is_logged(taken.step) or skipped:
            values = counters.numbers(taken.report, taken.gradient_norm)
            emit("step", step=taken.step, learning_rate=taken.learning_rate, skipped=skipped, **values)
            _track(accelerator, taken.step, {"learning_rate": taken.learning_rate, **values})
        state.step = taken.step

    updates = Updates(stepper, settled)
    batches = feed(
        classifier, dataset, config, augment or AugmentConfig(), features, seed, accelerator, first_step=state.step
    )
    classifier.train()
    if pieces.count > 1 and state.step == 0:
        emit("accumulation", pieces=pieces.count, images_at_once=pieces.size, way=pieces.mode)
    compiled = CompiledBlocks.of(classifier) if config.compile else nullcontext()
    # the cosine takes a second backward through each forward, which what is recorded does not have
    captured = nullcontext() if config.log_ascent_cosine else classifier.captured(accelerator.autocast)
    with saver.watching(), captured:
        for step, batch in enumerate(track(batches, "training", total=config.steps - state.step), state.step + 1):
            try:
                with compiled:
                    report = gradient(batch)
            except torch.OutOfMemoryError as error:  # the weights are w again; the notes hold what is known of a remedy
                updates.settle()
                hint = " ".join(getattr(error, "__notes__", []))
                raise UserError(f"out of memory at step {step}: {error} {hint} {pieces.memory_remedy}") from error
            updates.settle()  # of the step before: now that these passes are queued, waiting costs nothing
            gradient_norm = _clipped(params, config, accelerator)
            updates.take(Taken(step, batch["indices"], report, gradient_norm, float(scheduler.get_last_lr()[0])))
            validated = step % config.validation_interval == 0 or step == config.steps
            if is_logged(step) or validated:
                updates.settle()
            score = best.offer(step) if validated else None
            if score is not None:
                emit("validation", step=step, **score._asdict())
                _track(accelerator, step, {f"validation/{name}": value for name, value in score._asdict().items()})
            saver.end_of_step(step, validated=validated, settle=updates.settle)

    counters.warn_at_the_end()
    best.restore(announce=resumed_after > 0)  # a power cut may have taken what was saved of it
    emit("trained", best_step=best.step or config.steps, **counters.totals())
    assert state.losses is not None  # a run has a step
    return FitResult(
        best_step=best.step or config.steps,
        best_score=best.score,
        first_loss=float(state.losses[0]),
        last_loss=float(state.losses[1]),
        skipped_steps=counters.skipped,
    )


def _ignore(name: str, **values: Any) -> None:
    """Nobody records."""


def _optimizer(
    params: list[torch.nn.Parameter], config: TrainConfig, accelerator: Accelerator
) -> torch.optim.Optimizer:
    # a fused optimizer would hide from Accelerate that a loss scaler skipped its step
    fused = accelerator.scaler is None and accelerator.device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        rate, decay = config.learning_rate, config.weight_decay
        return torch.optim.SGD(params, rate, config.momentum, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay, fused=fused)


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
        adaptive=method.adaptive,
        num_domains=len(dataset.domains),
        backward=accelerator.backward,
        # An adapter's gradients fit one flat buffer: one collective per pass, and no wrapper around the model that the
        # frozen part, its split and the text features would have to be called through.
        reduce_gradients=True,
        ascent_cosine=config.log_ascent_cosine,
    )


def _clipped(params: list[torch.nn.Parameter], config: TrainConfig, accelerator: Accelerator) -> Tensor:
    """The norm of the gradient before clipping, at loss scale 1."""
    limit = float("inf") if config.clip_norm is None else config.clip_norm
    if accelerator.scaler is not None or config.clip_norm is not None:
        norm = accelerator.clip_grad_norm_(params, limit)  # unscales, once per step
        assert norm is not None
        return norm
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])


def _track(accelerator: Accelerator, step: int, values: dict[str, Any]) -> None:
    if not accelerator.trackers:
        return
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{name}/{inner}": v for inner, v in value.items() if v is not None})
        elif value is not None:
            flat[name] = value
    accelerator.log(flat, step=step)


def _diverged(dataset: DomainDataset, indices_B: Tensor, config: TrainConfig) -> str:
    files = "\n".join(f"  {dataset.source(i)}" for i in indices_B[:10].tolist())
    hint = "mixed_precision=bf16" if config.mixed_precision == "fp16" else "a lower train.learning_rate or method.rho"
    return (
        f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite and were skipped; "
        f"try {hint}. The last batch held, among others:\n{files}"
    )
