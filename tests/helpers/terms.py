"""Every term of the objective, in every variant, as the config classes name them; and steps of training with each.

A class or a word that is added to a union is a case here without a line. Imports no pytest: processes import this file.
Run as a program it trains every case on several ranks.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.frozen_features import training_store
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.anchors import AnchorConfig, LogitsAnchorConfig, WeightsAnchorConfig
from disam_peft.config.base import Config
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig, MixupConfig
from disam_peft.config.losses import CrossEntropyConfig, LossConfig, MarginSoftmaxConfig, SigmoidConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.penalties import CoralConfig, FishrConfig, GroupDROConfig, IRMConfig, PenaltyConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.loading.batches import make_sampler, training_batches
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from disam_peft.training.trainer import Trainer
from tests.helpers.accumulated_runs import fresh_accelerator
from tests.helpers.adapter_cells import LAST_TWO, tiny_backbone, tiny_classifier
from tests.helpers.ranks import fork_ranks

METHODS = {
    "erm": MethodConfig(name="erm"),
    "sam": MethodConfig(name="sam", rho=0.3),
    "disam": MethodConfig(rho=0.3, variance_weight=0.6),
    "disam_gsam": MethodConfig(name="disam_gsam", rho=0.3, variance_weight=0.6),
}
# Weights with which two steps of training show the term, and annealing that ends between both.
FELT: dict[str, dict[str, Any]] = {
    "vrex": {"weight": 3.0},
    "groupdro": {"weight": 0.7, "eta": 0.5},
    "irm": {"weight": 0.2},
    "coral": {"weight": 50.0},
    "fishr": {"weight": 1e5, "ema": 0.5},
    "logits": {"weight": 5.0},
}
BATCH, STEPS = 7, 2


BOTH_TOWERS = LoraAdapterConfig(towers=["image", "text"], blocks=LAST_TWO, rank=2, seed=1)


@dataclass(frozen=True)
class Case:
    """A term, or several, and what else they need of a recipe."""

    objective: ObjectiveConfig
    adapter: AdapterConfig = BOTH_TOWERS
    mixup: MixupConfig | None = None

    @property
    def source(self) -> str:
        """Where its batches come from, unless something else is asked for."""
        return "images" if self.mixup is None or self.mixup.of == "images" else "feature store"


def words(annotation: Any) -> list[str]:
    """The words that a setting can be, also beside other values."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [word for part in get_args(annotation) for word in words(part)]


def classes(union: Any) -> tuple[type[Config], ...]:
    """The config classes of a union with a discriminator."""
    return get_args(get_args(union)[0])


def variants(union: Any) -> Iterator[tuple[str, Config]]:
    """Each class as its defaults make it (but for ``FELT``), and once for each other word of each of its settings."""
    for config in classes(union):
        kind = config.model_fields["kind"].default
        settings: dict[str, Any] = {"anneal": 1} if "anneal" in config.model_fields else {}
        settings = {**settings, **FELT.get(kind, {})}
        yield kind, config.model_validate(settings)
        for name, of_field in config.model_fields.items():
            for word in words(of_field.annotation) if name != "kind" else ():
                if word != of_field.default:
                    yield f"{kind} {name}={word}", config.model_validate({**settings, name: word})


COMBINED = ObjectiveConfig(
    loss=MarginSoftmaxConfig(class_weights="balanced"),
    penalties=[CoralConfig(weight=50.0, in_ascent=False), FishrConfig(weight=1e5, anneal=1, ema=0.5)],
    anchors=[LogitsAnchorConfig(weight=5.0), WeightsAnchorConfig(weight=2.0, in_ascent=False)],
)
SAGAWA = GroupDROConfig(variant="sagawa", eta=0.5, normalize_loss=True, adjustment=2.0)
WITH_SCALE = LoraAdapterConfig(blocks=LAST_TWO, rank=2, seed=1, logit_scale="trained")


def _cases() -> dict[str, Case]:
    found = {}
    for union, key in ((LossConfig, "loss"), (PenaltyConfig, "penalties"), (AnchorConfig, "anchors")):
        for name, config in variants(union):
            values: dict[str, Any] = {key: config if key == "loss" else [config]}
            found[name] = Case(ObjectiveConfig(**values))
    found["weights of named classes"] = Case(ObjectiveConfig(loss=CrossEntropyConfig(class_weights={"red": 5.0})))
    found["sagawa, adjusted"] = Case(ObjectiveConfig(penalties=[SAGAWA]))
    read_labels = ObjectiveConfig(penalties=[IRMConfig(weight=0.2, anneal=0), GroupDROConfig(weight=0.7, eta=0.5)])
    for word in words(MixupConfig.model_fields["of"].annotation):
        found[f"mixup of={word}"] = Case(read_labels, mixup=MixupConfig.model_validate({"of": word}))
    found["trained scale"] = Case(ObjectiveConfig(loss=SigmoidConfig()), adapter=WITH_SCALE)
    found["combined"] = Case(COMBINED)
    return found


CASES = _cases()
PLAIN = Case(ObjectiveConfig())
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.")


class Workplace:
    """Data, a tiny CLIP, and what of them every case can share.

    Args:
        twins: of the fixture.
        folder: of the domains.
        precision: of the forward passes; the weights are of float32 where it is not ``no``.
    """

    def __init__(self, twins: tuple[str, str], folder: Path | str, precision: str = "no", *, wide: bool = True) -> None:
        self.accelerator = fresh_accelerator(precision)
        self.dataset = load(DataConfig(root=Path(folder)))
        self.stored = load(DataConfig(root=Path(folder), pixel_store=32))
        self.prompts = ClassPrompts(self.dataset.prompt_names, TEMPLATES)
        self._twins, self._dtype = twins, torch.float64 if wide else torch.float32
        self._classifiers: dict[str, tuple[ClipClassifier, list[Tensor]]] = {}
        self._batches: dict[Any, list[dict[str, Tensor]]] = {}

    def classifier(self, adapter: AdapterConfig) -> ClipClassifier:
        """With its adapter as it was at the start. Only trained tensors ever change."""
        key = adapter.model_dump_json()
        if key not in self._classifiers:
            backbone = tiny_backbone(self._twins, "open_clip", self._dtype)
            made = tiny_classifier(backbone, adapter, prompts=self.prompts).to(self.accelerator.device).train()
            self._classifiers[key] = made, [p.detach().clone() for p in made.trainable().values()]
        classifier, start = self._classifiers[key]
        with torch.no_grad():
            for p, tensor in zip(classifier.trainable().values(), start, strict=True):
                p.copy_(tensor)
                p.grad = None
        return classifier

    def batches(self, case: Case, source: str) -> list[dict[str, Tensor]]:
        """Those of this process."""
        key = (
            source,
            case.mixup is not None and case.mixup.of,
            case.adapter.model_dump_json() if source == "feature store" else "",
        )
        if key not in self._batches:
            augment = AugmentConfig(kind="none", mixup=case.mixup)
            dataset: DomainDataset = self.stored if source == "pixel store" else self.dataset
            classifier = self.classifier(case.adapter)
            inputs: Any = TrainTransform(classifier.backbone.preprocessing, augment, 0)
            if source == "feature store":
                inputs = training_store(classifier, dataset, augment, 0, FeatureConfig(store=True), workers=0)
            rank, size = self.accelerator.process_index, self.accelerator.num_processes
            sampler = make_sampler(dataset, _config(1), 0, mixup=case.mixup, rank=rank, world_size=size)
            device = self.accelerator.device
            self._batches[key] = list(training_batches(dataset, sampler, inputs, device, workers=0))
        return self._batches[key]

    def trainer(self, case: Case, method: str, pieces: int = 1, **settings: Any) -> Trainer:
        """Before its first step."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*still has the weight.*")
            return Trainer(
                self.classifier(case.adapter),
                self.dataset,
                METHODS[method],
                case.objective,
                _config(pieces, **settings),
                [],
                self.accelerator,
                lambda name, **values: None,
            )

    def train(
        self, case: Case, method: str = "disam", pieces: int = 1, source: str = "", around: Any = None
    ) -> dict[str, Any]:
        """The trained weights, the objective in each step and the state of the penalties after ``STEPS`` steps."""
        trainer, values = self.trainer(case, method, pieces), []
        if around is not None:
            trainer.compiled = around(trainer.classifier)
        for batch in self.batches(case, source or case.source):
            values.append(_step(trainer, batch))
        return found_in(trainer, values)

    def resumed(self, case: Case, method: str = "disam") -> dict[str, Any]:
        """As ``train``, but after the first step everything is saved, thrown away, built anew and loaded."""
        first, *rest = self.batches(case, case.source)
        trainer = self.trainer(case, method)
        values = [_step(trainer, first)]
        structure, tensors = to_json_and_tensors({n: c.state_dict() for n, c in components(trainer).items()})
        saved = from_json_and_tensors(structure, {name: tensor.clone() for name, tensor in tensors.items()})
        trainer = self.trainer(case, method)
        for name, component in components(trainer).items():
            component.load_state_dict(saved[name])
        trainer.steps_done = 1
        return found_in(trainer, values + [_step(trainer, batch) for batch in rest])


def components(trainer: Trainer) -> dict[str, Any]:
    """Those of a checkpoint that change in a step, as ``fit`` has them."""
    trainer.optimizer.flush()
    return {
        "adapter": trainer,
        "optimizer": trainer.optimizer,
        "schedule": trainer.schedule,
        "objective": trainer.objective,
    }


def _config(pieces: int, **settings: Any) -> TrainConfig:
    return TrainConfig(
        steps=STEPS,
        batch_size=BATCH,
        gradient_accumulation_steps=pieces,
        optimizer="sgd",
        learning_rate=0.05,
        workers=0,
        log_every=1000,
        **settings,
    )


def _step(trainer: Trainer, batch: dict[str, Tensor]) -> float:
    reports = []
    real = trainer.gradient
    trainer.gradient = lambda given: reports.append(real(given)) or reports[-1]  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the domain weights were negative.*")
        trainer.train_step(batch)
    trainer.gradient = real
    assert bool(reports[0].is_finite)
    return float(reports[0].objective)


def found_in(trainer: Trainer, values: list[float]) -> dict[str, Any]:
    trainer.optimizer.flush()
    state = {
        f"{kind}/{key}": value.clone()
        for kind, of_term in trainer.objective.state_dict()["penalties"].items()
        for key, value in of_term.items()
    }
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.trained.values()])
    return {"weights": weights, "values": values, "state": state}


ON_RANKS = [(name, method, 1 + number % 2) for number, name in enumerate(CASES) for method in ("erm", "disam_gsam")]
"""Each case, with and without a perturbation; in micro-batches where its number is odd."""


def main(port: str, size: str, open_clip: str, transformers: str, folder: str, output: str) -> None:
    """Every case of ``ON_RANKS`` on ``size`` ranks, forks of this process."""
    torch.set_num_threads(1)

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        place = Workplace((open_clip, transformers), folder)
        assert place.accelerator.num_processes == int(size)
        found: dict[str, Any] = {}
        for name, method, pieces in ON_RANKS:
            fits = min(pieces, BATCH // int(size))
            found[f"{name}/{method}"] = place.train(CASES[name], method, fits)
        found["domains"] = [batch["domains"] for batch in place.batches(PLAIN, "images")]
        torch.save(found, f"{output}/{size}-{rank}.pt")

    fork_ranks(int(size), work)


if __name__ == "__main__":
    main(*sys.argv[1:])
