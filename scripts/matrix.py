"""Which adapter works on which architecture: every model of open_clip and every class of transformers that is known
here, times every kind of adapter in the registry.

    python -m scripts.matrix                            # all that is not in the file of outcomes yet
    python -m scripts.matrix --only SigLIP --adapters lora,coop
    python -m scripts.matrix --write                    # ... and then the table of docs/guide/backbones.md

Architectures that become the same small model, module for module, are tried once. Outcomes are appended to a file of
JSON lines, one for each cell. Cells that stand there are not tried again, so that the script can be stopped at any
time, and goes on after an adapter has come. `--again FAILED` tries failed ones again.

Of each model the features are first compared for every place where the frozen part can end. A cell works if the adapter
is built with its defaults and then

- its features are the same from the frozen part on as from the first block on, to the bit, and those of the library's
  own forward up to rounding, before and after training;
- one step of DISAM in two domains and AdamW leaves finite gradients for all trained weights, moves some of them, and
  leaves the frozen ones as they were, to the bit.

An adapter that takes no steps is fitted instead. A cell is refused if a sentence says why; where the list of models
names other layers for LoRA than q and v, adapters of single layers are then tried on those. Everything else has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import ADAPTERS, build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import listed_models, load_backbone
from disam_peft.backbones.fingerprint import identity
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.base import Config
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from scripts.matrix_models import open_clip_models, small_model, transformers_models
from scripts.matrix_table import family_of, write_table
from tests.helpers.own_backbone import own_backbone
from tests.helpers.tiny_hf import own_image, own_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "backbones.md"
WORKS, REFUSED, FAILED = "works", "refused", "FAILED"

PROMPTS = ClassPrompts(("cat", "polar bear", "fire truck"), ("a photo of a {}.",))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
DOMAINS = torch.tensor([0, 0, 0, 1, 1, 1])
ROUNDING = 1e-3
"""Largest relative difference to the library's own forward, whose kernels add in another order."""

_SAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "peft": {f"peft {method}": {"method": method} for method in ("dora", "ia3", "ln_tuning")},
    "lp_ft": {"lp_ft": {"adapter": LoraAdapterConfig()}},
    "combined": {"lora with coop": {"parts": [{"kind": "lora"}, {"kind": "coop"}]}},
}
"""Of kinds whose configs have no defaults, or stand for many adapters: some, by the names of their columns."""


@dataclass(frozen=True)
class Cell:
    """One line of the file of outcomes."""

    family: str
    model: str
    small: str
    """Says what small model was tried: equal for equal ones."""
    adapter: str
    outcome: str
    """``works``, ``refused`` or ``FAILED``."""
    note: str = ""
    """The sentence of a refusal, an error, or what had to be set."""
    seconds: float = 0.0


def adapters() -> dict[str, Config]:
    """One config for each column, with the defaults of its kind."""
    found: dict[str, Config] = {}
    for config_class in ADAPTERS:
        kind = config_class.model_fields["kind"].default
        seed = {"seed": 1} if "seed" in config_class.model_fields else {}
        for name, settings in _SAMPLES.get(kind, {kind: {}}).items():
            found[name] = config_class(**seed, **settings)
    return found


def models() -> list[tuple[str, str]]:
    """Family and name of every architecture."""
    return [
        *(("open_clip", name) for name in open_clip_models()),
        *(("transformers", name) for name in transformers_models()),
    ]


def one_of_each_first(wanted: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first model of each line of the table, then the others, so that a run that is stopped has tried them all."""
    seen: set[str] = set()
    first = []
    for family, name in wanted:
        label = family_of(family, name)
        if label not in seen:
            seen.add(label)
            first.append((family, name))
    return [*first, *(one for one in wanted if one not in first)]


def load_small(family: str, name: str, folder: Path) -> ClipBackbone:
    """A small model of this architecture with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_backbone(small_model(family, name, folder))


def hash_of(backbone: ClipBackbone) -> str:
    """Equal for small models that are the same module for module, with the same weights."""
    return identity({"modules": repr(backbone.model), "backbone": backbone.identity})[:16]


def try_cell(family: str, name: str, shared: ClipBackbone, column: str, config: Config) -> Cell:
    """The outcome of one adapter on one model, which is left as it was."""
    begin = time.perf_counter()
    note = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _try(own_backbone(shared, torch.float32), config)
            except UserError:
                other = _on_other_layers(family, name, config)
                if other is None:
                    raise
                _try(own_backbone(shared, torch.float32), other[0])
                note = other[1]
        outcome = WORKS
    except UserError as error:
        outcome, note = REFUSED, str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome, note = FAILED, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    note = note.replace(shared.config.name, name)[:400]
    return Cell(family, name, hash_of(shared), column, outcome, note, round(time.perf_counter() - begin, 2))


def _on_other_layers(family: str, name: str, config: Config) -> tuple[Config, str] | None:
    """The config on the layers that ``disam-peft models`` names for this model, where these are not the default."""
    listed = next((one for one in listed_models(family) if one.name == name), None)
    if listed is None or listed.projections in ((), ("q", "v")):
        return None
    layers = list(listed.projections)
    if isinstance(config, LpFtConfig) and isinstance(config.adapter, LoraAdapterConfig):
        inner = config.adapter.model_copy(update={"projections": layers})
        return config.model_copy(update={"adapter": inner}), f"with adapter.projections: {layers}"
    if "projections" not in type(config).model_fields or getattr(config, "method", "") == "ln_tuning":
        return None
    return config.model_copy(update={"projections": layers}), f"with projections: {layers}"


def _try(backbone: ClipBackbone, config: Any) -> None:
    """
    Raises:
        UserError: the adapter is refused.
        AssertionError: it does not do what the head of this file says.
    """
    adapter = build_adapter(config, backbone, PROMPTS)
    classifier = ClipClassifier(backbone, adapter, PROMPTS)
    images = _images(backbone)
    _require_the_same_features(classifier, images)
    if adapter.starts_from_features():
        adapter.make_room(LABELS, DOMAINS)
        with torch.no_grad():
            features = backbone.encode_image(images)
            adapter.fit_start(features, LABELS, DOMAINS)
            if adapter.needs_tuning():
                zero_shot = classifier.zero_shot_outputs(classifier.encode_frozen(images)).logits_BC
                adapter.tune(features, LABELS, DOMAINS, zero_shot)
    if not takes_no_steps(config):
        _step(classifier, images)
    assert backbone.current_hash() == backbone.base_hash, "frozen weights have moved"
    _require_the_same_features(classifier, images)
    with torch.no_grad():
        assert torch.isfinite(classifier(images)).all(), "logits are not finite"


def _step(classifier: ClipClassifier, images: Tensor) -> None:
    trained = classifier.trainable()
    with_gradient = {id(p) for p in classifier.parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == with_gradient, "other parameters are trained"
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    disam = DISAM(list(trained.values()), rho=0.05, variance_weight=0.1, num_domains=2)
    classifier.train()
    logits = classifier.cached_logits(classifier.encode_frozen(images))
    disam.backward(lambda: nn.functional.cross_entropy(logits(), LABELS, reduction="none"), DOMAINS)
    for name, p in trained.items():
        assert p.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
    optimizer.step()
    classifier.eval()
    assert any(not torch.equal(before[name], p) for name, p in trained.items()), "nothing has moved"


@torch.no_grad()
def require_exact_splits(backbone: ClipBackbone) -> None:
    """Features are the same to the bit wherever the frozen part of a tower ends, and the library's up to rounding.

    Raises:
        AssertionError: they are not.
    """
    images = _images(backbone)
    counts = range(backbone.image_blocks + 1)
    first, *others = (backbone.image_head(backbone.image_trunk(images, blocks), blocks) for blocks in counts)
    assert all(torch.equal(one, first) for one in others), "a split changes image features"
    _require_near(first, _own_image_features(backbone, images), "image")
    tokens = backbone.tokenize([PROMPTS.templates[0].format(name) for name in PROMPTS.class_names])
    counts = range(backbone.text_blocks + 1)
    first, *others = (backbone.text_head(backbone.text_trunk(tokens, blocks), tokens, blocks) for blocks in counts)
    assert all(torch.equal(one, first) for one in others), "a split changes text features"
    _require_near(first, _own_text_features(backbone, tokens), "text")


@torch.no_grad()
def _require_the_same_features(classifier: ClipClassifier, images: Tensor) -> None:
    """From the frozen part on, with the adapter as it is now."""
    backbone, adapter = classifier.backbone, classifier.adapter
    assert adapter is not None
    features = classifier.tower_features(classifier.encode_frozen(images))
    if (split := adapter.image_split) is not None and split > 0:
        adapter.image_split = 0
        whole = classifier.tower_features(classifier.encode_frozen(images))
        adapter.image_split = split
        assert torch.equal(features, whole), "the split changes image features"
    inside = {id(p) for p in backbone.model.parameters()}
    if any(id(p) in inside for p in adapter.trainable().values()):  # the library's forward has it
        _require_near(features, _own_image_features(backbone, images), "image")


def _images(backbone: ClipBackbone) -> Tensor:
    height, width = backbone.preprocessing.size
    return torch.randn(len(LABELS), 3, height, width, generator=torch.Generator().manual_seed(0))


def _own_image_features(backbone: ClipBackbone, images: Tensor) -> Tensor:
    """By the library's own forward, adapter included."""
    if backbone.family == "transformers":
        return own_image(backbone, images)
    model: Any = backbone.model
    features = model.visual(images)
    return features[0] if isinstance(features, tuple) else features


def _own_text_features(backbone: ClipBackbone, tokens: Tensor) -> Tensor:
    if backbone.family == "transformers":
        return own_text(backbone, tokens)
    model: Any = backbone.model
    features = model.text(tokens)
    return features[0] if isinstance(features, tuple) else features


def _require_near(ours: Tensor, theirs: Tensor, tower: str) -> None:
    difference = float((ours - theirs).norm() / theirs.norm())
    assert difference <= ROUNDING, f"{tower} features differ from the library's by {difference:.1e}"


def read_cells(path: Path) -> dict[tuple[str, str], Cell]:
    """The last outcome of each cell, by model and adapter."""
    if not path.is_file():
        return {}
    cells = [Cell(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(cell.model, cell.adapter): cell for cell in cells}


def tried(
    wanted: list[tuple[str, str]], configs: dict[str, Config], known: dict[tuple[str, str], Cell]
) -> Iterator[Cell]:
    """The outcomes of all cells that are not known, each as soon as it is there; a model is loaded once."""
    of_small = {(cell.small, cell.adapter): cell for cell in known.values()}
    for family, name in wanted:
        left = {column: config for column, config in configs.items() if (name, column) not in known}
        if not left:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                shared = load_small(family, name, Path(folder))
                require_exact_splits(shared)
            except Exception as error:
                note = f"the model is not built: {type(error).__name__}: {error}"[:400]
                outcome = REFUSED if isinstance(error, UserError) else FAILED
                yield from (Cell(family, name, "", column, outcome, note) for column in left)
                continue
            small = hash_of(shared)
            for column, config in left.items():
                same = of_small.get((small, column))
                cell = try_cell(family, name, shared, column, config) if same is None else same
                of_small[small, column] = cell
                yield replace(cell, model=name, seconds=cell.seconds if same is None else 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcomes", type=Path, default=ROOT / "matrix.jsonl", help="a file of JSON lines")
    parser.add_argument("--only", default="", help="models with this text in their name")
    parser.add_argument("--adapters", default="", help="columns, separated by commas")
    parser.add_argument("--again", default="", help="an outcome whose cells are tried again")
    parser.add_argument("--write", action="store_true", help="write the table into docs/guide/backbones.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    configs = {name: one for name, one in adapters().items() if not given.adapters or name in given.adapters.split(",")}
    wanted = one_of_each_first([(family, name) for family, name in models() if given.only in name])
    done = {key: cell for key, cell in read_cells(given.outcomes).items() if cell.outcome != given.again}
    with given.outcomes.open("a", encoding="utf-8") as file:
        for cell in tried(wanted, configs, done):
            file.write(json.dumps(asdict(cell)) + "\n")
            file.flush()
            if cell.outcome == FAILED:
                print(f"{cell.model}, {cell.adapter}: {cell.outcome}: {cell.note}", flush=True)
    known = read_cells(given.outcomes)
    cells = [known[name, column] for _, name in models() for column in adapters() if (name, column) in known]
    for outcome in (WORKS, REFUSED, FAILED):
        print(f"{outcome}: {sum(cell.outcome == outcome for cell in cells)} of {len(cells)} cells")
    if given.write:
        write_table(PAGE, cells, list(adapters()), len(models()))
    return int(any(cell.outcome == FAILED for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
