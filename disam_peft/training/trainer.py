"""One optimizer step, in order, and all that takes part in it.

Shapes in this file: B samples of this process's part of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.adapters.base import Adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.fit_start import make_room
from disam_peft.config.average import EmaConfig, KeptAverageConfig, too_slow
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig, adapter_conflict
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError, did_you_mean
from disam_peft.objectives.anchors.adapter_term import AdapterTerm
from disam_peft.objectives.run_objective import build_objective
from disam_peft.training.averages.weight_averages import WeightAverages
from disam_peft.training.compiled_blocks import CompiledBlocks
from disam_peft.training.guarded_optimizer import GuardedOptimizer
from disam_peft.training.micro_batching import StepGradient, choose_micro_batches
from disam_peft.training.optimizers import Schedule, build_optimizer, learning_rate_factor
from disam_peft.training.recomputed_blocks import blocks_with_gradient, recomputed_blocks
from disam_peft.training.selection import same_tensors
from disam_peft.training.step_metrics import FinishedStep, OnEvent, StepMetrics

Batch = dict[str, Tensor]


class Trainer:
    """All that takes part in one optimizer step after another.

    Args:
        classifier: on the accelerator's device, with an adapter that has trainable parameters.
        dataset: training samples, of source domains only.
        averages: one config for each average of the weights.
        on_event: gets the records of ``metrics.jsonl``.
        seed: of what the objective draws.

    Raises:
        UserError: a loss that cannot train this adapter, or settings of it that do not fit the data.
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
        seed: int = 0,
    ) -> None:
        self.classifier, self.config, self.accelerator = classifier, config, accelerator
        make_room(classifier, dataset)  # before the optimizer takes hold of the parameters
        self.trained = classifier.trainable()
        params = list(self.trained.values())
        # A fused optimizer would hide from Accelerate that a loss scaler skipped its step.
        fused = accelerator.scaler is None and accelerator.device.type in ("cpu", "cuda")
        optimizer = build_optimizer(params, config, fused=fused)
        self.schedule = Schedule(optimizer, config)  # before Accelerate wraps the optimizer's step
        self.optimizer = GuardedOptimizer(optimizer, list(self.trained), accelerator)
        if conflict := adapter_conflict(objective, classifier.adapter.config if classifier.adapter else None):
            raise UserError(conflict)
        self.objective = build_objective(
            objective,
            dataset.present_domains,
            config.steps,
            adapter_term=_term_of(classifier.adapter),
            labels_N=dataset.labels,
            class_names=dataset.classes,
            seed=seed,
        )
        self.objective.remember_start(params)
        self.objective.prepare(torch.from_numpy(dataset.domain_ids).bincount(minlength=len(dataset.domains)))
        self.micro_batches = choose_micro_batches(
            classifier, dataset, config, method, accelerator.num_processes, self.objective
        )
        self.method, self.disam = method, _disam(params, method, config, dataset, accelerator)
        if method.effective_rho > 0:
            self.disam.rho_factors = rho_factors(self.trained, method.rho_factors)
        self.gradient = StepGradient(
            classifier, self.disam, self.micro_batches, accelerator, self.objective, config.batch_size
        )
        for average in averages:
            if isinstance(average, EmaConfig) and (message := too_slow(average, config.steps)):
                warnings.warn(message, stacklevel=2)
        self.averages = WeightAverages(averages, params, config.steps)
        self.metrics = StepMetrics(dataset, method, config, on_event, accelerator, objective)
        self.compiled = CompiledBlocks.of(classifier) if config.compile else nullcontext()
        self.recomputed = recomputed_blocks(classifier) if config.gradient_checkpointing else nullcontext
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
        about = self.steps_done, self.config.steps, learning_rate_factor(self.config, self.steps_done)
        self.disam.rho = self.method.rho_in_step(*about)
        self.disam.variance_weight = self.method.variance_weight_in_step(*about)
        try:
            with self.compiled, self.recomputed():
                report = self.gradient(batch)  # both passes: p.grad is the gradient at w + e, the weights are w again
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(step, error) from error
        self.optimizer.flush()  # of the step before: while these passes run on a GPU, waiting for it costs nothing
        gradient_norm = self.optimizer.clip_gradients(self.config.clip_norm)
        finished = FinishedStep(
            step,
            batch["indices"],
            report,
            gradient_norm,
            self.schedule.learning_rate,
            self.disam.rho,
            self.disam.variance_weight,
        )
        outcome = self.optimizer.step(report.is_finite & torch.isfinite(gradient_norm))
        self.schedule.step(outcome)
        self.averages.update(outcome)
        self.metrics.record(finished, outcome)
        if self.metrics.is_logged(step):
            self.optimizer.flush()
        self.steps_done = step

    def rehearse_step(self, batch: Batch) -> None:
        """The passes of a step, which leave a gradient and the weights as they were. It shows what a step costs.

        Raises:
            UserError: memory ran out.
        """
        try:
            with self.recomputed():
                self.gradient(batch)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(self.steps_done + 1, error) from error

    def status(self) -> str:
        """The newest numbers that are known without waiting for the device, for a progress bar."""
        recorded = self.metrics.recorded
        parts = [] if recorded is None else [f"step {recorded[0]}: loss {recorded[1]:.3f}"]
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
        remedy = self.micro_batches.memory_remedy
        if not self.config.gradient_checkpointing and blocks_with_gradient(self.classifier):
            remedy += " train.gradient_checkpointing=true needs less memory, too, with the same result."
        return UserError(f"out of memory at step {step}: {error} {hint} {remedy}")


def _disam(
    params: list[torch.nn.Parameter],
    method: MethodConfig,
    config: TrainConfig,
    dataset: DomainDataset,
    accelerator: Accelerator,
) -> DISAM:
    if method.has_variance and len(dataset.present_domains) == 1:
        warnings.warn(
            f"{method.name} with one source domain ({dataset.present_domains[0]!r}): the variance over domains is 0 "
            f"and the run equals {method.descent} bit for bit; add a domain, or use method.name={method.descent}",
            stacklevel=3,
        )
    return DISAM(
        params,
        rho=method.effective_rho,
        variance_weight=method.effective_variance_weight,
        variance_over=method.variance_over,
        variance_scale=method.variance_scale,
        variance_form=method.variance_form,
        descent=method.descent,
        alpha=method.effective_alpha,
        adaptive=method.adaptive,
        num_domains=len(dataset.domains),
        backward=accelerator.backward,
        # An adapter's gradients fit one flat buffer: one collective per pass, and no wrapper around the model that the
        # frozen part, its split and the text features would have to be called through.
        reduce_gradients=True,
        ascent_cosine=config.log_ascent_cosine,
    )


def _term_of(adapter: Adapter | None) -> AdapterTerm | None:
    if adapter is None or adapter.own_term() is None:
        return None

    def compute() -> Tensor:
        term = adapter.own_term()
        assert term is not None  # it is there for all steps or for none
        return term

    return AdapterTerm(adapter.kind, compute, in_ascent=adapter.own_term_in_ascent)


def rho_factors(trained: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[Tensor, float]:
    """Tensor -> factor on rho, from ``method.rho_factors``.

    Args:
        trained: the trained tensors by name.
        factors: patterns of names, as on a command line (``*``, ``?``, ``[ab]``), and their factors.

    Raises:
        UserError: a pattern that matches no name, or a name that matches several.
    """
    found: dict[str, str] = {}
    for pattern in factors:
        names = [name for name in trained if fnmatchcase(name, pattern)]
        if not names:
            some = ", ".join(list(trained)[:6]) + (", ..." if len(trained) > 6 else "")
            raise UserError(
                f"method.rho_factors: no trained tensor has a name like {pattern!r}{did_you_mean(pattern, trained)}; "
                f"the {len(trained)} names are {some}"
            )
        if twice := [name for name in names if name in found]:
            raise UserError(
                f"method.rho_factors: {twice[0]} matches {found[twice[0]]!r} and {pattern!r}; make the patterns such "
                "that each tensor matches one of them"
            )
        found |= dict.fromkeys(names, pattern)
    return {trained[name]: factors[pattern] for name, pattern in found.items() if factors[pattern] != 1}
