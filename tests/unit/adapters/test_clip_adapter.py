"""CLIP-Adapter against the values of its authors' code, and as a member of everything that adapters take part in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.clip_adapter import ClipAdapter
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.recipe import load_recipe
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.export.merged import export_merged
from disam_peft.training.fit import fit
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone
from tests.helpers.paths import RECIPES, REFERENCE

VALUES = np.load(REFERENCE / "adapters.npz")
CASES = {
    name: case for name, case in json.loads(str(VALUES["meta"]))["cases"].items() if name.startswith("clip_adapter")
}


def value(case: str, key: str) -> Tensor:
    return torch.from_numpy(VALUES[f"{case}/{key}"])


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param)


def build(backbone: ClipBackbone, **settings: object) -> ClipClassifier:
    adapter = build_adapter(ClipAdapterConfig(**settings), backbone, PROMPTS)
    return ClipClassifier(backbone, adapter, PROMPTS)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_authors(case: str) -> None:
    config = ClipAdapterConfig(reduction=CASES[case]["reduction"], ratio=CASES[case]["ratio"])
    adapter = ClipAdapter(config, value(case, "down").clone(), value(case, "up").clone())
    text_CE = nn.functional.normalize(value(case, "text"), dim=-1)
    features_BE = adapter.image_features(value(case, "features"))
    logits_BC = adapter.logits(features_BE, text_CE, value(case, "logit_scale").exp(), None)
    wanted_BC = value(case, "logits")
    assert (logits_BC - wanted_BC).abs().max() <= 1e-10 * wanted_BC.abs().max()
    nn.functional.cross_entropy(logits_BC, value(case, "labels")).backward()
    for name, parameter in adapter.trainable().items():
        wanted = value(case, f"grad_{name}")
        assert parameter.grad is not None and wanted.abs().max() > 1e-4
        assert (parameter.grad - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_both_reference_cases_were_compared() -> None:
    assert sorted(CASES) == ["clip_adapter_red2", "clip_adapter_red4"]


def test_the_classifier_blends_features_that_are_not_normalised(backbone: ClipBackbone) -> None:
    classifier = build(backbone, ratio=0.3, reduction=2, seed=0)
    weights, features_BE = classifier.trainable(), backbone.encode_image(pixels())
    adapted_BE = ((features_BE @ weights["down"].T).relu() @ weights["up"].T).relu()
    assert adapted_BE.count_nonzero() > 0
    blended_BE = nn.functional.normalize(0.3 * adapted_BE + 0.7 * features_BE, dim=-1)
    by_hand = backbone.logit_scale * blended_BE @ classifier.class_features().T
    assert (classifier(pixels()) - by_hand).abs().max() < 1e-12 * by_hand.abs().max()
    assert torch.equal(classifier.features(features_BE), classifier.adapter.image_features(features_BE))
    assert torch.equal(classifier.tower_features(features_BE), features_BE)
    # the length of a feature matters, as it does not for CLIP itself
    shifted = features_BE + 1
    assert not torch.allclose(classifier.logits(shifted), ClipClassifier(backbone, None, PROMPTS).logits(shifted))
    assert classifier.image_split is None, "the whole tower is frozen: a feature store holds its output"


def test_without_an_active_unit_it_is_zero_shot(backbone: ClipBackbone) -> None:
    classifier = build(backbone, ratio=0.2)
    with torch.no_grad():
        classifier.trainable()["up"].zero_()
    wanted = ClipClassifier(backbone, None, PROMPTS)(pixels())
    assert (classifier(pixels()) - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def test_weights_are_drawn_as_linear_layers_without_bias_draw_them(backbone: ClipBackbone) -> None:
    torch.manual_seed(7)
    down, up = nn.Linear(16, 4, bias=False).weight, nn.Linear(4, 16, bias=False).weight
    torch.manual_seed(7)
    drawn = build(backbone).trainable()
    assert torch.equal(drawn["down"], down.double()) and torch.equal(drawn["up"], up.double())
    state = torch.get_rng_state()
    first = build(backbone, seed=0).trainable()
    assert torch.equal(torch.get_rng_state(), state), "a seed of its own leaves the run's generator alone"
    assert torch.equal(build(backbone, seed=0).trainable()["up"], first["up"])
    assert not torch.equal(build(backbone, seed=1).trainable()["up"], first["up"])


@pytest.mark.parametrize(("reduction", "hidden"), [(1, 16), (3, 5), (16, 1)])
def test_the_bottleneck_rounds_down(backbone: ClipBackbone, reduction: int, hidden: int) -> None:
    weights = build(backbone, reduction=reduction).trainable()
    assert (tuple(weights["down"].shape), tuple(weights["up"].shape)) == ((hidden, 16), (16, hidden))


def test_a_bottleneck_without_units_is_an_error(backbone: ClipBackbone) -> None:
    with pytest.raises(UserError, match=r"reduction 17 leaves no hidden unit of the 16 features.*use at most 16"):
        build(backbone, reduction=17)


def test_it_keeps_its_precision_under_autocast_and_on_a_half_precision_tower(backbone: ClipBackbone) -> None:
    backbone.to(dtype=torch.float32)
    classifier, features_BE = build(backbone, seed=0), backbone.encode_image(pixels(dtype=torch.float32))
    wanted = classifier.logits(features_BE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier.logits(features_BE), wanted)
    half = build(backbone.to(dtype=torch.bfloat16), seed=0)
    assert all(p.dtype == torch.float32 for p in half.trainable().values())
    assert half.logits(features_BE.bfloat16()).dtype == torch.float32


def test_merging_is_refused_with_the_way_out(backbone: ClipBackbone, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("merged") / "model"
    with pytest.raises(
        UserError, match="'clip_adapter' adapter has no weights of the backbone to merge into; use --to"
    ):
        export_merged(folder, build(backbone))
    assert not folder.exists()


@pytest.mark.slow
def test_every_method_trains_it_and_each_in_its_own_way(
    openclip_name: str, domains_folder: Path, tmp_path: Path
) -> None:
    """From a feature store: the frozen part is the whole image tower."""
    dataset = load(DataConfig(root=domains_folder, verify=False))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    weights = {}
    for name in ("erm", "sam", "disam"):
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        classifier = ClipClassifier(
            backbone, build_adapter(ClipAdapterConfig(ratio=0.8, seed=0), backbone, prompts), prompts
        )
        result = fit(
            classifier,
            dataset,
            method=MethodConfig(name=name, rho=0.05, variance_weight=0.5),
            config=TrainConfig(steps=40, batch_size=48, workers=0, learning_rate=3e-2),
            augment=AugmentConfig(kind="none"),
            features=FeatureConfig(store=True, folder=tmp_path),
        )
        assert result.last_loss < 0.8 * result.first_loss and result.skipped_steps == 0
        assert backbone.current_hash() == backbone.base_hash
        weights[name] = classifier.trainable()["up"].detach().clone()
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 1, "all methods read one store"
    for one, other in (("erm", "sam"), ("sam", "disam"), ("erm", "disam")):
        assert (weights[one] - weights[other]).abs().max() > 1e-4


def test_its_recipe_spells_out_the_defaults() -> None:
    recipe = load_recipe(RECIPES / "pacs" / "clip_adapter_disam.yaml")
    assert recipe.adapter == ClipAdapterConfig(reduction=4, ratio=0.2)
    assert recipe.method.name == "disam"
    with pytest.raises(UserError, match=r"adapter\.reductoin: unknown key; did you mean 'reduction'"):
        load_recipe(RECIPES / "pacs" / "clip_adapter_disam.yaml", ["adapter.reductoin=2"])
