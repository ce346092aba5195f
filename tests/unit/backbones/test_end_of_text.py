"""Where a prompt's feature is read: a wrong id is found at load, and features that are all equal are an error."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import folder_config, load_backbone
from disam_peft.backbones.towers import end_of_text
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import PROMPTS
from tests.helpers.tiny import tiny_openclip, tiny_transformers

START, END = 49406, 49407


def with_end(folder: Path, end: Any) -> Path:
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["eos_token_id"] = end
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def features(backbone: ClipBackbone) -> torch.Tensor:
    with torch.no_grad():
        return zero_shot(backbone, ["cat", "polar bear"], ["a {}."]).class_features()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_transformers(tmp_path_factory.mktemp("clip") / "transformers", context_length=16))


@pytest.mark.slow
@pytest.mark.parametrize("end", [100, START, None, [100, START], [3], []], ids=str)
def test_row_56_an_end_that_prompts_do_not_have_is_taken_from_the_tokenizer(original: Path, end: Any) -> None:
    with_end(original, END)
    wanted = features(load_backbone(folder_config("transformers", original)))
    with pytest.warns(UserWarning, match=rf"eos_token_id .*: the tokenizer's, {END}, is taken"):
        backbone = load_backbone(folder_config("transformers", with_end(original, end)))
    assert torch.equal(features(backbone), wanted)
    tokens = backbone.tokenize(["a cat", "a polar bear"])
    with torch.no_grad():  # the library's own forward reads it there, too
        own = backbone.model.get_submodule("text_model")(input_ids=tokens).pooler_output
    projected = backbone.model.get_submodule("text_projection")(own)
    assert (projected - backbone.encode_text(tokens)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("end", [END, [END], [100, END], 2], ids=str)
def test_row_56_an_end_that_prompts_have_is_kept(original: Path, end: Any, tmp_path: Path) -> None:
    with_end(original, END)
    wanted = features(load_backbone(folder_config("transformers", original)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone(folder_config("transformers", with_end(original, end)))
    assert torch.equal(features(backbone), wanted)
    backbone.save(tmp_path, backbone.model)
    saved = json.loads((tmp_path / "config.json").read_text())["text_config"].get("eos_token_id", END)
    assert saved == (2 if end == 2 else END)


@pytest.mark.slow
def test_row_56_open_clip_looks_for_an_end_as_well(tmp_path: Path) -> None:
    text = {"context_length": 16, "pool_type": "eos", "eos_id": END}
    right = load_backbone(folder_config("open_clip", Path(tiny_openclip(tmp_path / "a", text_cfg=text)[10:])))
    tiny_openclip(tmp_path / "b", text_cfg={**text, "eos_id": 2})
    with pytest.warns(UserWarning, match=rf"eos_token_id 2, .*: the tokenizer's, {END}, is taken"):
        mended = load_backbone(folder_config("open_clip", tmp_path / "b"))
    assert torch.equal(features(mended), features(right)) and mended.identity == right.identity
    mended.save(tmp_path / "saved", mended.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_backbone(folder_config("open_clip", tmp_path / "saved"))
    assert again.identity == right.identity


def test_row_56_an_end_that_nobody_knows_is_an_error() -> None:
    assert end_of_text("x", [7, 9], [1, 5, 9], None) == 9
    for configured, prompt, own in ((4, [1, 5, 9], None), (4, [1, 5, 9], 8), (1, [1, 5, 9], 5), (None, [9, 5, 9], 9)):
        with pytest.raises(UserError, match=f"eos_token_id {configured}, .*tokenizer's end of text, {own} "):
            end_of_text("x", configured, prompt, own)


def test_row_56_prompts_that_are_read_before_the_words(tmp_path: Path) -> None:
    """The first token of a causal tower sees no other: for training as for zero-shot this ends before any image."""
    tiny_openclip(tmp_path, text_cfg={"context_length": 16, "pool_type": "first"})
    backbone = load_backbone(folder_config("open_clip", tmp_path))
    expected = rf"reads the same tokens for every one of the 3 classes \(\[{START}\]\).*read at: first"
    with pytest.raises(UserError, match=expected):
        ClipClassifier(backbone, None, PROMPTS)
    adapter = build_adapter(LoraAdapterConfig(towers=["text"]), backbone, PROMPTS)
    with pytest.raises(UserError, match=expected):
        ClipClassifier(backbone, adapter, PROMPTS)
    zero_shot(backbone, ["cat"], ["a {}."])  # one class alone cannot differ


def test_row_56_class_features_that_are_all_equal(tmp_path: Path) -> None:
    tiny_openclip(tmp_path, text_cfg={"context_length": 16})
    file = tmp_path / "open_clip_model.safetensors"
    state = load_file(file)
    state["token_embedding.weight"].zero_()
    save_file(state, file)
    model = zero_shot(load_backbone(folder_config("open_clip", tmp_path)), ["cat", "dog"], ["a {}."])
    with pytest.raises(UserError, match="text features of all 2 classes are equal, although their prompts differ"):
        model.class_features()
