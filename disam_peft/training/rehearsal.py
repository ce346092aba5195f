"""What a run will cost, measured: a few batches go through the model as in training and in evaluation. No weight is
changed and no file is written."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.fit_start import make_room
from disam_peft.common.device import to_device
from disam_peft.common.processes import largest
from disam_peft.config.data import AugmentConfig
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.batches import make_sampler
from disam_peft.data.loading.loader import make_eval_loader, make_train_loader
from disam_peft.data.loading.mixup import MixedBatches, mixed
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.training.optimizers import learning_rate_factor
from disam_peft.training.trainer import Trainer

BATCHES = 4
"""At most this many batches are measured, of which the first also warms up and does not count."""
ENOUGH_SECONDS = 8.0
"""No further batch is begun after this time."""


@dataclass(frozen=True)
class Rehearsal:
    """What was measured on one process.

    Attributes:
        load_seconds: to read, decode and augment one training image, in one process.
        encode_seconds: of the frozen part for one training image.
        step_seconds: of the passes of one step, without loading, and without the frozen part where ``stored``; the
            mean over all steps, of which some may perturb nothing. 0 for an adapter that takes none.
        stored: whether the frozen part's output will come from a store, so that steps do not compute it.
        judge_load_seconds, judge_seconds: to load and to judge one image in evaluation.
        judge_start_seconds: what each evaluation costs besides, whatever its size, for example to start processes.
        memory_bytes: the most that this process has held so far, beside the state that training will add; on a GPU the
            most that was held there. None where the system does not tell.
    """

    load_seconds: float
    encode_seconds: float
    step_seconds: float
    stored: bool
    judge_load_seconds: float
    judge_seconds: float
    judge_start_seconds: float
    memory_bytes: int | None


def rehearse(
    classifier: ClipClassifier,
    training: DomainDataset,
    judged: DomainDataset,
    *,
    method: MethodConfig,
    objective: ObjectiveConfig,
    config: TrainConfig,
    evaluation: EvaluationConfig,
    augment: AugmentConfig,
    stored: bool,
    seed: int,
    accelerator: Accelerator,
) -> Rehearsal:
    """Measure on whole batches of the recipe's size. The classifier keeps its weights and has no gradients afterwards.

    Args:
        training: what the run will train on.
        judged: images as evaluation will see them, for example the validation part.
        stored: whether training reads the frozen part's output from a store.

    Raises:
        UserError: as in training: a batch that is too small for the domains, or memory that runs out in a step.
        BadImage: an image that cannot be decoded.
    """
    classifier.to(accelerator.device)
    trainer = None
    if classifier.adapter is not None and takes_no_steps(classifier.adapter.config):
        make_room(classifier, training)
    else:
        trainer = Trainer(classifier, training, method, objective, config, (), accelerator, lambda name, **values: None)
    sampler = make_sampler(
        training,
        config,
        seed,
        mixup=augment.mixup,
        steps=BATCHES,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    transform = TrainTransform(classifier.backbone.preprocessing, augment, seed)
    classifier.train()
    perturbed = share_of_perturbed_steps(method, config)
    kinds = [(is_perturbed, share) for is_perturbed, share in ((True, perturbed), (False, 1 - perturbed)) if share > 0]
    load, encode = [], []
    step: dict[bool, list[float]] = {is_perturbed: [] for is_perturbed in (True, False)}
    loader = make_train_loader(training, sampler, transform, workers=0)
    batches = mixed(loader, sampler) if isinstance(sampler, MixedBatches) else loader
    for seconds, batch in _timed(iter(batches), accelerator.device):
        images = len(batch["labels"])
        load.append(seconds / images)
        begin = _now(accelerator)
        if stored:
            with accelerator.autocast():
                batch["frozen"] = _encoded(classifier, batch.pop("pixels"))
        encode.append((_now(accelerator) - begin) / images)
        for is_perturbed, _ in kinds:
            if trainer is None:
                break
            begin = _now(accelerator)
            trainer.disam.rho = method.effective_rho if is_perturbed else 0.0
            trainer.rehearse_step(batch)
            step[is_perturbed].append(_now(accelerator) - begin)
        for parameter in classifier.trainable().values():
            parameter.grad = None
    classifier.eval()
    judge_load, judge, judge_start = _judged(classifier, judged, evaluation, accelerator)
    return Rehearsal(
        load_seconds=_typical(load),
        encode_seconds=_typical(encode),
        step_seconds=sum(share * _typical(step[is_perturbed]) for is_perturbed, share in kinds if step[is_perturbed]),
        stored=stored,
        judge_load_seconds=judge_load,
        judge_seconds=judge,
        judge_start_seconds=judge_start,
        memory_bytes=_held(accelerator.device),
    )


def share_of_perturbed_steps(method: MethodConfig, config: TrainConfig) -> float:
    """The share of the run's steps that have a second pass."""
    steps = range(config.steps)
    radii = [method.rho_in_step(step, config.steps, learning_rate_factor(config, step)) for step in steps]
    return sum(rho > 0 for rho in radii) / config.steps


@torch.no_grad()
def _judged(
    classifier: ClipClassifier, judged: DomainDataset, config: EvaluationConfig, accelerator: Accelerator
) -> tuple[float, float, float]:
    some = judged.select(range(min(len(judged), BATCHES * config.batch_size)))
    loader = make_eval_loader(some, classifier.backbone.image_transform, config.batch_size, workers=0)
    load, judge = [], []
    for seconds, batch in _timed(iter(loader), accelerator.device):
        images = len(batch["labels"])
        load.append(seconds / images)
        begin = _now(accelerator)
        with accelerator.autocast():
            classifier.logits(_encoded(classifier, batch["pixels"]))
        judge.append((_now(accelerator) - begin) / images)
    of_load, of_judge = _typical(load), _typical(judge)
    first = some.select(range(min(len(some), config.batch_size)))
    begin = _now(accelerator)
    for batch in make_eval_loader(
        first, classifier.backbone.image_transform, config.batch_size, workers=config.workers
    ):
        with accelerator.autocast():
            classifier.logits(_encoded(classifier, batch["pixels"]))
    whole = _now(accelerator) - begin
    return of_load, of_judge, max(0.0, whole - len(first) * (of_load + of_judge))


def _encoded(classifier: ClipClassifier, pixels_BCHW: Tensor) -> Tensor:
    like = next(classifier.model.parameters())
    return classifier.encode_frozen(to_device(pixels_BCHW, like.device).to(like.dtype))


def _timed(batches: Iterator[dict[str, Tensor]], device: torch.device) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Batches and how long each took to load, until there are enough. Of several processes each has as many, since
    they wait for one another in a step."""
    start = time.perf_counter()
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield time.perf_counter() - begin, batch
        if largest(int(time.perf_counter() - start > ENOUGH_SECONDS), device):
            return


def _typical(seconds: list[float]) -> float:
    return statistics.median(seconds[1:] or seconds)


def _now(accelerator: Accelerator) -> float:
    if accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _held(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
