"""The pipeline, in order: data -> backbone -> zero-shot -> adapter -> training -> evaluation -> files."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from disam_peft.adapters.registry import ADAPTERS
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import local_files_hash
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.domain_inference import InferredDomains, infer_domains
from disam_peft.classification.fit_start import make_room
from disam_peft.classification.saved_classifier import save_adapter
from disam_peft.common.prediction_table import PREDICTIONS, write_predictions
from disam_peft.common.processes import on_main
from disam_peft.common.records import METRICS, RESULTS, ResultRow, append_event, read_results, write_results
from disam_peft.common.run_images import IMAGES, RunImages, read_images, write_images
from disam_peft.config.average import kept_averages
from disam_peft.config.recipe import Recipe, as_dict
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.splits import held_out_domains, require_two_classes
from disam_peft.evaluation.metrics import metrics_of_domains
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.results import (
    Evaluator,
    Identity,
    prediction_table,
    result_rows,
    write_mistakes,
    write_sharpness,
)
from disam_peft.experiments import run_folder
from disam_peft.experiments.build import load_pretrained
from disam_peft.experiments.dry_run import Estimate, rehearse_runs
from disam_peft.experiments.kept_runs import say_what_it_rests_on
from disam_peft.experiments.narrator import Narrator
from disam_peft.experiments.outcome import Outcome, write_joint_results
from disam_peft.experiments.run_cache import RunCache
from disam_peft.experiments.run_data import content_by_cell, images_of
from disam_peft.experiments.run_folder import ADAPTER, CHECKPOINTS
from disam_peft.experiments.split_data import SplitData, checked_split, holding_out, require_splits
from disam_peft.experiments.taking_turns import Turns
from disam_peft.training.accelerator import deterministic_kernels, start_accelerator
from disam_peft.training.checkpoint.manager import CheckpointConfig
from disam_peft.training.fit import FitResult, fit
from disam_peft.training.rehearsal import rehearse
from disam_peft.training.selection import Validation, put_into, validation
from disam_peft.training.trackers.base import TrackedRun
from disam_peft.training.trackers.tracking import forget_tracked, require_tracker, tracking


def train(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    wait: bool = True,
    cache: RunCache | None = None,
    narrator: Narrator | None = None,
) -> list[Outcome]:
    """Train and evaluate the recipe's adapter, once for each domain to hold out, or once on all domains.

    A finished run of the very same recipe and data is kept as it is. Files of a run, in ``recipe.folder(held_out)``:
    ``recipe.yaml`` (resolved), ``images.parquet`` (which images, by content), ``metrics.jsonl``, ``adapter/`` (the best
    state by source validation), ``results.json``, and last of all ``finished.json``; until then also ``checkpoints/``,
    from which ``resume`` goes on, to the same bits.

    Args:
        wait: of several runs, those that another process works on are done last, or kept when that one has finished
            them. False: they are an error.
        cache: handed to several calls, so that what they have in common is done once.
        narrator: is told what happens; unset: nothing is said.

    Raises:
        UserError: data, recipe or device that cannot be used; a folder that holds another run, or that another process
            works in; with ``resume``, a checkpoint that is damaged, or data that changed since.
        Stopped: by SIGTERM or Ctrl-C in the middle of training, after saving.
    """
    narrator = narrator or Narrator()
    accelerator, dataset, runs, cache = _begin(recipe, cache or RunCache(), narrator)
    # one run is never waited for: whoever starts it twice did not mean to share it
    turns = Turns(runs, dataset, overwrite=overwrite, resume=resume, wait=wait and len(runs) > 1)
    done: dict[int, Outcome] = {}
    kept: list[run_folder.Planned] = []
    with deterministic_kernels(recipe.train.deterministic), closing(iter(turns)) as taken:
        for number, planned in taken:
            run = runs[number]
            if planned.plan == "keep":
                kept.append(planned)
                done[number] = _keep_finished(run, accelerator)
            else:
                place = (number + 1, len(runs))
                done[number] = _train_one(run, dataset, accelerator, planned.plan, cache, narrator, place=place)
    say_what_it_rests_on(kept)
    outcomes = [done[number] for number in range(len(runs))]
    if accelerator.is_main_process:
        write_joint_results(outcomes)
    return outcomes


def dry_run(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, narrator: Narrator | None = None
) -> list[Estimate]:
    """What ``train`` would do and what it would take, told to the narrator. It stops before the first step: nothing is
    trained, and nothing is written to the folder of a run. (The data check may remember its findings in the cache.)

    Raises:
        UserError: as ``train``, as far as it is known before the first step.
    """
    narrator = narrator or Narrator()
    accelerator, dataset, runs, _ = _begin(recipe, RunCache(), narrator)
    planned = on_main(
        lambda: [run_folder.plan(run, lambda: dataset, overwrite=overwrite, resume=resume) for run in runs]
    )
    measure = partial(rehearse, accelerator=accelerator)
    about = (accelerator.device, accelerator.num_processes)
    return rehearse_runs(runs, [plan for plan, _ in planned], dataset, measure, *about, narrator)


def _begin(
    recipe: Recipe, cache: RunCache, narrator: Narrator
) -> tuple[Accelerator, DomainDataset, list[Recipe], RunCache]:
    """The processes, the data and the recipe of every run."""
    require_tracker(recipe.train.tracker)
    accelerator = start_accelerator(recipe.train.mixed_precision, timeout_minutes=recipe.train.timeout_minutes)
    with accelerator.main_process_first():  # the first process checks the files, the others read its findings
        dataset = cache.dataset(recipe.data)
    narrator.data(dataset)
    require_two_classes(dataset)
    runs = [holding_out(recipe, name) for name in held_out_domains(recipe.protocol.held_out, dataset.present_domains)]
    require_splits(runs, dataset)
    return accelerator, dataset, runs, cache


def _train_one(
    recipe: Recipe,
    dataset: DomainDataset,
    accelerator: Accelerator,
    plan: run_folder.Plan,
    cache: RunCache,
    narrator: Narrator,
    place: tuple[int, int],
) -> Outcome:
    """One run from the data to its files; the recipe names the one domain to hold out, or holds nothing out."""
    folder, is_main = _folder(recipe), accelerator.is_main_process
    data = checked_split(recipe, dataset)
    images = images_of(data)
    narrator.run(folder, data, recipe.protocol.domain, place)

    backbone_files = local_files_hash(recipe.backbone) if is_main else ""  # before it is loaded
    pretrained = load_pretrained(recipe, dataset.prompt_names, accelerator.device)
    evaluator = Evaluator(recipe, accelerator.autocast)
    rows = _zero_shot_rows(pretrained.zero_shot(), data, evaluator, cache)
    inferred = infer_domains(
        recipe.domains, pretrained.backbone, data.training, recipe.seed, workers=recipe.train.workers
    )

    classifier = pretrained.with_new_adapter()
    make_room(classifier, inferred.dataset)
    narrator.inferred(recipe.domains, inferred)
    narrator.model(recipe, classifier)
    narrator.training(recipe, data, accelerator.device, accelerator.num_processes)
    tracked = TrackedRun(folder, as_dict(recipe))
    on_main(lambda: run_folder.prepare(recipe, images, anew=plan == "start"))
    if is_main and plan == "start":
        forget_tracked(tracked)
    trained_with = {"recipe": as_dict(recipe), "held_out": recipe.protocol.domain, "classes": list(dataset.classes)}
    if ADAPTERS[type(recipe.adapter)].starts_from_features():  # a cache says by number which domain an entry is from
        trained_with["domains"] = list(inferred.dataset.domains)

    def validate() -> Validation:
        predictions = evaluator.predict(classifier, data.validation, "validating")
        return validation(recipe.selection, metrics_of_domains(predictions))

    def save_best(weights: str) -> None:
        save_adapter(folder / ADAPTER, classifier, trained_with={**trained_with, "weights": weights})

    def record(event: str, **values: Any) -> None:
        append_event(folder / METRICS, event, **values)
        narrator.event(event, **values)

    with run_folder.withdrawn_unless_begun(folder), tracking(recipe.train.tracker, tracked, accelerator):
        fitted = fit(
            classifier,
            inferred.dataset,
            method=recipe.method,
            objective=recipe.objective,
            config=recipe.train,
            averages=kept_averages(recipe.average),
            augment=recipe.augment,
            features=recipe.features,
            seed=recipe.seed,
            accelerator=accelerator,
            validate=validate,
            held_back=data.validation,
            on_best=save_best if is_main else None,
            on_event=record,
            checkpoints=_checkpoints(folder, plan, images, pretrained.backbone),
        )

    trained_rows, predictions = _judge_all_weights(classifier, fitted, data, evaluator)
    rows += trained_rows
    if is_main:
        _record_inferred(folder, recipe, inferred)
        if not (folder / IMAGES).is_file():  # a run of 0.1 that went on; before the results, see is_finished
            write_images(folder / IMAGES, images)
        table = prediction_table(predictions, data.by_split(), dataset.classes)
        write_predictions(folder / PREDICTIONS, table)
        split, judged = data.judged
        write_mistakes(folder, predictions[split], judged, classifier.class_names, recipe.evaluation)
        write_results(folder / RESULTS, rows)
    # after the results are written: it needs the most memory, and they are safe should it run out
    if recipe.evaluation.sharpness is not None:
        write_sharpness(folder, classifier, data.by_split(), recipe.evaluation, like=rows[-1], is_main=is_main)
    if is_main:
        run_folder.finish(folder, backbone=pretrained.backbone.identity, backbone_files=backbone_files)
    accelerator.wait_for_everyone()
    return Outcome(folder, recipe.protocol.domain, rows, fitted)


def _folder(recipe: Recipe) -> Path:
    return recipe.folder(recipe.protocol.domain)


def _keep_finished(recipe: Recipe, accelerator: Accelerator) -> Outcome:
    folder = _folder(recipe)
    if accelerator.is_main_process:
        run_folder.clear(folder)  # the run may have been killed between saying that it is finished and doing this
    return Outcome(folder, recipe.protocol.domain, read_results(folder / RESULTS), None)


def _zero_shot_rows(
    classifier: ClipClassifier, data: SplitData, evaluator: Evaluator, cache: RunCache
) -> list[ResultRow]:
    """The zero-shot numbers, from the cache where an earlier run had the same.

    They depend on where the frozen part of the image tower ends by rounding alone, where evaluation works in batches
    of other sizes than the store was built in.
    """
    recipe = evaluator.recipe
    parts = {key: as_dict(recipe)[key] for key in ("seed", "backbone", "data", "prompts", "protocol", "evaluation")}
    settings = [parts, recipe.features.store, classifier.image_split, recipe.train.mixed_precision]
    return cache.zero_shot(
        json.dumps(settings, sort_keys=True),
        lambda: result_rows(
            Identity.of_zero_shot(recipe), evaluator.predict_splits(classifier, data.by_split(), label="zero_shot")
        ),
    )


def _judge_all_weights(
    classifier: ClipClassifier, fitted: FitResult, data: SplitData, evaluator: Evaluator
) -> tuple[list[ResultRow], dict[str, Predictions]]:
    """Rows of the trained weights and of each average of them, each in its best state; those of the chosen one last,
    with its predictions. The classifier is left in the chosen state."""
    rows: list[ResultRow] = []
    predictions: dict[str, Predictions] = {}
    for weights in sorted(fitted.states, key=lambda name: name == fitted.weights):
        put_into(classifier, fitted.states[weights])
        label = evaluator.recipe.method.name + ("" if len(fitted.states) == 1 else f" ({weights})")
        predictions = evaluator.predict_splits(classifier, data.by_split(), label=label)
        identity = Identity.of_trained(evaluator.recipe, weights, chosen=weights == fitted.weights)
        rows += result_rows(identity, predictions)
    return rows, predictions


def _checkpoints(folder: Path, plan: run_folder.Plan, images: RunImages, backbone: ClipBackbone) -> CheckpointConfig:
    """Where training saves its state, and what must be the same when it goes on from there."""
    if (folder / IMAGES).is_file():  # the same images, but the run may have looked closer at them, or less close
        images = read_images(folder / IMAGES)
    return CheckpointConfig(
        folder / CHECKPOINTS,
        resume=plan == "continue",
        provenance={**content_by_cell(images), **_of_backbone(backbone)},
        records=folder / METRICS,
    )


def _of_backbone(backbone: ClipBackbone) -> dict[str, str]:
    parts = {f"{name} of the backbone": json.dumps(value) for name, value in backbone.fingerprint.items()}
    return {"weights of the backbone": backbone.base_hash, **parts}


def _record_inferred(folder: Path, recipe: Recipe, inferred: InferredDomains) -> None:
    if recipe.domains.infer != "none":
        append_event(folder / METRICS, "inferred_domains", purity=inferred.purity, counts=inferred.counts)
