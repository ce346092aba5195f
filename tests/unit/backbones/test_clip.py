"""Loading and saving transformers models, and their agreement with open_clip."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError
from tests.helpers.tiny import tiny_transformers, twin_checkpoints

TEXTS = ["a photo of a dog", "a sketch of an elephant", "a guitar", "an oil painting of a house at night"]


def load(name: str | Path, **fields: Any) -> ClipBackbone:
    return load_backbone(BackboneConfig(family="transformers", name=str(name), **fields))


def copy_of(folder: str, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(size[0])
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy()).convert(mode)


def logits(backbone: ClipBackbone, images: list[Image.Image]) -> torch.Tensor:
    with torch.no_grad():
        image = backbone.encode_image(torch.stack([backbone.image_transform(image) for image in images]))
        text = backbone.encode_text(backbone.tokenize(TEXTS))
    image, text = (torch.nn.functional.normalize(features, dim=-1) for features in (image, text))
    return backbone.logit_scale * image @ text.T


# -- what is loaded ------------------------------------------------------------------------------------------


def test_features_are_those_of_the_clip_model(transformers_dir: str) -> None:
    backbone = load(transformers_dir)
    theirs = CLIPModel.from_pretrained(transformers_dir).eval()
    images = torch.randn(3, 3, 32, 32)
    encoded = AutoTokenizer.from_pretrained(transformers_dir)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=images).pooler_output
        text = theirs.get_text_features(**encoded).pooler_output
        assert (backbone.encode_image(images) - image).abs().max() < 1e-5
        assert (backbone.encode_text(backbone.tokenize(TEXTS)) - text).abs().max() < 1e-5
        scale = theirs.logit_scale.exp()
    assert torch.equal(backbone.logit_scale, scale) and backbone.logit_bias is None


def test_what_a_checkpoint_says_about_itself(tmp_path: Path) -> None:
    backbone = load(tiny_transformers(tmp_path, quick_gelu=True, context_length=20))
    assert (backbone.embed_dim, backbone.token_width, backbone.context_length) == (16, 32, 20)
    assert (backbone.image_blocks, backbone.text_blocks) == (3, 3)
    assert backbone.quick_gelu is True and backbone.describe()["quick_gelu"] is True
    assert backbone.preprocessing.size == (32, 32)
    assert backbone.preprocessing.std == (0.26862954, 0.26130258, 0.27577711)
    assert backbone.preprocessing.interpolation == "bicubic"
    assert backbone.model.config._attn_implementation == "sdpa"
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (20, 77)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_image_transform_is_the_processor(transformers_dir: str, size: tuple[int, int], mode: str) -> None:
    processor = AutoImageProcessor.from_pretrained(transformers_dir)
    image = picture(size, mode)
    transform = pickle.loads(pickle.dumps(load(transformers_dir).image_transform))  # as a worker process gets it
    ours = transform(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    assert torch.equal(ours, processor(images=[image], return_tensors="pt")["pixel_values"][0])


def test_a_processor_config_of_the_old_form(transformers_dir: str, tmp_path: Path) -> None:
    folder = copy_of(transformers_dir, tmp_path / "old")
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 2}
    old |= {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**old, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    backbone = load(folder)
    assert backbone.preprocessing.size == (32, 32) and backbone.preprocessing.interpolation == "bilinear"
    white = backbone.image_transform(Image.new("RGB", (40, 32), "white"))
    torch.testing.assert_close(white, torch.full((3, 32, 32), 2.0))


def test_row_19_prompt_longer_than_the_context(tmp_path: Path) -> None:
    backbone = load(tiny_transformers(tmp_path, context_length=8))
    fits = backbone.tokenize(["one two three four five six"])
    assert fits.shape == (1, 8) and fits.dtype == torch.int64 and fits[0, -1] == 49407
    with pytest.raises(UserError, match=r"'one two three four five six seven' has 9 tokens.*holds 8"):
        backbone.tokenize(["a dog", "one two three four five six seven"])


@pytest.mark.slow
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_same_weights_give_the_same_logits_in_both_families(tmp_path: Path, quick_gelu: bool) -> None:
    name, folder = twin_checkpoints(tmp_path, seed=6, quick_gelu=quick_gelu)
    openclip, hf = load_backbone(BackboneConfig(name=name)), load(folder)
    assert openclip.quick_gelu is hf.quick_gelu is quick_gelu
    images = [picture((32, 32)), picture((32, 32)).rotate(90), Image.new("RGB", (32, 32), "teal")]
    expected = logits(openclip, images)
    assert expected.std() > 0.5
    assert (logits(hf, images) - expected).abs().max() < 1e-4
    assert openclip.preprocessing == hf.preprocessing


@pytest.mark.slow
def test_hash_is_that_of_the_weights(transformers_dir: str, tmp_path: Path) -> None:
    first = load(transformers_dir)
    assert load(transformers_dir).base_hash == first.base_hash == first.current_hash()
    folder = copy_of(transformers_dir, tmp_path / "flipped")
    state = load_file(folder / "model.safetensors")
    state["text_model.encoder.layers.2.mlp.fc1.weight"].view(torch.int32)[5, 6] ^= 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).base_hash != first.base_hash


@pytest.mark.slow
def test_random_weights_warn_and_follow_the_seed(transformers_dir: str) -> None:
    hashes = []
    for seed in (0, 0, 1):
        with pytest.warns(UserWarning, match="RANDOM weights"):
            hashes.append(load(transformers_dir, pretrained="none", seed=seed).base_hash)
    assert hashes[0] == hashes[1] != hashes[2]
    assert load(transformers_dir).base_hash not in hashes


def test_half_precision_checkpoints_load_in_float32(transformers_dir: str, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(transformers_dir).half().save_pretrained(tmp_path / "half")
    folder = copy_of(transformers_dir, tmp_path / "copy")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "half" / name, folder / name)
    assert load(folder).dtype == torch.float32


# -- mistakes ------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused(transformers_dir: str, tmp_path: Path) -> None:
    folder = copy_of(transformers_dir, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load(folder)


def test_incomplete_folders_say_what_is_missing(transformers_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "nowhere")
    folder = copy_of(transformers_dir, tmp_path / "part")
    (folder / "preprocessor_config.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no \*processor_config\.json, tokenizer\.json \(or vocab\.json"):
        load(folder)


def test_weights_that_do_not_fit_are_refused(transformers_dir: str, tmp_path: Path) -> None:
    folder = copy_of(transformers_dir, tmp_path / "part")
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing or of another shape \(text_projection\.weight"):
        load(folder)
    state["text_projection.weight"] = torch.zeros(16, 31)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing or of another shape \(text_projection\.weight"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="do not load as a CLIPModel"):
        load(folder)


def test_other_model_types_are_refused(transformers_dir: str, tmp_path: Path) -> None:
    folder = copy_of(transformers_dir, tmp_path / "blip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "blip"}))
    with pytest.raises(UserError, match="of type 'blip'; supported are clip, siglip,"):
        load(folder)


def test_settings_without_meaning_are_refused(transformers_dir: str) -> None:
    with pytest.raises(UserError, match="'openai' has no meaning for transformers"):
        load(transformers_dir, pretrained="openai")
    with pytest.raises(UserError, match="only hub repositories have revisions"):
        load(transformers_dir, revision="main")


# -- saving --------------------------------------------------------------------------------------------------

PIPELINE = """
import json, sys
from PIL import Image
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model=sys.argv[1])
labels = json.loads(sys.argv[3])
rows = classify(Image.open(sys.argv[2]), candidate_labels=labels, hypothesis_template="{}")
assert not any(name.startswith(("disam_peft", "peft")) for name in sys.modules)
scores = {row["label"]: row["score"] for row in rows}
print(json.dumps([scores[label] for label in labels]))
"""


@pytest.mark.slow
def test_a_saved_model_serves_a_pipeline(transformers_dir: str, tmp_path: Path) -> None:
    backbone = load(transformers_dir)
    backbone.save(tmp_path / "saved", backbone.model)
    assert not list((tmp_path / "saved").glob("*.bin"))
    image = picture((45, 39))
    image.save(tmp_path / "image.png")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "image.png"), json.dumps(TEXTS)]
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, *arguments],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    scores = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    expected = logits(backbone, [image]).softmax(dim=-1)[0]
    assert expected.max() < 0.99
    assert (scores - expected).abs().max() < 1e-5
    again = load(tmp_path / "saved")
    assert again.base_hash == backbone.base_hash
    assert torch.equal(again.tokenize(TEXTS), backbone.tokenize(TEXTS))
    assert torch.equal(logits(again, [image]), logits(backbone, [image]))


def test_saving_with_an_adapter_attached_is_refused(transformers_dir: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    backbone = load(transformers_dir)
    targets = [target.name for target in backbone.targets() if target.projection == "q"]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), backbone.model)
    with pytest.raises(UserError, match="merge it first"):
        backbone.save(tmp_path / "saved", backbone.model)
    assert not (tmp_path / "saved").exists()


def test_loading_and_saving_show_no_bars_of_the_library(
    transformers_dir: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backbone = load(transformers_dir)
    backbone.save(tmp_path / "saved", backbone.model)
    shown = capfd.readouterr()
    assert "%|" not in shown.err + shown.out
    AutoTokenizer.from_pretrained(transformers_dir)
    CLIPModel.from_pretrained(transformers_dir)
    assert "%|" in capfd.readouterr().err, "the library shows them where others call it"
