"""Several adapters at once: each part computes what it computes alone, and is saved as itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from disam_peft.adapters.combined import PARTS, CombinedAdapter
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.adapters import adapter_label
from disam_peft.config.composed_adapters import CombinedConfig
from disam_peft.config.feature_adapters import LinearProbeConfig, TaskResConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.config.recipe import Recipe, as_yaml, load_recipe
from disam_peft.errors import UserError
from disam_peft.export.peft import export_peft
from tests.helpers.adapter_cells import ALL_LINEAR, FAMILIES, LAST_TWO, PROMPTS, pixels, tiny_backbone, tiny_classifier

LORA = LoraAdapterConfig(blocks=LAST_TWO, rank=2, seed=1)
COOP = CoOpConfig(context_tokens=4, seed=1)


def alone(combined: CombinedAdapter, name: str, twins: tuple[str, str], family: str) -> ClipClassifier:
    """One part with the weights that it has in the combination, on a backbone of its own."""
    backbone = tiny_backbone(twins, family)
    part = combined.parts()[name]
    adapter = build_adapter(part.config, backbone, PROMPTS)
    adapter.load_state(part.state())
    return ClipClassifier(backbone, adapter, PROMPTS)


def combined(classifier: ClipClassifier) -> CombinedAdapter:
    assert isinstance(classifier.adapter, CombinedAdapter)
    return classifier.adapter


@pytest.mark.parametrize("family", [FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("classes", [COOP, TaskResConfig(), LinearProbeConfig(init="random", seed=1)])
def test_each_part_computes_what_it_computes_alone(twins: tuple[str, str], family: str, classes: Any) -> None:
    both = tiny_classifier(tiny_backbone(twins, family), CombinedConfig(parts=[classes, LORA]))
    lora, other = (alone(combined(both), name, twins, family) for name in ("lora", classes.kind))
    assert list(combined(both).parts()) == ["lora", classes.kind], "in the order in which an image passes them"
    images = pixels()
    with torch.no_grad():
        features = lora(images), lora.features(lora.encode_frozen(images))
        assert torch.equal(both.features(both.encode_frozen(images)), features[1])
        wanted = other.adapter.logits(features[1], other.class_features(), other.backbone.logit_scale, None)
        assert torch.equal(both(images), wanted)
    assert (features[0] - wanted).abs().max() > 1e-3


def test_the_terms_of_the_parts_are_added(twins: tuple[str, str]) -> None:
    probe = LinearProbeConfig(text_weight=0.5)
    both = tiny_classifier(tiny_backbone(twins, "open_clip"), CombinedConfig(parts=[LORA, probe]))
    term = alone(combined(both), "linear_probe", twins, "open_clip").adapter.own_term()
    assert term is not None and term > 0 and torch.equal(both.adapter.own_term(), term)
    plain = tiny_classifier(tiny_backbone(twins, "open_clip"), CombinedConfig(parts=[LORA, LinearProbeConfig()]))
    assert plain.adapter.own_term() is None


def test_context_goes_through_the_adapted_text_tower(twins: tuple[str, str]) -> None:
    text = LoraAdapterConfig(towers=["text"], projections=ALL_LINEAR, blocks=[1], rank=2, seed=1)
    both = tiny_classifier(tiny_backbone(twins, "open_clip"), CombinedConfig(parts=[text, COOP]))
    lora, coop = (alone(combined(both), name, twins, "open_clip") for name in ("lora", "coop"))
    merged = tiny_backbone(twins, "open_clip")
    merged.model.load_state_dict(lora.adapter.merged(lora.backbone).state_dict())
    adapter = build_adapter(COOP, merged, PROMPTS)
    adapter.load_state(combined(both).parts()["coop"].state())

    def of(classifier: ClipClassifier) -> Tensor:
        return classifier.class_features().detach()

    wanted = of(ClipClassifier(merged, adapter, PROMPTS))
    torch.testing.assert_close(of(both), wanted, rtol=0, atol=1e-12)
    assert (wanted - of(coop)).abs().max() > 1e-3


def test_between_zero_shot_and_trained_all_parts_move(twins: tuple[str, str]) -> None:
    config = CombinedConfig(parts=[LORA, LinearProbeConfig()])
    both = tiny_classifier(tiny_backbone(twins, "open_clip"), config)
    plain, images = zero_shot(tiny_backbone(twins, "open_clip"), PROMPTS.class_names, PROMPTS.templates), pixels()
    with torch.no_grad():
        trained = both(images)
        with both.interpolation() as move_to:
            move_to(0.0)
            torch.testing.assert_close(both(images), plain(images), rtol=0, atol=1e-12)
        assert torch.equal(both(images), trained)
    with pytest.raises(UserError, match="'coop' adapter learns a prompt"):
        CombinedAdapter.require_zero_shot_weights(CombinedConfig(parts=[LORA, COOP]))


def test_each_part_is_exported_as_itself(twins: tuple[str, str], tmp_path: Path) -> None:
    both = tiny_classifier(tiny_backbone(twins, "transformers", torch.float32), CombinedConfig(parts=[LORA, COOP]))
    export_peft(tmp_path / "out", both)
    again = load_adapter(tmp_path / "out", tiny_backbone(twins, "transformers", torch.float32))
    images = pixels(dtype=torch.float32)
    assert torch.equal(again(images), both(images))
    assert (tmp_path / "out/lora/adapter_config.json").is_file() and (
        tmp_path / "out/class_features.safetensors"
    ).is_file()
    for name, part in combined(both).parts().items():
        of_part = load_adapter(tmp_path / "out" / name, tiny_backbone(twins, "transformers", torch.float32)).adapter
        assert type(of_part) is type(part)
        assert all(torch.equal(of_part.state()[key], tensor) for key, tensor in part.state().items())
    with pytest.raises(UserError, match=r"each part into a folder of its own; FOLDER/lora"):
        combined(both).merged(both.backbone)


def test_a_list_in_a_recipe_is_short_for_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = "adapter: [{kind: coop}, {kind: lora, rank: 2}]\nprotocol: all\ndata: {root: x}\nbackbone: {name: demo}\n"
    path.write_text("name: '{adapter}-x'\n" + values)
    recipe = load_recipe(path, ["adapter.1.rank=3"])
    assert recipe.adapter == CombinedConfig(parts=[CoOpConfig(), LoraAdapterConfig(rank=3)])
    assert adapter_label(recipe.adapter) == "coop + lora" and recipe.name == "coop-lora-x"
    path.write_text(as_yaml(recipe))
    assert load_recipe(path) == recipe
    with pytest.raises(UserError, match=r"'adapter\.parts\.2\.rank=3': parts holds a list; .* adapter\.parts\.0 to"):
        load_recipe(path, ["adapter.parts.2.rank=3"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"kind": "lora"}], "at least 2"),
        ([{"kind": "lora"}, {"kind": "full"}], "lora and full both change the towers; choose at most one of lora"),
        ([{"kind": "coop"}, {"kind": "linear_probe"}], "coop and linear_probe both change the classes"),
        ([{"kind": "lora"}, {"kind": "tip_adapter"}], "tip_adapter stands alone"),
        ([{"kind": "lora"}, {"kind": "combined"}], "combined stands alone"),
        ([{"kind": "lora", "towers": ["text"]}, {"kind": "linear_probe"}], "the text has no part in the logits"),
        ([{"kind": "full", "towers": ["text"]}, {"kind": "task_res"}], "task_res adds to the class features"),
        ([{"kind": "lora", "towers": ["text"]}, {"kind": "coop", "memory_budget_gb": 1}], "memory_budget_gb of coop"),
        ([{"kind": "lora", "logit_scale": "trained"}, {"kind": "coop"}], "which a combination cannot train"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts: Any, message: str) -> None:
    values = {"protocol": "all", "data": {"root": "x"}, "backbone": {"name": "demo"}, "adapter": parts}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(values)


def test_every_part_that_has_a_place_has_a_class() -> None:
    assert {config.model_fields["kind"].default for config in PARTS} == set(CombinedConfig.places)
