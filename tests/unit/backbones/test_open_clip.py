"""Loading and saving open_clip models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from PIL import Image
from safetensors.torch import load_file, save_file

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import imagenet_templates, load_backbone
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import Notice, UserError
from disam_peft.export.merged import TOLERANCE, export_merged
from tests.helpers.adapter_cells import PROMPTS, pixels, tiny_classifier
from tests.helpers.tiny import tiny_openclip, tiny_openclip_config, write_clip_tokenizer
from tests.helpers.towers import assert_same, relative

TEXTS = ["a dog", "a sketch of an elephant", "a guitar"]


def load(name: str, **fields: Any) -> ClipBackbone:
    return load_backbone(BackboneConfig(name=name, **fields))


def load_random(folder: Path, config: dict[str, Any]) -> ClipBackbone:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.warns(UserWarning, match="RANDOM weights"):
        return load(f"local-dir:{folder}", pretrained="none")


def picture(size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(size[0])
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def logits(backbone: ClipBackbone, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        image = torch.nn.functional.normalize(backbone.encode_image(images), dim=-1)
        text = torch.nn.functional.normalize(backbone.encode_text(backbone.tokenize(TEXTS)), dim=-1)
        scaled = backbone.logit_scale * image @ text.T
    return scaled if backbone.logit_bias is None else scaled + backbone.logit_bias


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model known to open_clip as 'tiny-clip', with a QuickGELU tag 'openai' that lies in a fake hub cache."""
    folder = tmp_path / "tiny"
    tiny_openclip(folder, seed=3)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-clip", tiny_openclip_config())
    tag = {"hf_hub": "owner/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    tag |= {"interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-clip", {"openai": tag})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--owner--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return folder


# -- what is loaded ------------------------------------------------------------------------------------------


def test_what_a_checkpoint_says_about_itself(openclip_name: str) -> None:
    backbone = load(openclip_name)
    assert (backbone.embed_dim, backbone.token_width, backbone.context_length) == (16, 32, 77)
    assert backbone.preprocessing.size == (32, 32)
    assert backbone.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
    assert backbone.preprocessing.interpolation == "bicubic"
    assert backbone.logit_bias is None
    assert backbone.logit_scale.shape == () and not backbone.logit_scale.requires_grad
    assert backbone.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.describe() == {
        "family": "open_clip",
        "name": openclip_name,
        "pretrained": None,
        "revision": None,
        "seed": 0,
        "activation": None,
        "preprocessing": None,
        "precision": "float32",
        "sha256": backbone.base_hash,
        "quick_gelu": False,
        "embed_dim": 16,
        "fingerprint": backbone.fingerprint,
    }


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (20, 77)])
def test_image_transform_is_open_clips(openclip_name: str, size: tuple[int, int]) -> None:
    _, _, transform = open_clip.create_model_and_transforms(openclip_name)
    ours = load(openclip_name).image_transform(picture(size))
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    assert torch.equal(ours, transform(picture(size)))


@pytest.mark.slow
def test_hash_is_that_of_the_weights(openclip_name: str, tmp_path: Path) -> None:
    first = load(openclip_name)
    assert load(openclip_name).base_hash == first.base_hash == first.current_hash()
    folder = tmp_path / "flipped"
    shutil.copytree(openclip_name.removeprefix("local-dir:"), folder)
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.transformer.resblocks.1.attn.in_proj_weight"].view(torch.int32)[40, 3] ^= 1
    save_file(state, folder / "open_clip_model.safetensors")
    assert load(f"local-dir:{folder}").base_hash != first.base_hash


def test_random_weights_warn_and_follow_the_seed(tmp_path: Path) -> None:
    first, again = (load_random(tmp_path / "random", tiny_openclip_config()) for _ in range(2))
    with pytest.warns(UserWarning, match="say nothing about the method"):
        other = load(f"local-dir:{tmp_path / 'random'}", pretrained="none", seed=1)
    assert first.base_hash == again.base_hash != other.base_hash


def test_random_weights_leave_the_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_random(tmp_path / "random", tiny_openclip_config())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_a_model_of_real_size_by_name() -> None:
    with pytest.warns(UserWarning, match="RANDOM weights"):
        backbone = load("ViT-B-32", pretrained="none")
    assert (backbone.image_blocks, backbone.text_blocks, backbone.embed_dim) == (12, 12, 512)
    assert len(backbone.targets()) == 2 * 12 * 8 + 3
    assert backbone.preprocessing.size == (224, 224)


def test_a_tag_brings_its_activation_and_its_preprocessing(registered: Path) -> None:
    with pytest.warns(UserWarning, match="trained with QuickGELU") as caught:
        backbone = load("tiny-clip", pretrained="openai")
    assert len(caught) == 1
    assert backbone.quick_gelu is True and backbone.describe()["quick_gelu"] is True
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3)
    assert backbone.preprocessing.interpolation == "bilinear"
    assert backbone.image_transform(picture((64, 40))).shape == (3, 32, 32)
    plain = load("tiny-clip", pretrained=str(registered / "open_clip_model.safetensors"), activation="gelu")
    assert plain.quick_gelu is False
    assert plain.base_hash == backbone.base_hash
    difference = logits(plain, torch.ones(1, 3, 32, 32)) - logits(backbone, torch.ones(1, 3, 32, 32))
    assert difference.abs().max() > 1e-2


def test_a_hub_repository_loads_from_the_cache_alone(registered: Path) -> None:
    backbone = load("hf-hub:owner/tiny")
    assert backbone.base_hash == load(f"local-dir:{registered}").base_hash
    assert backbone.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)


# -- mistakes ------------------------------------------------------------------------------------------------


def test_row_17_unknown_model_name() -> None:
    with pytest.raises(UserError) as caught:
        load("ViT-B-23", pretrained="openai")
    message = str(caught.value)
    assert "'ViT-B-23'" in message and "'ViT-B-32'" in message
    assert message.split("did you mean ")[1].split("?")[0].count("'") == 6  # three names


@pytest.mark.parametrize(("tag", "close"), [("opnai", "'openai'"), ("laion2b", "'laion2b_e16'"), ("zzz", "'openai'")])
def test_row_17_unknown_tag(tag: str, close: str) -> None:
    with pytest.raises(UserError) as caught:
        load("ViT-B-32", pretrained=tag)
    message = str(caught.value)
    assert f"'{tag}'" in message and close in message.split("did you mean ")[1].split("?")[0]


def test_a_missing_tag_lists_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"not set for 'ViT-B-16'; tags of ViT-B-16: openai, .*datacomp"):
        load("ViT-B-16")


def test_a_tag_has_no_meaning_beside_a_folder(openclip_name: str) -> None:
    with pytest.raises(UserError, match="brings its own weights"):
        load(openclip_name, pretrained="openai")


@pytest.mark.parametrize("name", ["folder", "ViT-B-32"])
def test_a_revision_has_no_meaning_outside_the_hub(openclip_name: str, name: str) -> None:
    with pytest.raises(UserError, match="only hub repositories have revisions"):
        load(openclip_name if name == "folder" else name, revision="main")


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="the folder exists"):
        load(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="'model_cfg'"):
        load(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_openclip_config()}))
    with pytest.raises(UserError, match="no weights"):
        load(f"local-dir:{tmp_path}")
    with pytest.raises(UserError, match="'local-dir:' is incomplete"):
        load("local-dir:")


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused(registered: Path) -> None:
    weights = registered / "open_clip_model.safetensors"
    state = load_file(weights)
    del state["visual.ln_post.bias"]
    save_file(state, weights)
    with pytest.raises(UserError, match=r"do not load into its model.*\n?.*visual\.ln_post\.bias"):
        load(f"local-dir:{registered}")
    weights.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="do not load into its model"):
        load(f"local-dir:{registered}")


class Bomb:
    """Says so when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_pickled_weights_are_refused_unread(registered: Path, tmp_path: Path) -> None:
    pickled = registered / "open_clip_pytorch_model.bin"
    torch.save({"weights": Bomb(tmp_path / "exploded")}, pickled)
    with pytest.raises(UserError, match=r"open_clip_pytorch_model\.bin is not a safetensors file"):
        load("tiny-clip", pretrained=str(pickled))
    assert load(f"local-dir:{registered}").base_hash  # the safetensors file beside it is taken
    (registered / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="not a safetensors file"):
        load(f"local-dir:{registered}")
    assert not (tmp_path / "exploded").exists()


def test_row_19_prompt_longer_than_the_context(tmp_path: Path) -> None:
    backbone = load(tiny_openclip(tmp_path, text_cfg={"context_length": 8}))
    fits = backbone.tokenize(["one two three four five six"])
    assert fits.shape == (1, 8) and fits[0, -1] == 49407
    with pytest.raises(UserError, match=r"'one two three four five six seven' has 9 tokens.*holds 8"):
        backbone.tokenize(["a dog", "one two three four five six seven"])


# -- towers that are not a plain ViT and a plain text transformer ---------------------------------------------


def test_a_resnet_is_run_in_parts(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    name = tiny_openclip(tmp_path / "resnet", vision_cfg=vision, seed=4)
    backbone, theirs = load(name), open_clip.create_model(name).eval()
    assert (backbone.image_blocks, backbone.text_blocks) == (5, 3)
    of_image = {name: p for name, p in theirs.named_parameters() if name.startswith("visual.")}
    assert [one.name for one in backbone.tower_parameters("image")] == list(of_image)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs.visual(images)
        for blocks in range(6):
            assert torch.equal(backbone.image_head(backbone.image_trunk(images, blocks), blocks), wanted)
    backbone.save(tmp_path / "saved", backbone.model)
    before, after = (load_file(tmp_path / one / "open_clip_model.safetensors") for one in ("resnet", "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_the_pooling_of_a_resnet_takes_lora_and_its_blocks_stay_frozen(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    name = tiny_openclip(tmp_path / "resnet", vision_cfg=vision, seed=4)
    with pytest.raises(UserError, match=r"'q' matches nothing .*; set adapter\.projections=\[pool_q,pool_v\]$"):
        build_adapter(LoraAdapterConfig(), load(name), PROMPTS)
    every = LoraAdapterConfig(projections=["pool_q", "pool_k", "pool_v", "pool_out"], rank=2, seed=1)
    with pytest.warns(Notice, match="nothing of its blocks is adapted"):
        classifier = tiny_classifier(load(name), every)
    assert classifier.image_split == 4 and len(classifier.trainable()) == 8
    images = pixels(dtype=torch.float32)
    assert export_merged(tmp_path / "merged", classifier) <= TOLERANCE
    model: Any = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}").eval()
    with torch.no_grad():
        found, wanted = model.visual(images), classifier.features(classifier.encode_frozen(images))
        plain = open_clip.create_model(name).eval().visual(images)
    assert relative(found, wanted) < 3e-6 and relative(plain, wanted) > 1e-3
    for last in range(1, 5):  # no adapter would be built if a trained weight lay in the frozen part
        adapter = build_adapter(FullConfig(blocks=LastBlocks(last=last), stem=False), load(name), PROMPTS)
        assert adapter.image_split == 4 - last


@pytest.mark.slow
def test_a_foreign_text_tower_runs_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import RobertaConfig

    monkeypatch.setattr("disam_peft.backbones.open_clip.hf_text._KINDS", {})
    folder = tmp_path / "clip"
    folder.mkdir()
    write_clip_tokenizer(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaConfig(**sizes, vocab_size=49408, max_position_embeddings=90, pad_token_id=1)
    roberta.save_pretrained(tmp_path / "roberta")
    text = {"hf_model_name": str(tmp_path / "roberta"), "hf_tokenizer_name": "clip", "hf_proj_type": "linear"}
    backbone = load_random(folder, {**tiny_openclip_config(), "text_cfg": {**text, "context_length": 12}})
    assert (backbone.image_blocks, backbone.text_blocks, backbone.context_length) == (3, 0, 12)
    tokens = backbone.tokenize(TEXTS)
    assert tokens.shape == (3, 12)
    assert backbone.text_trunk(tokens, 0) is tokens
    with torch.no_grad():
        assert torch.equal(backbone.encode_text(tokens), backbone.model.text(tokens))
    for use in (lambda: backbone.embed_tokens(tokens), lambda: backbone.encode_text_embeddings(tokens, tokens)):
        with pytest.raises(UserError, match="takes token ids only"):
            use()
    with pytest.raises(UserError, match="has 14 tokens"):
        backbone.tokenize(["a b c d e f g h i j k l"])
    backbone.save(tmp_path / "saved", backbone.model)
    again = load(f"local-dir:{tmp_path / 'saved'}")
    assert again.base_hash == backbone.base_hash
    assert torch.equal(again.tokenize(TEXTS), tokens)


COCA: dict[str, Any] = {
    "custom_text": True,
    "multimodal_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 1, "vocab_size": 49408},
    "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True},
    "text_cfg": {"embed_cls": True, "output_tokens": True, "context_length": 76},
}


def test_coca_towers_split_like_the_others(tmp_path: Path) -> None:
    config = tiny_openclip_config(**COCA)
    backbone = load_random(tmp_path / "coca", config)
    model: Any = backbone.model
    images, tokens = torch.randn(2, 3, 32, 32), backbone.tokenize(TEXTS)
    with torch.no_grad():
        image, text = model.encode_image(images, normalize=False), model.encode_text(tokens, normalize=False)
        for blocks in range(4):
            assert torch.equal(backbone.image_head(backbone.image_trunk(images, blocks), blocks), image)
            assert torch.equal(backbone.text_head(backbone.text_trunk(tokens, blocks), tokens, blocks), text)
        assert torch.equal(backbone.encode_text_embeddings(backbone.embed_tokens(tokens), tokens), text)
    backbone.save(tmp_path / "saved", backbone.model)
    with torch.no_grad():
        plain = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}").eval()
        assert (plain.encode_image(images, normalize=False) - image).abs().max() < 1e-5
        assert (plain.encode_text(tokens, normalize=False) - text).abs().max() < 1e-5


@pytest.mark.slow
def test_lora_in_both_towers_of_a_coca(tmp_path: Path) -> None:
    backbone = load_random(tmp_path / "coca", tiny_openclip_config(**COCA))
    config = LoraAdapterConfig(towers=["image", "text"], blocks=LastBlocks(last=2), rank=2, seed=1)
    classifier = tiny_classifier(backbone, config)
    assert classifier.adapter is not None and (classifier.image_split, classifier.adapter.text_split) == (1, 1)
    images, tokens = pixels(dtype=torch.float32), backbone.tokenize(TEXTS)
    model: Any = backbone.model
    trained = classifier.trainable().items()
    of_image, of_text = ([one for name, one in trained if name.startswith(tower)] for tower in ("visual.", "text."))
    assert len(of_image) == len(of_text) == 8
    assert_same(lambda: backbone.encode_image(images), lambda: model.visual(images)[0], of_image, 4e-6)
    assert_same(lambda: backbone.encode_text(tokens), lambda: model.text(tokens)[0], of_text, 4e-6)
    assert export_merged(tmp_path / "merged", classifier) <= TOLERANCE
    plain: Any = open_clip.create_model(f"local-dir:{tmp_path / 'merged'}").eval()
    assert relative(plain.visual(images)[0], backbone.encode_image(images)) < 3e-6


# -- saving --------------------------------------------------------------------------------------------------

RELOAD = """
import sys
import open_clip, torch
exchange, texts = sys.argv[1], sys.argv[2].split("|")
found = {}
for name in sys.argv[3:]:
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        logits, _ = model.get_logits(torch.load(exchange, weights_only=True), open_clip.get_tokenizer(name)(texts))
    found[name] = {"logits": logits, "layout": type(model).__name__, "transform": repr(transform),
                   "names": sorted(model.state_dict()), "context": model.context_length}
assert not any(module.startswith(("disam_peft", "peft")) for module in sys.modules)
torch.save(found, exchange)
"""

LAYOUTS: dict[str, dict[str, Any]] = {
    "CLIP": {"quick_gelu": True, "text_cfg": {"context_length": 20}},
    "CustomTextCLIP": {  # as SigLIP has it
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "pool_type": "avg"},
    },
}


@pytest.mark.slow
def test_saved_models_are_open_clips_own(tmp_path: Path) -> None:
    backbones: dict[str, ClipBackbone] = {}
    for layout, overrides in LAYOUTS.items():
        source = tmp_path / layout
        name = tiny_openclip(source, seed=2, **overrides)
        config = json.loads((source / "open_clip_config.json").read_text())
        config["preprocess_cfg"] |= {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "longest"}
        (source / "open_clip_config.json").write_text(json.dumps(config))
        backbones[layout] = load(name)
        backbones[layout].save(tmp_path / f"{layout}-saved", backbones[layout].model)
    images, exchange = torch.randn(4, 3, 32, 32), tmp_path / "exchange.pt"
    torch.save(images, exchange)
    names = {layout: f"local-dir:{tmp_path / layout}-saved" for layout in LAYOUTS}
    arguments = [sys.executable, "-c", RELOAD, str(exchange), "|".join(TEXTS), *names.values()]
    subprocess.run(arguments, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    found = torch.load(exchange, weights_only=True)

    assert len(found) == 2
    for layout, backbone in backbones.items():
        reloaded = found[names[layout]]
        expected = logits(backbone, images)
        assert expected.std() > 0.1
        assert (reloaded["logits"] - expected).abs().max() < 1e-5
        assert reloaded["layout"] == layout
        assert reloaded["context"] == backbone.context_length == (20 if layout == "CLIP" else 77)
        assert reloaded["transform"] == repr(backbone.image_transform)
        source, saved = (tmp_path / folder for folder in (layout, f"{layout}-saved"))
        weights, written = (load_file(folder / "open_clip_model.safetensors") for folder in (source, saved))
        assert reloaded["names"] == sorted(weights) == sorted(written)
        assert all(torch.equal(weights[key], written[key]) for key in weights)
        before, after = (json.loads((folder / "open_clip_config.json").read_text()) for folder in (source, saved))
        assert after["model_cfg"] == before["model_cfg"]
        again = load(names[layout])
        assert again.base_hash == backbone.base_hash
        assert again.quick_gelu is backbone.quick_gelu is (layout == "CLIP")


def test_a_followed_tag_is_saved_with_its_activation(registered: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="QuickGELU"):
        backbone = load("tiny-clip", pretrained="openai")
    backbone.save(tmp_path / "saved", backbone.model)
    again = load(f"local-dir:{tmp_path / 'saved'}")
    assert again.quick_gelu is True and again.preprocessing == backbone.preprocessing
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(again, images), logits(backbone, images))


def test_saving_with_an_adapter_attached_is_refused(openclip_name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    backbone = load(openclip_name)
    targets = [target.name for target in backbone.targets() if target.projection == "q"]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), backbone.model)
    with pytest.raises(UserError, match="merge it first"):
        backbone.save(tmp_path / "saved", backbone.model)
    assert not (tmp_path / "saved").exists()


def test_imagenet_templates_have_one_placeholder_each() -> None:
    templates = imagenet_templates()
    assert len(templates) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert templates[0] == "a bad photo of a {}."
