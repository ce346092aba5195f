"""Trains a linear probe with many settings at once and ranks them on the source domains; the held-out one is unused."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from disam_peft.adapters.base import Autocast
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.classification.domain_inference import infer_domains
from disam_peft.classification.frozen_features import evaluation_store, training_store
from disam_peft.common.files import output_folder
from disam_peft.common.records import write_json
from disam_peft.config.data import FeatureConfig
from disam_peft.config.overrides import override
from disam_peft.config.protocol import as_held_out
from disam_peft.config.recipe import Recipe
from disam_peft.config.sweep import check_sweep
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.duplicates import check_duplicates
from disam_peft.data.load import load
from disam_peft.data.loading.batches import make_sampler
from disam_peft.data.splits import held_out_domains, require_two_classes
from disam_peft.errors import UserError
from disam_peft.evaluation.metrics import metrics_of_domains
from disam_peft.evaluation.predict import Predictions
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.split_data import SplitData, holding_out, split_data
from disam_peft.training import selection
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.stacked_probes import ProbeSetting, ProbeStack, ProbeTrial, fit_probes, probe_features


@dataclass(frozen=True)
class SweepRow:
    """One setting, and how well its probe does on the validation data of the source domains.

    Attributes:
        source_top1: mean over the source domains of the best state, 0 to 1; None if it diverged.
        source_nll: the same of the negative log-likelihood, in nats.
    """

    held_out: str | None
    learning_rate: float
    rho: float
    variance_weight: float
    best_step: int
    source_top1: float | None
    source_nll: float | None

    @property
    def method(self) -> str:
        """The method that this setting is: with lambda 0 DISAM is SAM, and with rho 0 both are ERM."""
        if self.rho == 0:
            return "erm"
        return "sam" if self.variance_weight == 0 else "disam"

    def overrides(self) -> list[str]:
        """For ``disam-peft train``, to train this setting."""
        used = {"erm": [], "sam": ["rho"], "disam": ["rho", "variance_weight"]}[self.method]
        return [
            f"method.name={self.method}",
            f"train.learning_rate={self.learning_rate!r}",
            *(f"method.{name}={getattr(self, name)!r}" for name in used),
        ]


class _Score(NamedTuple):
    """A state by source validation; the better of two is greater.

    Attributes:
        decides: the score by the recipe's rule of selection.
        mean_top1, mean_nll: what is shown of it, means over the source domains.
    """

    decides: tuple[float, ...]
    mean_top1: float
    mean_nll: float


def sweep(
    recipe: Recipe,
    *,
    learning_rates: Sequence[float] = (),
    rhos: Sequence[float] = (),
    variance_weights: Sequence[float] = (),
) -> list[SweepRow]:
    """Train the recipe's linear probe with every combination, all of them side by side; the best first.

    Values that are left out are the recipe's. The best is the one whose best state the recipe's rule of selection puts
    first, and of equals the simplest: ERM before SAM before DISAM, then the smaller rho, lambda and learning rate.
    Averages of the weights are not kept. The results go to ``sweep_file``.

    Raises:
        UserError: another adapter than a linear probe; values out of range; augmentation without ``features.views``.
    """
    check_sweep(recipe, learning_rates, rhos, variance_weights)
    settings = _settings(recipe, learning_rates, rhos, variance_weights)
    accelerator = start_accelerator(recipe.train.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(f"a sweep runs in one process, not in {accelerator.num_processes}: start it without a launcher")
    dataset = load(recipe.data)
    require_two_classes(dataset)
    rows = []
    for held_out in held_out_domains(recipe.protocol.held_out, dataset.present_domains):
        data = split_data(holding_out(recipe, held_out), dataset)
        check_duplicates(data.source_parts(), recipe.data.duplicates, target=data.target)
        found = _sweep_sources(recipe, data, held_out, settings, accelerator.device, accelerator.autocast)
        path = sweep_file(recipe, held_out)
        output_folder(path.parent)
        write_json(path, [vars(row) for row in found])
        rows += found
    return rows


def sweep_file(recipe: Recipe, held_out: str | None) -> Path:
    """Where a sweep writes its table."""
    return recipe.output / recipe.name / f"sweep-{recipe.folder(held_out).name}.json"


def ties(rows: Sequence[SweepRow]) -> int:
    """How many settings are as good as the first."""
    first = rows[0]
    same = (first.source_top1, first.source_nll)
    return sum((row.source_top1, row.source_nll) == same for row in rows) - 1 if first.source_top1 is not None else 0


def _settings(
    recipe: Recipe, learning_rates: Sequence[float], rhos: Sequence[float], variance_weights: Sequence[float]
) -> list[ProbeSetting]:
    method = recipe.method
    return [
        ProbeSetting(*values)
        for values in _products(
            learning_rates or [recipe.train.learning_rate],
            rhos or [method.effective_rho],
            variance_weights or [method.effective_variance_weight],
        )
    ]


def _sweep_sources(
    recipe: Recipe,
    data: SplitData,
    held_out: str | None,
    settings: list[ProbeSetting],
    device: torch.device,
    autocast: Autocast,
) -> list[SweepRow]:
    training, validation = data.training, data.validation
    pretrained = load_pretrained(recipe, training.prompt_names, device)
    inferred = infer_domains(recipe.domains, pretrained.backbone, training, recipe.seed, workers=recipe.train.workers)
    training = inferred.dataset
    classifier = pretrained.with_new_adapter()
    head = cast(LinearProbeAdapter, classifier.adapter)
    stores = FeatureConfig(store=True, views=recipe.features.views, folder=recipe.features.folder)
    workers = recipe.train.workers
    train_store = training_store(
        classifier, training, recipe.augment, recipe.seed, stores, autocast=autocast, workers=workers
    )
    validation_store = evaluation_store(
        classifier, validation, stores, autocast=autocast, workers=recipe.evaluation.workers
    )
    views = train_store.views
    every = np.arange(len(training))
    train_NE = torch.cat([train_store.rows(every, view) for view in range(views)]).to(device)
    validation_ME = validation_store.rows(np.arange(len(validation))).to(device)

    labels, domains = torch.from_numpy(validation.labels), torch.from_numpy(validation.domain_ids)

    def judged(logits_NC: Tensor) -> _Score:
        predictions = Predictions(logits_NC.cpu(), labels, domains, validation.domains)
        found = selection.validation(recipe.selection, metrics_of_domains(predictions))
        return _Score(selection.comparable(found.score), found.numbers["mean_top1"], -found.numbers["negative_nll"])

    trials = fit_probes(
        ProbeStack(
            head,
            settings,
            adaptive=recipe.method.adaptive,
            variance_over=recipe.method.variance_over,
            variance_scale=recipe.method.variance_scale,
            variance_form=recipe.method.variance_form,
        ),
        probe_features(train_NE, head),
        torch.from_numpy(training.labels).repeat(views).to(device),
        torch.from_numpy(training.domain_ids).repeat(views).to(device),
        _rows(recipe, training, views, device),
        recipe.train,
        lambda logits: [judged(logits_NC) for logits_NC in logits],
        probe_features(validation_ME, head),
    )
    return [
        SweepRow(
            held_out,
            trial.setting.learning_rate,
            trial.setting.rho,
            trial.setting.variance_weight,
            trial.best_step,
            None if trial.best_score is None else _defined(trial.best_score.mean_top1),
            None if trial.best_score is None else _defined(trial.best_score.mean_nll),
        )
        for trial in sorted(trials, key=_rank)
    ]


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rank(trial: ProbeTrial) -> tuple[bool, tuple[float, ...], tuple[float, ...]]:
    """The best trial has the least rank, of equals the simplest; those that diverged come last."""
    setting, score = trial.setting, trial.best_score
    variance_weight = setting.variance_weight if setting.rho > 0 else 0.0
    simpler = (setting.rho > 0, variance_weight > 0, setting.rho, variance_weight, setting.learning_rate)
    return score is None, () if score is None else tuple(-x for x in score.decides), (*simpler, setting.variance_weight)


def _products(*values: Sequence[float]) -> Iterator[tuple[float, ...]]:
    """Every combination, each once."""
    return product(*(dict.fromkeys(of_one) for of_one in values))


def _rows(recipe: Recipe, training: DomainDataset, views: int, device: torch.device) -> Iterator[Tensor]:
    """The batches that a run with this recipe has, as indices of stored features."""
    for batch in make_sampler(training, recipe.train, recipe.seed):
        indices, epochs = (np.array(column, dtype=np.int64) for column in zip(*batch, strict=True))
        yield torch.from_numpy(indices + len(training) * (epochs % views)).to(device)


def best_command(recipe_path: Path, given: Sequence[str], row: SweepRow) -> str:
    """What to type to train a setting; ``given`` are the overrides that the sweep was started with."""
    chosen = [] if row.held_out is None else [override("protocol.held_out", as_held_out(row.held_out))]
    arguments = [str(recipe_path), *given, *row.overrides(), *chosen]
    return shlex.join(["disam-peft", "train", *arguments])
