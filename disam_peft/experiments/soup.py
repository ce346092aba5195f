"""A soup: the mean of the adapters of several finished runs, in a folder like that of a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from disam_peft.adapters.adapter_folder import read_state, require_same_backbone
from disam_peft.adapters.manifest import AdapterManifest
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import ADAPTERS, build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import save_adapter
from disam_peft.common.files import published, write_atomically
from disam_peft.common.finished import read_finished
from disam_peft.common.prediction_table import PREDICTIONS, write_predictions
from disam_peft.common.records import METRICS, RAW, RESULTS, ResultRow, append_event, read_results, write_results
from disam_peft.common.run_images import IMAGES, Part, RunImages, read_images, write_images
from disam_peft.common.soup_record import SOUP_WEIGHTS, Ingredient, SoupMethod, SoupRecord, write_soup
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.base import Config
from disam_peft.config.recipe import Recipe, as_dict, as_yaml, load_recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.evaluation.metrics import metrics_of_domains
from disam_peft.evaluation.results import Evaluator, Identity, prediction_table, result_rows, write_mistakes
from disam_peft.experiments.evaluate import require_own_adapter
from disam_peft.experiments.run_folder import ADAPTER, RECIPE, finish, is_finished
from disam_peft.experiments.seen_images import RunsImages, held_back_by_all
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.selection import comparable, validation

_REMARK = (
    "# The adapter here is the mean of those of several runs, see soup.json: training this recipe gives another one.\n"
)


@dataclass(frozen=True)
class Soup:
    """A soup that was made. ``rows`` are those of its ``results.json``, and ``metric`` (``accuracy`` or ``nll``) is
    what the scores of its record are of; of ``nll`` they are negative."""

    folder: Path
    record: SoupRecord
    rows: list[ResultRow]
    metric: str


@dataclass(frozen=True)
class _Run:
    folder: Path
    recipe: Recipe
    manifest: AdapterManifest
    state: Mapping[str, Tensor]
    images: RunImages


def make_soup(folders: Sequence[Path], output: Path, *, method: SoupMethod = "uniform") -> Soup:
    """Average the adapters of finished runs, judge the mean as a run is judged, and write it.

    Args:
        folders: at least two runs, of one backbone, kind of adapter, classes, data and held-out domain.
        output: a folder that is new or empty.
        method: ``uniform``: the mean of all. ``greedy``: of the best run on source validation, and of every other one,
            from the better to the worse, with which the soup's source validation does not fall. Source validation is
            that of the recipe's selection rule.

    Raises:
        UserError: runs that are unfinished, or do not fit together; adapters that have no mean; data, a backbone or an
            adapter that are no longer those of the runs; an ``output`` that holds files.
    """
    runs = _read(folders)
    _require_fitting(runs, method)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; choose another --output, or remove it")
    _warn_of_starts(runs)
    first = runs[0]
    accelerator = start_accelerator(first.recipe.train.mixed_precision)
    with accelerator.main_process_first():
        splits, dataset = _splits(runs)
    backbone = load_backbone(first.manifest.backbone.config())
    require_same_backbone(first.folder / ADAPTER, first.manifest, backbone)
    backbone.to(accelerator.device)
    pot = _Pot(backbone, runs, Evaluator(first.recipe, accelerator.autocast), splits.get("source_validation"))
    record = pot.uniform() if method == "uniform" else pot.greedy()
    kept = [run for run, one in zip(pot.order, record.ingredients, strict=True) if one.kept]
    config, classifier = pot.classifier(kept)
    recipe = kept[0].recipe.model_copy(update={"adapter": config})
    evaluator = Evaluator(recipe, accelerator.autocast)
    predictions = evaluator.predict_splits(classifier, splits, label=SOUP_WEIGHTS)
    differ = any(_parts(run) != _parts(kept[0]) for run in kept)
    zero_shot = [
        row
        for row in read_results(kept[0].folder / RESULTS)
        if row.method == "zero_shot" and not (differ and row.split == "source_validation")
    ]
    rows = zero_shot + result_rows(Identity.of_trained(recipe, SOUP_WEIGHTS, chosen=True), predictions)
    if accelerator.is_main_process:
        trained_with = {
            "recipe": as_dict(recipe),
            "held_out": recipe.protocol.domain,
            "classes": list(dataset.classes),
            "weights": SOUP_WEIGHTS,
        }
        with published(output) as folder:
            write_atomically(folder / RECIPE, as_yaml(recipe) + _REMARK)
            write_images(folder / IMAGES, _joint_images(kept))
            append_event(folder / METRICS, SOUP_WEIGHTS, method=method, kept=len(kept), of=len(runs))
            save_adapter(folder / ADAPTER, classifier, trained_with=trained_with)
            write_predictions(folder / PREDICTIONS, prediction_table(predictions, splits, dataset.classes))
            judged = "held_out" if "held_out" in splits else next(iter(splits))
            write_mistakes(folder, predictions[judged], splits[judged], classifier.class_names, recipe.evaluation)
            write_soup(folder, record)
            write_results(folder / RESULTS, rows)
            before = read_finished(kept[0].folder)
            finish(folder, backbone=backbone.identity, backbone_files=before.backbone_files)
    accelerator.wait_for_everyone()
    return Soup(output, record, rows, first.recipe.selection.metric)


class _Pot:
    """The runs on one backbone, and what has been tried with them.

    Attributes:
        order: the runs in the order in which the record has them.
    """

    def __init__(
        self, backbone: ClipBackbone, runs: Sequence[_Run], evaluator: Evaluator, images: DomainDataset | None
    ) -> None:
        self._backbone, self._evaluator, self._images = backbone, evaluator, images
        self.order = list(runs)

    def uniform(self) -> SoupRecord:
        ingredients = [_ingredient(run, kept=True) for run in self.order]
        return SoupRecord("uniform", ingredients, None if self._images is None else self._score(self.order))

    def greedy(self) -> SoupRecord:
        scores = {id(run): self._score([run]) for run in self.order}
        self.order.sort(key=lambda run: comparable((scores[id(run)],)), reverse=True)  # equals stay as they were given
        best = scores[id(self.order[0])]
        kept, ingredients = [self.order[0]], [_ingredient(self.order[0], kept=True, score=best, soup_score=best)]
        for run in self.order[1:]:
            with_it = self._score([*kept, run])
            is_kept = comparable((with_it,)) >= comparable((best,))
            if is_kept:
                kept, best = [*kept, run], with_it
            ingredients.append(_ingredient(run, kept=is_kept, score=scores[id(run)], soup_score=with_it))
        return SoupRecord("greedy", ingredients, best)

    def classifier(self, runs: Sequence[_Run]) -> tuple[Config, ClipClassifier]:
        """The config and the classifier of the mean of these runs, attached to the backbone."""
        manifest = runs[0].manifest
        kind = ADAPTERS[type(manifest.config)]
        config: Config = manifest.config
        state = dict(runs[0].state)
        if len(runs) > 1:
            config, state = kind.soup([run.manifest.config for run in runs], [run.state for run in runs])
        prompts = ClassPrompts(tuple(manifest.classes), tuple(manifest.templates))
        adapter = build_adapter(cast(AdapterConfig, config), self._backbone, prompts, to_train=False)
        adapter.load_state(state)
        return config, ClipClassifier(self._backbone, adapter, prompts)

    def _score(self, runs: Sequence[_Run]) -> float:
        """The number that decides, of the mean of these runs."""
        assert self._images is not None
        _, classifier = self.classifier(runs)
        try:
            predictions = self._evaluator.predict(classifier, self._images, "validating")
        finally:
            assert classifier.adapter is not None
            classifier.adapter.detach(self._backbone)
        return validation(self._evaluator.recipe.selection, metrics_of_domains(predictions)).score[0]


def _ingredient(run: _Run, *, kept: bool, score: float | None = None, soup_score: float | None = None) -> Ingredient:
    weights = str(run.manifest.trained_with.get("weights", RAW))
    return Ingredient(
        str(run.folder),
        run.manifest.sha256,
        weights,
        run.recipe.seed,
        kept=kept,
        score=score,
        soup_score=soup_score,
        method=run.recipe.method.name,
    )


def _read(folders: Sequence[Path]) -> list[_Run]:
    if len(folders) < 2:
        raise UserError(f"a soup needs two runs or more, and {len(folders)} was given; name more finished runs")
    faults = []
    for folder in folders:
        if not is_finished(folder):
            faults.append(f"{folder} is no finished run; train it to its end with --resume first")
        elif not (folder / IMAGES).is_file():
            faults.append(f"{folder} did not record its images (a run of version 0.1); train it again")
    if faults:
        raise UserError("\n  ".join(faults))
    runs = []
    for folder in folders:
        manifest, state = read_state(folder / ADAPTER)
        recipe = load_recipe(folder / RECIPE)
        require_own_adapter(manifest, recipe, folder)
        runs.append(_Run(folder, recipe, manifest, state, read_images(folder / IMAGES)))
    return runs


def _require_fitting(runs: Sequence[_Run], method: SoupMethod) -> None:
    """
    Raises:
        UserError: runs that cannot be averaged; names all that does not fit.
    """
    first, faults = runs[0], []
    if len({run.manifest.sha256 for run in runs}) < len(runs):
        faults.append("two of the runs have the same adapter; name each run once")
    for run in runs[1:]:
        pair = f"{first.folder} and {run.folder}"
        ours, theirs = first.manifest, run.manifest
        if ours.backbone.sha256 != theirs.backbone.sha256 or ours.backbone.fingerprint != theirs.backbone.fingerprint:
            faults.append(
                f"{pair} have other backbones ({ours.backbone.name}, weights {ours.backbone.sha256[:12]}, and "
                f"{theirs.backbone.name}, {theirs.backbone.sha256[:12]}); average runs of one backbone"
            )
        elif ours.kind != theirs.kind:
            faults.append(f"{pair} have adapters of the kinds {ours.kind} and {theirs.kind}; average runs of one kind")
        elif ours.classes != theirs.classes or ours.templates != theirs.templates:
            faults.append(f"{pair} have other classes or prompts; average runs of the same classes and prompts")
        elif first.recipe.protocol.domain != run.recipe.protocol.domain:
            faults.append(
                f"{pair} hold out {_named(first)} and {_named(run)}: their mean has seen both. Average runs that hold "
                "out the same domain"
            )
        elif first.images.identity != run.images.identity:
            faults.append(f"{pair} were trained on other data; average runs of the same images, classes and domains")
        elif not _are_the_same_files(first.images, run.images):
            faults.append(
                f"{pair} did not read their images (data.verify=false), and their files are not the same ones: whether "
                "one was trained on what the other held back is unknown. Average runs of the same files, or train with "
                "data.verify=true"
            )
        elif method == "greedy" and _parts(first) != _parts(run):
            faults.append(
                f"{pair} split their data otherwise (seeds {first.recipe.seed} and {run.recipe.seed}): what one held "
                "back the other was trained on, so no source validation can choose between them. Use runs of one "
                "seed, or --method uniform"
            )
    if faults:
        raise UserError("\n  ".join(faults))
    # What the adapters themselves refuse, before anything is loaded.
    ADAPTERS[type(first.manifest.config)].soup([r.manifest.config for r in runs], [r.state for r in runs])


def _are_the_same_files(ours: RunImages, theirs: RunImages) -> bool:
    """Whether images of equal identity are the same: by their content, or where nobody read it by what the file system
    noted about them. True also where it noted nothing."""
    if ours.is_hashed or ours.state is None or theirs.state is None:
        return True
    return dict(zip(ours.key, ours.state, strict=True)) == dict(zip(theirs.key, theirs.state, strict=True))


def _named(run: _Run) -> str:
    return repr(run.recipe.protocol.domain) if run.recipe.protocol.domain is not None else "nothing"


def _parts(run: _Run) -> dict[str, Part]:
    return dict(zip(run.images.key, run.images.part, strict=True))


def _warn_of_starts(runs: Sequence[_Run]) -> None:
    config = runs[0].manifest.config
    what = ADAPTERS[type(config)].random_start(config)
    seeds = {getattr(run.manifest.config, "seed", None) or run.recipe.seed for run in runs}
    if what and len(seeds) > 1:
        warnings.warn(
            f"{what} of these {config.kind} adapters started from different random numbers (seeds "
            f"{', '.join(map(str, sorted(seeds)))}), and their mean may be worse than each of them; compare it with "
            "them, use --method greedy, or train with one adapter.seed",
            stacklevel=3,
        )


def _splits(runs: Sequence[_Run]) -> tuple[dict[str, DomainDataset], DomainDataset]:
    """What the mean is judged on, by split: of source validation the images that every run held back."""
    first = runs[0]
    dataset = load(first.recipe.data)
    own = RunsImages(first.folder, first.recipe).own_splits(first.recipe, dataset)
    if own is None:
        raise UserError(
            f"{dataset.origin} is no longer what {first.folder} was trained on, so its mean with other runs cannot be "
            "judged; bring the data back"
        )
    parts = [_parts(run) for run in runs]
    if all(found == parts[0] for found in parts):
        return own, dataset
    found = held_back_by_all(own, parts)
    before, shared = (len(splits.get("source_validation", ())) for splits in (own, found))
    warnings.warn(
        f"these runs split their data otherwise, as their seeds differ: of {before} images that {first.folder} held "
        + (
            f"back, {shared} were held back by all. Source validation is over these"
            if shared
            else "back, some domain has none that all held back. The soup has no source validation"
        ),
        stacklevel=3,
    )
    if not found:
        raise UserError("no image is left on which this soup can be judged; average runs of one seed")
    return found, dataset


def _joint_images(runs: Sequence[_Run]) -> RunImages:
    """The images of a soup: what any of its runs was trained on is ``training``."""
    images, parts = runs[0].images, [_parts(run) for run in runs]

    def joint(key: str, own: Part) -> Part:
        return "training" if any(found[key] == "training" for found in parts) else own

    return replace(images, part=tuple(joint(key, own) for key, own in zip(images.key, images.part, strict=True)))
