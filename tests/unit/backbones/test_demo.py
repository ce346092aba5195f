"""The CLIP that comes with the package: one model in two layouts, useful and far from perfect."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import disam_peft.backbones
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import imagenet_templates, load_backbone
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.shapes import CLASSES, DOMAINS
from disam_peft.data.sources.shapes.scene import draw_scene, paint

FOLDER = Path(disam_peft.backbones.__file__).parent / "demo"
RECORD = json.loads((FOLDER / "pretraining.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def both() -> tuple[ClipBackbone, ClipBackbone]:
    return (
        load_backbone(BackboneConfig(name="demo")),
        load_backbone(BackboneConfig(family="transformers", name="demo")),
    )


def test_the_name_stays_the_models_and_not_a_folders(both):
    assert [backbone.config.name for backbone in both] == ["demo", "demo"]
    assert [backbone.family for backbone in both] == ["open_clip", "transformers"]


def test_both_families_compute_the_same_logits(both):
    from PIL import Image

    pictures = [Image.fromarray(paint(draw_scene(4, "test", d, c, 0))) for d in DOMAINS for c in CLASSES[:3]]
    texts = [f"a photo of a {name}." for name in CLASSES] + ["A sketch of a Dog, wörld."]
    logits, tokens = [], []
    with torch.no_grad():
        for backbone in both:
            pixels = torch.stack([backbone.image_transform(picture) for picture in pictures])
            images = torch.nn.functional.normalize(backbone.encode_image(pixels), dim=-1)
            tokens.append(backbone.tokenize(texts))
            features = torch.nn.functional.normalize(backbone.encode_text(tokens[-1]), dim=-1)
            logits.append(backbone.logit_scale * images @ features.T)
    assert torch.equal(*tokens)
    assert logits[0].std() > 1
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_weights_are_the_recorded_ones_and_small():
    files = sorted(FOLDER.glob("*.safetensors"))
    assert {path.name for path in files} == set(RECORD["sha256"])
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == RECORD["sha256"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000
    assert all(tensor.dtype == torch.float16 for path in files for tensor in load_file(path).values())
    assert sum(t.numel() for t in load_file(files[0]).values()) == RECORD["parameters"]


@pytest.mark.slow
def test_useful_but_imperfect(both):
    """The promise of the README, on images that neither the training nor its own evaluation has seen."""
    backbone = both[0]
    from PIL import Image

    with torch.no_grad():
        texts = backbone.encode_text(backbone.tokenize([f"a photo of a {name}." for name in CLASSES]))
        texts = torch.nn.functional.normalize(texts, dim=-1)
        accuracy = {}
        for domain in DOMAINS:
            pictures = [
                Image.fromarray(paint(draw_scene(0, "zero-shot", domain, c, i))) for c in CLASSES for i in range(15)
            ]
            images = backbone.encode_image(torch.stack([backbone.image_transform(picture) for picture in pictures]))
            labels = torch.arange(len(CLASSES)).repeat_interleave(15)
            accuracy[domain] = float(((images @ texts.T).argmax(dim=1) == labels).double().mean())
    assert 0.5 <= sum(accuracy.values()) / 6 <= 0.85, accuracy
    assert sum(value < 0.7 for value in accuracy.values()) >= 2, accuracy
    recorded = RECORD["log"][-1]["zero_shot"]
    for domain, value in accuracy.items():
        assert value == pytest.approx(recorded[domain] / 100, abs=0.12)  # three standard errors of 180 images


def test_words_it_does_not_know_stay_apart(both):
    for backbone in both:
        tokens = backbone.tokenize(["a photo of a dog.", "a photo of a giraffe.", "a photo of a giraffe ."])
        assert not torch.equal(tokens[0], tokens[1])
        assert backbone.context_length == 77
        backbone.tokenize([template.replace("{}", "crescent") for template in imagenet_templates()])


def test_class_names_are_single_tokens(both):
    tokens = both[0].tokenize([f"a {name}." for name in CLASSES])
    lengths = tokens.argmax(dim=1) + 1  # the end has the highest number
    assert set(lengths.tolist()) == {5}  # start, a, name, full stop, end
    assert len(set(tokens[:, 2].tolist())) == len(CLASSES)


def test_every_file_is_packaged():
    import tomllib

    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["disam_peft"]
    packaged = {path for pattern in patterns for path in FOLDER.parents[1].glob(pattern)}
    files = set(FOLDER.iterdir())
    assert len(files) >= 7
    assert files <= packaged
