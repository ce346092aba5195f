"""A bare weights file says nothing of its model's activation and images: known weights do, or the recipe."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory, pretrained

from disam_peft.adapters.manifest import BackboneEntry
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.open_clip.weights_file import Settings, file_settings
from disam_peft.config.backbone import BackboneConfig, FilePreprocessing
from disam_peft.errors import Notice, UserError
from tests.helpers.tiny import tiny_openclip, tiny_openclip_config, tiny_transformers

KEYS = ("mean", "std", "interpolation", "resize_mode")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
SQUASHED = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}


def settings(name: str, **config: Any) -> tuple[Settings, bool, list[warnings.WarningMessage]]:
    model_config = open_clip.get_model_config(name)
    assert model_config is not None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        preprocess, found = file_settings(name, BackboneConfig(name=name, **config), model_config)
    return preprocess, found["quick_gelu"], said


def of_tags(name: str) -> list[tuple[Any, ...]]:
    """The settings of every known tag, with open_clip's defaults, and whether it runs with QuickGELU."""
    model_config = open_clip.get_model_config(name)
    assert model_config is not None
    found = []
    for tag in open_clip.list_pretrained_tags_by_model(name):
        known = open_clip.get_pretrained_cfg(name, tag)
        quick = bool(known.get("quick_gelu") or model_config.get("quick_gelu"))
        found.append((*(tuple(v) if isinstance(v := known[key], list | tuple) else v for key in KEYS), quick))
    return found


def test_row_54_every_model_of_open_clip() -> None:
    """What all tags of a name share is used; where they differ or there are none, a warning says so."""
    differing, unknown = [], []
    for name in open_clip.list_models():
        preprocess, quick, said = settings(name)
        chosen = (*(preprocess[key] for key in KEYS), quick)
        tags = of_tags(name)
        loud = [str(one.message) for one in said if one.category is not Notice]
        if len(set(tags)) == 1:
            assert chosen == tags[0] and not loud, name
            continue
        assert len(loud) == 1 and "says nothing of its preprocessing and activation" in loud[0], name
        (differing if tags else unknown).append(name)
        if tags:
            assert chosen in tags, name
    assert {"ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-H-14"} <= set(differing)
    assert len(differing) < 10 and len(unknown) < 40, "the most part of all names has one answer"


@pytest.mark.parametrize(
    ("name", "mean", "resize", "quick"),
    [
        ("ViT-B-16-SigLIP", (0.5, 0.5, 0.5), "squash", False),
        ("ViT-SO400M-14-SigLIP2", (0.5, 0.5, 0.5), "squash", False),
        ("MobileCLIP-S1", (0.0, 0.0, 0.0), "shortest", False),
        ("PE-Core-B-16", (0.5, 0.5, 0.5), "squash", False),
        ("ViT-B-32-quickgelu", OPENAI_MEAN, "shortest", True),
        ("RN50", OPENAI_MEAN, "shortest", True),
    ],
)
def test_row_54_examples(name: str, mean: tuple[float, ...], resize: str, quick: bool) -> None:
    preprocess, found, said = settings(name)
    assert (preprocess["mean"], preprocess["resize_mode"], found) == (mean, resize, quick)
    assert [one.category for one in said] in ([], [Notice])


def test_row_54_known_weights_that_differ_are_named_with_the_settings() -> None:
    with pytest.warns(UserWarning, match=r"weights of 'ViT-B-32' differ in them \(openai: activation quick_gelu; .*"):
        file_settings("ViT-B-32", BackboneConfig(name="ViT-B-32"), {})
    _, _, [warning] = settings("ViT-L-14")
    assert "set backbone.activation, backbone.preprocessing.mean, backbone.preprocessing.std" in str(warning.message)
    given = FilePreprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    preprocess, quick, said = settings("ViT-L-14", activation="quick_gelu", preprocessing=given)
    assert preprocess["mean"] == (0.5, 0.5, 0.5) and preprocess["resize_mode"] == "shortest" and quick and not said


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of a tiny model that open_clip knows as 'tiny-clip', without pretrained tags."""
    tiny_openclip(tmp_path / "tiny", seed=3)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-clip", tiny_openclip_config())
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", {})
    weights = tmp_path / "weights.safetensors"
    shutil.move(tmp_path / "tiny" / "open_clip_model.safetensors", weights)
    return weights


def known(monkeypatch: pytest.MonkeyPatch, **tags: dict[str, Any]) -> None:
    """Let open_clip know these tags of 'tiny-clip'."""
    monkeypatch.setitem(
        pretrained._PRETRAINED, "tiny-clip", {name: {"hf_hub": "o/n/", **tag} for name, tag in tags.items()}
    )


def test_row_54_a_file_is_loaded_as_the_known_weights_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, one={**SQUASHED, "quick_gelu": True}, two={**SQUASHED, "quick_gelu": True})
    with pytest.warns(Notice, match=r"as all its known weights are: activation quick_gelu, mean \[0\.5, 0\.5, 0\.5\]"):
        backbone = load_backbone(BackboneConfig(name="tiny-clip", pretrained=str(file)))
    seen = backbone.preprocessing
    assert (seen.mean, seen.std, seen.interpolation, seen.resize) == ((0.5,) * 3, (0.5,) * 3, "bilinear", "squash")
    assert backbone.quick_gelu and backbone.fingerprint["activation of the image tower"] == ["quick_gelu"]


def test_row_54_known_weights_that_all_differ_from_the_default_ask(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, one=SQUASHED, two={**SQUASHED, "mean": (0.0,) * 3})
    config = BackboneConfig(name="tiny-clip", pretrained=str(file))
    with pytest.raises(UserError, match=r"differ in them \(one: mean .*; set backbone\.preprocessing\.mean to what"):
        load_backbone(config)
    answered = config.model_copy(update={"preprocessing": FilePreprocessing(mean=(0.1, 0.2, 0.3))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        backbone = load_backbone(answered)
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3) and backbone.preprocessing.resize == "squash"


def test_row_54_without_known_weights_the_assumption_is_said(file: Path) -> None:
    config = BackboneConfig(name="tiny-clip", pretrained=str(file))
    with pytest.warns(UserWarning, match=r"knows no weights of 'tiny-clip': activation gelu, mean \[0\.481"):
        backbone = load_backbone(config)
    assert backbone.preprocessing.mean == OPENAI_MEAN
    whole = FilePreprocessing(mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", resize="longest")
    answered = config.model_copy(update={"activation": "quick_gelu", "preprocessing": whole})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone(answered)
    assert backbone.quick_gelu and backbone.preprocessing.resize == "longest"


def test_row_54_an_adapter_of_0_1_on_a_file_gets_what_it_was_trained_with(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, one={**SQUASHED, "quick_gelu": True})
    entry = BackboneEntry(name="tiny-clip", pretrained=str(file), sha256="0" * 64, quick_gelu=False, embed_dim=16)
    backbone = load_backbone(entry.config())
    assert backbone.preprocessing.mean == OPENAI_MEAN and not backbone.quick_gelu
    described = json.loads(json.dumps(backbone.describe()))
    assert BackboneEntry(**described).config() == entry.config()


@pytest.mark.parametrize(
    "config",
    [
        {"name": "demo", "activation": "gelu"},
        {"name": "demo", "preprocessing": {"resize": "squash"}},
        {"name": "demo", "family": "transformers", "activation": "gelu"},
        {"name": "ViT-B-32", "pretrained": "openai", "activation": "gelu"},
        {"name": "ViT-B-32", "pretrained": "random", "preprocessing": {"mean": [0, 0, 0]}},
    ],
    ids=str,
)
def test_settings_of_a_file_are_refused_where_there_is_none(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"backbone\.(activation|preprocessing) has no meaning with"):
        load_backbone(BackboneConfig.model_validate(config))


# -- random weights ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_random_is_a_word_in_both_families(family: Any, tmp_path: Path) -> None:
    name = f"local-dir:{tmp_path}" if family == "open_clip" else str(tmp_path)
    (tiny_openclip if family == "open_clip" else tiny_transformers)(tmp_path)
    with pytest.warns(UserWarning, match=r"RANDOM weights \(pretrained: random\)"):
        first, again, other = (
            load_backbone(BackboneConfig(family=family, name=name, pretrained=word, seed=seed))
            for word, seed in (("random", 0), ("none", 0), ("random", 1))
        )
    assert first.base_hash == again.base_hash != other.base_hash
    assert BackboneConfig(name="x", pretrained="random") == BackboneConfig(name="x", pretrained="none")


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_the_demo_backbone_with_random_weights(family: Any) -> None:
    plain = load_backbone(BackboneConfig(family=family, name="demo"))
    with pytest.warns(UserWarning, match="backbone 'demo' has RANDOM weights"):
        random = load_backbone(BackboneConfig(family=family, name="demo", pretrained="random"))
    assert random.base_hash != plain.base_hash
    parts = {"logit scale", "buffers"}
    assert all(random.fingerprint[part] == value for part, value in plain.fingerprint.items() if part not in parts)


def test_random_is_a_word_for_names_of_open_clip(file: Path) -> None:
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="RANDOM"):
        backbone = load_backbone(BackboneConfig(name="tiny-clip", pretrained="random"))
    assert backbone.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 16)
