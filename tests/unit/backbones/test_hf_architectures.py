"""The transformers classes beside ``CLIPModel``: each gives the library's own numbers, whole, in parts and adapted."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import folder_config, load_backbone
from disam_peft.backbones.transformers.architectures import ARCHITECTURES
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError
from disam_peft.export.merged import export_merged
from disam_peft.export.peft import export_peft
from tests.helpers.tiny_hf import (
    IMAGE_BLOCKS,
    IMAGE_WIDTH,
    POSITIONS,
    TEXT_BLOCKS,
    TYPES,
    images_of,
    mask_of,
    own_image,
    own_text,
    tiny_hf,
)
from tests.helpers.towers import assert_same, relative

NAMES, TEMPLATE = ("cat", "polar bear", "fire truck"), "a photo of a {}."
TEXTS = [TEMPLATE.format(name) for name in NAMES]
BOTH = LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1)
CLASS_TOKEN = ("metaclip_2", "altclip", "chinese_clip")
every_type = pytest.mark.parametrize("kind", TYPES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: tiny_hf(kind, tmp_path_factory.mktemp("hf") / kind) for kind in TYPES}


@cache
def loaded(folder: str) -> ClipBackbone:
    return load_backbone(folder_config("transformers", Path(folder)))


def backbone_of(folder: str, dtype: torch.dtype = torch.float32) -> ClipBackbone:
    """One of one's own, so that adapters may be attached."""
    backbone = copy.copy(loaded(folder))
    backbone.model = copy.deepcopy(backbone.model)
    backbone._base = dict(backbone.model.named_parameters())
    return backbone.to(dtype=dtype)


def adapted(backbone: ClipBackbone, config: Any) -> ClipClassifier:
    """With noise on every trained parameter."""
    prompts = ClassPrompts(NAMES, (TEMPLATE,))
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in classifier.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return classifier


def changed(folder: str, target: Path, **text: Any) -> Path:
    """A copy whose config says something else about texts."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"].update(text)
    (target / "config.json").write_text(json.dumps(config))
    return target


def library_logits(model: Any, folder: str, images: Tensor) -> Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=POSITIONS, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(pixel_values=images, input_ids=tokens, **mask_of(model, tokens)).logits_per_image


def test_every_architecture_is_here() -> None:
    assert {"clip", *TYPES} == set(ARCHITECTURES)


# -- the whole model -----------------------------------------------------------------------------------------


@every_type
def test_logits_are_those_of_the_library(folders: dict[str, str], kind: str) -> None:
    backbone, theirs = loaded(folders[kind]), AutoModel.from_pretrained(folders[kind]).eval()
    assert type(theirs).__name__ == TYPES[kind].model == type(backbone.model).__name__
    images = images_of(3)
    wanted = library_logits(theirs, folders[kind], images)
    with torch.no_grad():
        found = zero_shot(backbone, NAMES, [TEMPLATE])(images)
        assert wanted.std() > 0.2
        assert (found - wanted).abs().max() < 5e-6
        assert relative(backbone.encode_image(images), own_image(backbone, images)) < 2e-6
    assert (backbone.logit_bias is not None) == hasattr(theirs, "logit_bias")
    assert not backbone.model.training


@every_type
def test_what_a_checkpoint_says_about_itself(folders: dict[str, str], kind: str) -> None:
    backbone = loaded(folders[kind])
    model: Any = backbone.model
    assert (backbone.image_blocks, backbone.text_blocks) == (IMAGE_BLOCKS, TEXT_BLOCKS)
    assert backbone.embed_dim == backbone.encode_image(images_of(1)).shape[1]
    assert backbone.embed_tokens(backbone.tokenize(TEXTS)).shape == (3, backbone.context_length, backbone.token_width)
    assert {model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation} == {"sdpa"}
    of_siglip = ("squash", (0.5, 0.5, 0.5), "bilinear")
    found = (backbone.preprocessing.resize, backbone.preprocessing.mean, backbone.preprocessing.interpolation)
    assert (found == of_siglip) == (kind == "siglip")


# -- in parts ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_type
def test_any_split_is_bit_identical_with_its_gradients(folders: dict[str, str], kind: str) -> None:
    backbone = backbone_of(folders[kind])
    classifier = adapted(backbone, BOTH.model_copy(update={"blocks": LastBlocks(last=1)}))
    trained = list(classifier.trainable().values())
    images, tokens = images_of(3), backbone.tokenize(TEXTS)

    def gradients(image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((image @ text.T).square().sum(), trained)

    image, text = backbone.encode_image(images), backbone.encode_text(tokens)
    wanted = gradients(image, text)
    assert len(wanted) == 8 and all(gradient.abs().max() > 0 for gradient in wanted)
    for blocks in range(IMAGE_BLOCKS + 1):
        with torch.no_grad():
            trunk = backbone.image_trunk(images, blocks)
        pooled = blocks == IMAGE_BLOCKS and kind in CLASS_TOKEN
        assert trunk.shape[1:] == (1 if pooled else 16 + (kind in CLASS_TOKEN), IMAGE_WIDTH)
        head = backbone.image_head(trunk, blocks)
        assert torch.equal(head, image)
        if blocks < IMAGE_BLOCKS:
            text_blocks = min(blocks, TEXT_BLOCKS - 1)
            with torch.no_grad():
                hidden = backbone.text_trunk(tokens, text_blocks)
            again = backbone.text_head(hidden, tokens, text_blocks)
            assert torch.equal(again, text)
            assert all(torch.equal(a, b) for a, b in zip(gradients(head, again), wanted, strict=True))
    with torch.no_grad():
        hidden = backbone.text_trunk(tokens, TEXT_BLOCKS)
        assert hidden.shape[1] == 1
        assert torch.equal(backbone.text_head(hidden, tokens, TEXT_BLOCKS), text)


@pytest.mark.slow
@every_type
@pytest.mark.parametrize("projections", [["q", "v"], ["k", "out", "fc1"]], ids=str)
def test_what_is_left_out_changes_nothing(folders: dict[str, str], kind: str, projections: list[str]) -> None:
    """The last block for one position alone, and text that is cut: value and gradient of the library's forward."""
    backbone = backbone_of(folders[kind], torch.float64)
    classifier = adapted(backbone, BOTH.model_copy(update={"projections": projections})).double()
    trained: list[Tensor] = list(classifier.trainable().values())
    images, tokens = images_of(3, torch.float64), backbone.tokenize(TEXTS)

    def ours() -> Tensor:
        return backbone.encode_image(images) @ backbone.encode_text(tokens).T

    def theirs() -> Tensor:
        return own_image(backbone, images) @ own_text(backbone, tokens).T

    assert_same(ours, theirs, trained, 1e-11)


def test_siglip_prompts_are_whole_and_never_masked(folders: dict[str, str]) -> None:
    """What is allowed for other towers would be wrong here: padding is a part of the prompt."""
    backbone = loaded(folders["siglip"])
    tokens = backbone.tokenize(TEXTS)
    longest = int((tokens != 0).sum(dim=1).max())
    assert backbone.cut_prompts(tokens) is tokens and tokens.shape[1] == POSITIONS > longest + 5
    assert backbone.pack_prompts(tokens, 2) is None
    with torch.no_grad():
        wanted = own_text(backbone, tokens)
        assert relative(backbone.encode_text(tokens), wanted) < 2e-6
        assert relative(own_text(backbone, tokens[:, :longest]), wanted) > 0.1
        assert relative(own_text(backbone, tokens, attention_mask=(tokens != 0).long()), wanted) > 0.1


def test_metaclip_prompts_are_cut_and_share_their_beginning(folders: dict[str, str]) -> None:
    backbone = loaded(folders["metaclip_2"])
    tokens = backbone.tokenize(TEXTS)
    ends = (tokens == 2).int().argmax(dim=1)
    assert not torch.equal(ends, tokens.argmax(dim=1)), "an end-of-text id of 2 does not mean the highest id here"
    assert torch.equal(backbone.cut_prompts(tokens), tokens[:, : int(ends.max()) + 1])
    packed = backbone.pack_prompts(tokens, 4)
    assert packed is not None and torch.equal(tokens[:, :4], tokens[:1, :4].expand(3, 4))
    embeddings = backbone.embed_tokens(tokens)
    with torch.no_grad():
        found = backbone.encode_packed_prompts(embeddings[0, :4], packed.pack(embeddings[:, 4:]), packed)
        assert relative(found, own_text(backbone, tokens)) < 2e-6


@pytest.mark.parametrize("kind", ["altclip", "chinese_clip"])
def test_padding_is_masked_and_may_be_cut(folders: dict[str, str], kind: str) -> None:
    """The library masks nothing by itself: a forward without the mask, which looks like any other, would be wrong."""
    backbone = loaded(folders[kind])
    model: Any = backbone.model
    tokens, pad = backbone.tokenize(TEXTS), model.config.text_config.pad_token_id
    assert tokens.shape[1] == backbone.context_length == POSITIONS - 2 * (kind == "altclip")
    longest = int((tokens != pad).sum(dim=1).max())
    assert torch.equal(backbone.cut_prompts(tokens), tokens[:, :longest]) and longest < POSITIONS - 8
    assert backbone.pack_prompts(tokens, 2) is None, "every token sees those behind it"
    with torch.no_grad():
        wanted = own_text(backbone, tokens)
        assert relative(backbone.encode_text(tokens), wanted) < 2e-6
        assert relative(own_text(backbone, tokens, attention_mask=torch.ones_like(tokens)), wanted) > 0.01
        hidden = backbone.text_trunk(tokens, 1)
        assert hidden.shape[1] == longest
        padded = nn.functional.pad(hidden, (0, 0, 0, 5))  # as among other prompts, of which one is longer
        assert relative(backbone.text_head(padded, tokens, 1), wanted) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["altclip", "chinese_clip"])
def test_weights_of_the_text_without_effect_are_not_trained(folders: dict[str, str], kind: str) -> None:
    """The bias of the keys, and the table of tokens unless it is asked for, have other names than in CLIPModel."""
    backbone = backbone_of(folders[kind])
    whole = FullConfig(towers=["text"])
    trained = set(adapted(backbone_of(folders[kind]), whole).trainable())
    names = {one.name for one in backbone.tower_parameters("text")}
    left = {name for name in names if name.endswith(("self.key.bias", "word_embeddings.weight"))}
    assert len(left) == TEXT_BLOCKS + 1 and trained == names - left
    table = adapted(backbone, whole.model_copy(update={"token_embedding": True}))
    assert set(table.trainable()) - trained == {name for name in left if "word" in name}


# -- adapters ------------------------------------------------------------------------------------------------


@every_type
def test_targets_are_complete_in_order_and_named_apart(folders: dict[str, str], kind: str) -> None:
    backbone = backbone_of(folders[kind])
    targets, modules = backbone.targets(), dict(backbone.model.named_modules())
    names = [target.name for target in targets]
    for tower, count in (("image", IMAGE_BLOCKS), ("text", TEXT_BLOCKS)):
        roles = [[t.projection for t in targets if (t.tower, t.block) == (tower, block)] for block in range(count)]
        assert all(sorted(one) == sorted(["norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"]) for one in roles)
    outside = {target.projection for target in targets if target.block is None}
    assert not outside & {"norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"}
    assert len(set(names)) == len(names)
    fused = {name for name in modules if name.endswith("head.attention.out_proj")}  # its parent reads the weights
    wanted = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.LayerNorm)} - fused
    assert set(names) == wanted
    called: list[str] = []
    for name in names:
        modules[name].register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        backbone.encode_image(images_of(1))
        backbone.encode_text(backbone.tokenize(TEXTS))
    assert called == names


@pytest.mark.slow
@every_type
def test_lora_of_the_last_blocks_freezes_the_others(folders: dict[str, str], kind: str) -> None:
    adapter = adapted(backbone_of(folders[kind]), BOTH.model_copy(update={"blocks": LastBlocks(last=1)})).adapter
    assert adapter is not None
    assert (adapter.image_split, adapter.text_split) == (IMAGE_BLOCKS - 1, TEXT_BLOCKS - 1)
    assert len(adapter.trainable()) == 2 * 2 * 2  # q and v of a block in each tower, two matrices each


@pytest.mark.slow
@every_type
def test_weights_of_a_tower_are_known_by_their_place(folders: dict[str, str], kind: str) -> None:
    backbone = loaded(folders[kind])
    model: Any = backbone.model
    found = {tower: backbone.tower_parameters(tower) for tower in ("image", "text")}
    everything = {name for name, _ in model.named_parameters() if not name.startswith("logit_")}
    assert {one.name for parameters in found.values() for one in parameters} == everything
    stems = {one.name for one in (*found["image"], *found["text"]) if one.part == "stem"}
    assert stems == {name for name in everything if ".embeddings." in name or "pre_layrnorm" in name}
    whole = adapted(backbone_of(folders[kind]), FullConfig(towers=["text"], blocks=LastBlocks(last=1), projection=True))
    assert whole.adapter is not None and whole.adapter.text_split == TEXT_BLOCKS - 1
    assert any(one.part == "projection" for one in found["text"])


@every_type
def test_text_from_embeddings(folders: dict[str, str], kind: str) -> None:
    backbone = loaded(folders[kind])
    tokens = backbone.tokenize(TEXTS)
    embeddings = backbone.embed_tokens(tokens)
    assert torch.equal(backbone.encode_text_embeddings(embeddings, tokens), backbone.encode_text(tokens))
    moved = embeddings.clone()
    moved[:, 2] *= -1
    with torch.no_grad():
        found = backbone.encode_text_embeddings(moved, tokens)
        assert relative(found, own_text(backbone, tokens, moved)) < 2e-6
        assert relative(found, own_text(backbone, tokens)) > 1e-4


@pytest.mark.slow
@every_type
@pytest.mark.parametrize("config", [BOTH, CoOpConfig(context_tokens=4, seed=1)], ids=["lora", "coop"])
def test_gradients_are_derivatives(folders: dict[str, str], kind: str, config: Any) -> None:
    backbone = backbone_of(folders[kind], torch.float64)
    classifier = adapted(backbone, config).double()
    images, labels = images_of(4, torch.float64), torch.tensor([0, 1, 2, 1])

    def loss() -> Tensor:
        return nn.functional.cross_entropy(classifier(images), labels)

    trained = list(classifier.trainable().values())
    gradients = torch.autograd.grad(loss(), trained)
    total = sum(gradient.square().sum() for gradient in gradients) ** 0.5
    assert total > 1e-6
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            steps = [
                gradient / total + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.numel() ** 0.5
                for p, gradient in zip(trained, gradients, strict=True)
            ]
            values = []
            for sign in (1, -2, 1):
                for p, step in zip(trained, steps, strict=True):
                    p += sign * 1e-5 * step
                values.append(loss())
        found = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
        difference = (values[0] - values[1]) / 2e-5
        assert abs(difference - found) < 1e-5 * abs(found)


# -- export --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_type
def test_a_merged_model_is_one_of_the_library(folders: dict[str, str], kind: str, tmp_path: Path) -> None:
    classifier = adapted(backbone_of(folders[kind]), BOTH)
    assert export_merged(tmp_path / "merged", classifier) < 1e-5
    theirs = AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert type(theirs).__name__ == TYPES[kind].model
    images = images_of(3)
    with torch.no_grad():
        wanted = classifier(images)
        assert (wanted - zero_shot(loaded(folders[kind]), NAMES, [TEMPLATE])(images)).abs().max() > 1e-2
    assert (library_logits(theirs, str(tmp_path / "merged"), images) - wanted).abs().max() < 1e-5


@pytest.mark.slow
@every_type
def test_a_peft_folder_loads_on_the_plain_model(folders: dict[str, str], kind: str, tmp_path: Path) -> None:
    classifier = adapted(backbone_of(folders[kind]), BOTH)
    export_peft(tmp_path / "adapter", classifier)
    plain: Any = AutoModel.from_pretrained(folders[kind])
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    images = images_of(3)
    with torch.no_grad():
        wanted = classifier(images)
    assert (library_logits(model.base_model.model, folders[kind], images) - wanted).abs().max() < 1e-5


# -- identity and mistakes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_identity_follows_bias_scale_and_padding(folders: dict[str, str], tmp_path: Path) -> None:
    whole = loaded(folders["siglip"])
    for number, change in enumerate(("logit_bias", "logit_scale", "padding_side")):
        folder = changed(folders["siglip"], tmp_path / str(number))
        if change == "padding_side":
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
        else:
            state = load_file(folder / "model.safetensors")
            state[change] += 0.5
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            other = loaded(str(folder))
        assert any("pads in front of a text" in str(one.message) for one in told) == (change == "padding_side")
        assert other.identity != whole.identity
        if change == "padding_side":
            assert other.base_hash == whole.base_hash
            tokens = other.tokenize(TEXTS)
            assert (tokens[:, 0] == 0).all() and (tokens[:, -1] == 1).all()
            with pytest.raises(UserError, match="puts padding in front of a text"):
                adapted(other, CoOpConfig(context_tokens=4, seed=1))


@pytest.mark.slow
def test_a_wrong_end_of_text_is_mended(folders: dict[str, str], tmp_path: Path) -> None:
    folder = changed(folders["metaclip_2"], tmp_path / "wrong", eos_token_id=299)
    with pytest.warns(UserWarning, match="eos_token_id 299, .*: the tokenizer's, 2, is taken"):
        assert loaded(str(folder)).identity == loaded(folders["metaclip_2"]).identity


@pytest.mark.slow
def test_a_tokenizer_unlike_that_of_the_training_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    """Gemma's own settings, as they are where a folder of SigLIP 2 does not say others."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(folder_config("transformers", Path(folders["siglip"]))).tokenize(["A Cat"])
    folder = changed(folders["siglip"], tmp_path / "gemma")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer |= {"normalizer": None, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="puts no end of text behind a text, but models of this"):
        backbone = load_backbone(folder_config("transformers", folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.tokenize(["a cat", "a dog"])
    with pytest.warns(UserWarning, match=r"keeps capital letters, .* \(one is 'a Dog'\)"):
        backbone.tokenize(["a cat", "a Dog", "A HOUSE"])


@pytest.mark.slow
def test_ids_that_nothing_reads_are_not_told(folders: dict[str, str]) -> None:
    """SigLIP's default config has ids beyond its own vocabulary, of which the library warns once in a process."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger, once = logging.getLogger("transformers.configuration_utils"), logging.Logger.warning_once  # type: ignore[attr-defined]
    logger.addHandler(handler)
    try:
        once.cache_clear()
        load_backbone(folder_config("transformers", Path(folders["siglip"])))
        assert told == []
        once.cache_clear()
        AutoTokenizer.from_pretrained(folders["siglip"])
        assert any("eos_token_id must be `None` or an integer" in one for one in told)
    finally:
        logger.removeHandler(handler)


def test_naflex_is_refused_with_the_way_out(folders: dict[str, str], tmp_path: Path) -> None:
    folder = changed(folders["siglip"], tmp_path / "naflex")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip2"}))
    with pytest.raises(UserError, match=r"a Siglip2Model \(NaFlex\).*use a SigLIP 2 of one image size"):
        load_backbone(folder_config("transformers", folder))


@pytest.mark.slow
def test_a_tower_without_pooling_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    folder = changed(folders["siglip"], tmp_path / "bare")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no head, so it gives no feature of an image"):
        load_backbone(folder_config("transformers", folder))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed, so nothing is missing")
def test_a_tokenizer_that_needs_sentencepiece_says_so(folders: dict[str, str], tmp_path: Path) -> None:
    folder = changed(folders["siglip"], tmp_path / "pieces")
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    with pytest.raises(UserError, match="needs the package sentencepiece: `pip install sentencepiece protobuf`"):
        load_backbone(folder_config("transformers", folder))


@pytest.mark.slow
def test_a_tokenizer_without_padding_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    folder = changed(folders["siglip"], tmp_path / "unpadded")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="has no token for padding"):
        load_backbone(folder_config("transformers", folder))
