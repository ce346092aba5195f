"""What a run says of itself while it works: the data it found, how they are split, what is trained, every validation,
and where the results are. Nothing here changes what is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disam_peft.backbones.base import BEFORE_STEM
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.domain_inference import InferredDomains
from disam_peft.common import progress
from disam_peft.common.processes import is_main
from disam_peft.config.adapters import adapter_label
from disam_peft.config.average import kept_averages
from disam_peft.config.data import DomainsConfig
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.recipe import Recipe
from disam_peft.config.unused import method_in_words, unused_settings
from disam_peft.config.wording import objective_in_words, with_settings
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.sources.given_splits import PARTS
from disam_peft.experiments.split_data import SplitData

_LISTED = 8


class Narrator:
    """Hands sentences to ``say``, on the main process alone.

    Args:
        say: takes one line; None: nothing is said.
        verbose: also say what is only of interest when something is looked into.
    """

    def __init__(self, say: Callable[[str], object] | None = None, *, verbose: bool = False) -> None:
        self._say, self.verbose = say, verbose
        self._first: tuple[int, float] | None = None  # step and time of the first record
        self._steps, self._rule = 0, ""

    def say(self, text: str) -> None:
        if self._say is not None and is_main():
            self._say(text)
            progress.line_was_written()

    def data(self, dataset: DomainDataset) -> None:
        """What was found, and what was passed over."""
        domains = dataset.present_domains
        counts = np.bincount(dataset.domain_ids, minlength=len(dataset.domains))
        listed = _some(f"{name} {counts[dataset.domains.index(name)]}" for name in domains)
        self.say(
            f"data: {dataset.origin}: {_count(len(dataset), 'image')} of {_count(len(dataset.classes), 'class')} in "
            f"{_count(len(domains), 'domain')} ({listed})"
        )
        if dataset.given_parts is not None:
            given = _some(f"{part} {dataset.given_parts.count(part)}" for part in PARTS)
            self.say(f"  the data give the splits: {given} (data.given_splits=ignore: not used)")
        if dataset.ignored:
            self.say(f"  passed over: {_some(f'{count} {kind}' for kind, count in dataset.ignored.items())}")
        if dataset.skipped:
            self.say(f"  left out, as data.skip_bad says: {_count(len(dataset.skipped), 'image')} that cannot be used")
        if self.verbose:
            self.say(f"  classes: {', '.join(dataset.prompt_names)}")

    def run(self, folder: Path, data: SplitData, held_out: str | None, place: tuple[int, int] = (1, 1)) -> None:
        """Which run this is, and how its data are split."""
        number, count = place
        which = f"run {number} of {count}: " if count > 1 else "run: "
        trained = "on all domains" if held_out is None else f"without {held_out}"
        self.say(f"{which}{trained}, in {folder}")
        parts = [f"{len(data.training)} train", f"{len(data.validation)} validate"]
        parts += [
            f"{len(dataset)} {_JUDGED.get(split, split)}"
            for split, dataset in data.by_split().items()
            if split != "source_validation"
        ]
        self.say(f"  images: {', '.join(parts)}")
        if self.verbose:
            for name in data.sources.present_domains:
                number = data.sources.domains.index(name)
                sizes = [int((part.domain_ids == number).sum()) for part in (data.training, data.validation)]
                self.say(f"    {name}: {sizes[0]} train, {sizes[1]} validate")

    def inferred(self, config: DomainsConfig, found: InferredDomains) -> None:
        """The domains that training has, where they are not those of the data."""
        if config.infer != "none":
            listed = _some(f"{name} {sum(row.values())}" for name, row in found.counts.items())
            self.say(f"  domains for training: {len(found.counts)} were inferred ({listed})")

    def model(self, recipe: Recipe, classifier: ClipClassifier) -> None:
        """What is trained, and which part of the model is frozen."""
        trained = classifier.trainable()
        numbers = sum(p.numel() for p in trained.values())
        base = classifier.backbone.base_parameters()
        replaced = {id(base[key]) for key in trained if key in base}  # weights of a full tower, kept beside the trained
        every = {id(p): p.numel() for p in [*classifier.parameters(), *trained.values()] if id(p) not in replaced}
        name, tag = recipe.backbone.name, recipe.backbone.pretrained
        self.say(
            f"  trained: {adapter_label(recipe.adapter)} on {name if tag is None else f'{name}:{tag}'}, {numbers:,} of "
            f"{sum(every.values()):,} parameters ({_share(numbers / sum(every.values()))})"
        )
        if self.verbose:
            for key, parameter in trained.items():
                self.say(f"    {key} {tuple(parameter.shape)}")
        self.say(f"  frozen: {frozen_part(classifier)}")

    def training(self, recipe: Recipe, data: SplitData, device: torch.device, processes: int) -> None:
        """The steps that are to come."""
        config = recipe.train
        self._first, self._steps, self._rule = None, config.steps, recipe.selection.rule
        if takes_no_steps(recipe.adapter):
            self.say(
                f"  training: {recipe.adapter.kind} is fitted to the features of the training images, and takes no step"
            )
            self._without_effect(recipe)
            return
        where = "the CPU" if device.type == "cpu" else f"{device}"
        precision = {"no": "float32"}.get(config.mixed_precision, config.mixed_precision)
        together = f", {processes} processes" if processes > 1 else ""
        passes = config.steps * config.batch_size / max(1, len(data.training))
        self.say(
            f"  training: {method_in_words(recipe.method)}, {_count(config.steps, 'step')} of "
            f"{_count(config.batch_size, 'image')} ({passes:.3g} times through the training images), validated every "
            f"{_count(config.validation_interval, 'step')}; {precision} on {where}{together}"
        )
        if described := objective_in_words(recipe):
            self.say(f"  objective: {described}")
        if averages := kept_averages(recipe.average):
            self.say(f"  averages of the weights: {', '.join(with_settings(average) for average in averages)}")
        self._without_effect(recipe)

    def _without_effect(self, recipe: Recipe) -> None:
        if unused := unused_settings(recipe):
            self.say(f"  without effect: {'; '.join(unused)}")

    def event(self, event: str, **values: Any) -> None:
        """A record of ``metrics.jsonl``, of which those of steps and validations are told."""
        if event == "start":
            self.say(f"  start: {_start(values)}")
        if event not in ("step", "validation"):
            return
        step, now = int(values["step"]), time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if event == "step":
            if self.verbose:
                self.say(f"  step {step} of {self._steps}: {_loss(values['loss'])}, rate {values['learning_rate']:.3g}")
            return
        parts = _validation(values, self._rule)
        parts += [self._time_left(step, now)] if step < self._steps else []
        weights = f" ({values['weights']})" if "weights" in values else ""
        best = ", the best so far" if values.get("is_best") else ""
        self.say(f"  step {step} of {self._steps}: validation{weights} {', '.join(filter(None, parts))}{best}")

    def _time_left(self, step: int, now: float) -> str:
        assert self._first is not None
        first_step, begin = self._first
        if step <= first_step:
            return ""
        return f"{progress.duration((now - begin) / (step - first_step) * (self._steps - step))} left"


def _start(values: Mapping[str, Any]) -> str:
    """How an adapter started from the training features: what it told, and how good it is on source validation."""
    validated = f"; validation accuracy {100 * values['mean_top1']:.1f} %" if "mean_top1" in values else ""
    if "training_top1" in values:
        loss, top1 = _loss(values.get("training_loss")), 100 * values["training_top1"]
        return f"the head was fitted to the training images, {loss}, accuracy {top1:.1f} %{validated}"
    of_validation = ("score", "mean_top1", "negative_nll", "worst_top1", "worst_negative_nll")
    told = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in of_validation)
    return f"fitted to the training images ({told}){validated}"


def _validation(values: Mapping[str, Any], rule: str) -> list[str]:
    """What the validated weights reached: the numbers by which ``rule`` finds the best state, ties included."""
    if "mean_top1" not in values:
        return [f"score {values.get('score')}"]
    parts = [f"accuracy {100 * values['mean_top1']:.1f} %", f"NLL {-values['negative_nll']:.4f}"]
    if rule == "worst_source":
        worst = f"accuracy {100 * values['worst_top1']:.1f} %, NLL {-values['worst_negative_nll']:.4f}"
        parts.append(f"of the worst domain {worst}")
    return parts


_JUDGED = {"held_out": "are held out", "held_out_test": "of these are its test part", "test": "are the test part"}


def frozen_part(classifier: ClipClassifier) -> str:
    """Where the part ends that training cannot change, and how often it runs."""
    backbone, adapter, split = classifier.backbone, classifier.adapter, classifier.image_split
    if split is None:
        image = "the whole image tower, which runs once per image of a batch"
    elif split == BEFORE_STEM:
        image = "nothing of the image tower, whose first layers are trained"
    elif split == 0 and backbone.image_blocks == 0:
        image = "nothing of the image tower, which cannot be split"
    elif split == 0:
        image = "what comes before the blocks of the image tower, which runs once per batch"
    else:
        image = f"the first {split} of {backbone.image_blocks} blocks of the image tower, which run once per batch"
    if adapter is None or not (adapter.replaces_class_prompts or adapter.text_split is not None):
        return f"{image}; the whole text tower, which runs once"
    if adapter.has_class_features_of_images():
        return f"{image}; the weights of the text tower, which runs in every pass over the class prompts of each image"
    if adapter.replaces_class_prompts:
        return f"{image}; the weights of the text tower, which runs in every pass because its prompts are trained"
    if adapter.text_split == BEFORE_STEM:
        return f"{image}; nothing of the text tower, whose first layers are trained"
    if adapter.text_split == 0:
        return f"{image}; what comes before the blocks of the text tower, which runs once"
    return f"{image}; the first {adapter.text_split} of {backbone.text_blocks} blocks of the text tower, which run once"


def _some(texts: Iterable[str]) -> str:
    every = list(texts)
    more = f" and {len(every) - _LISTED} more" if len(every) > _LISTED else ""
    return ", ".join(every[:_LISTED]) + more


def _count(number: int, noun: str) -> str:
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"


def _share(share: float) -> str:
    return f"{100 * share:.2g} %"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.4f}"
