"""The pipeline, in order: data -> backbone -> zero-shot -> adapter -> training -> evaluation -> files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed

from disam_peft.adapters.manifest import read_manifest
from disam_peft.adapters.prompts import ClassPrompts, prompt_templates
from disam_peft.adapters.registry import build_adapter, planned_image_split
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.domain_inference import infer_domains
from disam_peft.classification.frozen_features import evaluation_store
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.common.locks import locked
from disam_peft.common.processes import on_main
from disam_peft.common.records import METRICS, RESULTS, ResultRow, append_event, read_results, write_results
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.recipe import Recipe, as_dict, load_recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.splits import check_no_leak, leave_out, split_train_validation
from disam_peft.errors import UserError, did_you_mean
from disam_peft.evaluation.metrics import metrics_by_domain
from disam_peft.evaluation.predict import Predictions, predict
from disam_peft.evaluation.protocols import held_out_domains, validation_score
from disam_peft.evaluation.results import write_mistakes, write_sharpness
from disam_peft.experiments import run_folder
from disam_peft.experiments.run_cache import Shared
from disam_peft.experiments.run_folder import ADAPTER, CHECKPOINTS, RECIPE, find_runs
from disam_peft.export.merged import export_merged
from disam_peft.export.peft import export_peft
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.checkpoint.manager import Checkpoints
from disam_peft.training.trainer import FitResult, fit

EVALUATION = "evaluation.json"
EXPORTS = ("peft", "merged")


@dataclass(frozen=True)
class Outcome:
    """One run that left one domain out. ``fit`` is None where a finished run was found and kept."""

    folder: Path
    held_out: str
    rows: list[ResultRow]
    fit: FitResult | None


def train(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, shared: Shared | None = None
) -> list[Outcome]:
    """Train and judge the recipe's adapter, once for each domain to hold out.

    A finished run of the very same recipe is kept as it is. Files of a run, in ``recipe.folder(held_out)``:
    ``recipe.yaml`` (resolved), ``metrics.jsonl``, ``adapter/`` (the best state by source validation), ``results.json``;
    until it is finished also ``checkpoints/``, from which ``resume`` goes on, to the same bits.

    Args:
        shared: of several calls, so that what they have in common is done once.

    Raises:
        UserError: data, recipe or device that cannot be used; a folder that holds another run, or that another process
            works in; with ``resume``, a checkpoint that is damaged, or data that changed since.
        Stopped: by SIGTERM or Ctrl-C in the middle of training, after saving.
    """
    shared = shared or Shared()
    log_folder = recipe.output / recipe.name / "tensorboard"
    accelerator = start_accelerator(
        recipe.train.mixed_precision,
        tracker=recipe.train.tracker,
        log_folder=log_folder,
        timeout_minutes=recipe.train.timeout_minutes,
    )
    with accelerator.main_process_first():  # the first process checks the files, the others read its findings
        dataset = shared.dataset(recipe.data)
    cells = [_cell(recipe, domain) for domain in held_out_domains(recipe.protocol.held_out, dataset.present_domains)]
    with ExitStack() as locks:

        def claim() -> list[run_folder.Plan]:
            for cell in cells:
                locks.enter_context(locked(_folder(cell)))
            return [run_folder.plan(cell, overwrite=overwrite, resume=resume) for cell in cells]

        outcomes = [
            _kept(cell, accelerator) if plan == "keep" else _leave_one_out(cell, dataset, accelerator, plan, shared)
            for cell, plan in zip(cells, on_main(accelerator, claim), strict=True)
        ]
    if len(outcomes) > 1 and accelerator.is_main_process:
        write_results(recipe.output / recipe.name / RESULTS, [row for outcome in outcomes for row in outcome.rows])
    return outcomes


def _kept(recipe: Recipe, accelerator: Accelerator) -> Outcome:
    if accelerator.is_main_process:
        run_folder.clear(_folder(recipe))  # a kill may have come between the results and this
    return Outcome(_folder(recipe), recipe.protocol.held_out, read_results(_folder(recipe) / RESULTS), None)


def _leave_one_out(
    recipe: Recipe, dataset: DomainDataset, accelerator: Accelerator, plan: run_folder.Plan, shared: Shared
) -> Outcome:
    folder, main = _folder(recipe), accelerator.is_main_process
    sources, target = leave_out(dataset, recipe.protocol.held_out)
    check_no_leak(sources, target)
    training, validation = split_train_validation(sources, recipe.protocol.validation_fraction, recipe.seed)

    backbone = load_backbone(recipe.backbone).to(accelerator.device)
    prompts = ClassPrompts(dataset.prompt_names, prompt_templates(recipe.prompts))
    judge = _Judge(recipe, validation, target, accelerator)
    # From the stores of the adapter to come: no image is decoded, and no frozen block run, for zero-shot alone.
    split = planned_image_split(recipe.adapter, backbone) if recipe.features.store else None
    zero_shot = ClipClassifier(backbone, None, prompts, image_split=split)
    rows = shared.zero_shot(
        _untrained(recipe, split), lambda: judge.rows(zero_shot, adapter="none", method="zero_shot")
    )

    inferred = infer_domains(recipe.domains, backbone, training, recipe.seed, workers=recipe.train.workers)
    set_seed(recipe.seed)
    classifier = ClipClassifier(backbone, build_adapter(recipe.adapter, backbone, prompts), prompts)
    on_main(accelerator, lambda: run_folder.prepare(recipe, anew=plan == "start"))
    _start_tracking(accelerator, recipe)
    trained_with = {"recipe": as_dict(recipe), "held_out": recipe.protocol.held_out, "classes": list(dataset.classes)}
    fitted = fit(
        classifier,
        inferred.dataset,
        method=recipe.method,
        config=recipe.train,
        augment=recipe.augment,
        features=recipe.features,
        seed=recipe.seed,
        accelerator=accelerator,
        validate=lambda: validation_score(judge.predictions(classifier, validation, "validating")),
        on_best=(lambda: save_adapter(folder / ADAPTER, classifier, trained_with=trained_with)) if main else None,
        on_event=lambda event, **values: append_event(folder / METRICS, event, **values),
        checkpoints=Checkpoints(
            folder / CHECKPOINTS,
            resume=plan == "continue",
            made_with={**run_folder.content_by_cell(dataset), "weights of the backbone": backbone.base_hash},
            records=folder / METRICS,
        ),
    )
    for tracker in accelerator.trackers:
        tracker.finish()
    if main and recipe.domains.infer != "none":
        append_event(folder / METRICS, "inferred_domains", purity=inferred.purity, counts=inferred.counts)

    on_target: list[Predictions] = []
    rows += judge.rows(classifier, adapter=recipe.adapter.kind, method=recipe.method.name, keep=on_target)
    if main:
        write_mistakes(folder, on_target[0], target, classifier.class_names, recipe.evaluation)
        write_results(folder / RESULTS, rows)
    if recipe.evaluation.sharpness is not None:  # last: what it may run out of, the results are safe from
        write_sharpness(folder, classifier, validation, target, recipe.evaluation, like=rows[-1], is_main=main)
    if main:
        run_folder.clear(folder)
    accelerator.wait_for_everyone()
    return Outcome(folder, recipe.protocol.held_out, rows, fitted)


def evaluate(folder: Path, overrides: Sequence[str] = (), *, sharpness: bool = False) -> list[Outcome]:
    """Reload the adapter of a finished run and evaluate it again; by default on its own data, with the same numbers.

    With other data (``data.root=...``) that lacks the held-out domain, every domain there is evaluated, as split
    ``given``. Writes ``evaluation.json`` beside ``results.json``.

    Args:
        sharpness: also measure sharpness, as the recipe says or by default, and write it as training would have.

    Raises:
        UserError: no run in ``folder``; data with classes that the adapter does not know; sharpness asked for on data
            without the held-out domain or without sources.
    """
    outcomes = []
    for cell in find_runs(folder):
        recipe = load_recipe(cell / RECIPE, overrides)
        accelerator = start_accelerator(recipe.train.mixed_precision, timeout_minutes=recipe.train.timeout_minutes)
        with accelerator.main_process_first():
            dataset = load(recipe.data)
        classifier = load_adapter(cell / ADAPTER, device=accelerator.device)
        dataset = _in_classes_of(classifier, dataset)
        held_out, domains = recipe.protocol.held_out, dataset.present_domains
        about: dict[str, Any] = {"adapter": recipe.adapter.kind, "method": recipe.method.name}
        if held_out in domains and len(domains) > 1:
            sources, target = leave_out(dataset, held_out)
            _, validation = split_train_validation(sources, recipe.protocol.validation_fraction, recipe.seed)
            rows = _Judge(recipe, validation, target, accelerator).rows(classifier, **about)
            if sharpness:
                main = accelerator.is_main_process
                write_sharpness(cell, classifier, validation, target, recipe.evaluation, like=rows[-1], is_main=main)
        elif sharpness:
            raise UserError(
                f"sharpness is measured on the sources and on {held_out!r}, which the run left out, but "
                f"{dataset.origin} has {', '.join(domains)}; evaluate on the run's own data, or without --sharpness"
            )
        else:
            judge = _Judge(recipe, None, dataset, accelerator)
            rows = judge.rows(classifier, **about, target_split="held_out" if domains == (held_out,) else "given")
        if accelerator.is_main_process:
            write_results(cell / EVALUATION, rows)
        outcomes.append(Outcome(cell, held_out, rows, None))
    return outcomes


def export(folder: Path, to: str, output: Path, *, held_out: str | None = None) -> Path:
    """Export the adapter of a run: ``peft`` (the adapter alone) or ``merged`` (a complete checkpoint of its family).

    Raises:
        UserError: several runs in ``folder`` and none chosen; an ``output`` that holds files; an adapter that cannot
            be merged.
    """
    cells = find_runs(folder)
    names = [cell.name for cell in cells]
    if held_out is not None:
        cells = [cell for cell in cells if cell.name == held_out]
        if not cells:
            raise UserError(f"no run with held-out domain {held_out!r} in {folder}{did_you_mean(held_out, names)}")
    if len(cells) > 1:
        listed = ", ".join(names)
        raise UserError(f"{folder} holds {len(cells)} runs ({listed}): choose one with --held-out, or name its folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --output, or remove it")
    if to not in EXPORTS:
        raise UserError(f"--to {to!r} is not one of {', '.join(EXPORTS)}{did_you_mean(to, EXPORTS)}")
    source = cells[0] / ADAPTER
    classifier = load_adapter(source)
    if to == "merged":
        export_merged(output, classifier)
    else:
        export_peft(output, classifier, trained_with=read_manifest(source).trained_with)
    return output


@dataclass(frozen=True)
class _Judge:
    """Turns a classifier into rows of results, always the same way."""

    recipe: Recipe
    validation: DomainDataset | None
    target: DomainDataset
    accelerator: Accelerator

    def predictions(self, classifier: ClipClassifier, dataset: DomainDataset, description: str) -> Predictions:
        autocast, config = self.accelerator.autocast, self.recipe.evaluation
        store = None
        if self.recipe.features.store:
            store = evaluation_store(
                classifier, dataset, self.recipe.features, autocast=autocast, workers=config.workers
            )
        return predict(classifier, dataset, config, store=store, autocast=autocast, description=description)

    def rows(
        self,
        classifier: ClipClassifier,
        *,
        adapter: str,
        method: str,
        target_split: str = "held_out",
        keep: list[Predictions] | None = None,
    ) -> list[ResultRow]:
        """``keep`` gets the predictions on the target."""
        rows = []
        for split, dataset in (("source_validation", self.validation), (target_split, self.target)):
            if dataset is None:
                continue
            predictions = self.predictions(classifier, dataset, f"{method}: {split.replace('_', ' ')}")
            by_domain = metrics_by_domain(predictions)
            for domain, values in by_domain.items():
                pooled = domain in ("mean", "worst")
                number = -1 if pooled else predictions.domain_names.index(domain)
                n = len(by_domain) - 2 if pooled else int((predictions.domains_N == number).sum())
                rows += [
                    ResultRow(
                        backbone=backbone_label(self.recipe.backbone),
                        adapter=adapter,
                        method=method,
                        held_out=self.recipe.protocol.held_out,
                        seed=self.recipe.seed,
                        split=split,
                        domain=domain,
                        metric=metric,
                        value=value,
                        n=n,
                    )
                    for metric, value in values.items()
                ]
        if keep is not None:
            keep.append(predictions)
        return rows


def backbone_label(config: BackboneConfig) -> str:
    """Name and pretrained tag, as in tables."""
    return config.name if config.pretrained is None else f"{config.name}:{config.pretrained}"


def _cell(recipe: Recipe, held_out: str) -> Recipe:
    return recipe.model_copy(update={"protocol": recipe.protocol.model_copy(update={"held_out": held_out})})


def _untrained(recipe: Recipe, split: int | None) -> str:
    """All that the zero-shot numbers of a run depend on; on the split they do by rounding, in batches of other sizes
    than those of the store."""
    parts = {key: as_dict(recipe)[key] for key in ("seed", "backbone", "data", "prompts", "protocol", "evaluation")}
    return json.dumps([parts, recipe.features.store, split, recipe.train.mixed_precision], sort_keys=True)


def _folder(recipe: Recipe) -> Path:
    return recipe.folder(recipe.protocol.held_out)


def _start_tracking(accelerator: Accelerator, recipe: Recipe) -> None:
    if recipe.train.tracker != "none":
        accelerator.init_trackers(recipe.protocol.held_out)


def _in_classes_of(classifier: ClipClassifier, dataset: DomainDataset) -> DomainDataset:
    """The same samples with labels that count in the classifier's classes, which may be more."""
    known = classifier.class_names
    if dataset.prompt_names == known:
        return dataset
    unknown = sorted(set(dataset.prompt_names) - set(known))
    if unknown:
        raise UserError(
            f"{dataset.origin} has classes that the adapter was not trained for: {', '.join(unknown[:10])} "
            f"(it knows {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}); "
            "leave them out, or map their names with data.class_names"
        )
    label_of = np.array([known.index(name) for name in dataset.prompt_names])
    return replace(dataset, labels=label_of[dataset.labels])


def recorded(folder: Path) -> list[ResultRow]:
    """The rows that training wrote, or none."""
    path = folder / RESULTS
    return read_results(path) if path.is_file() else []
