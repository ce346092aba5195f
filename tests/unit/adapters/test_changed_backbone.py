"""An adapter is refused on a backbone that has the recorded weights and computes something else with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disam_peft.adapters.manifest import read_manifest
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import folder_config, load_backbone
from disam_peft.backbones.fingerprint import activation_name
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.errors import Notice, UserError
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_openclip, tiny_transformers

Change = Callable[[Path], None]
OLD = ROOT / "tests/reference/runs_of_0.1/runs/old/painting/adapter"
PROMPTS = ClassPrompts(("cat", "dog"), ("a {}.",))


def in_json(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def open_clip(change: Callable[[dict[str, Any]], object]) -> Change:
    return in_json("open_clip_config.json", change)


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    return in_json("config.json", change)


def processor(**values: Any) -> Change:
    return in_json("preprocessor_config.json", lambda content: content.update(values))


def swapped_words(folder: Path) -> None:
    """Two words of the vocabulary that no probe holds change places."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["zebra</w>"], vocabulary["galaxy</w>"] = vocabulary["galaxy</w>"], vocabulary["zebra</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


OPEN_CLIP: dict[str, tuple[Change, str]] = {
    "activation": (open_clip(lambda c: c["model_cfg"].update(quick_gelu=True)), 'image tower: .*"gelu".*"quick_gelu"'),
    "heads": (open_clip(lambda c: c["model_cfg"]["vision_cfg"].update(head_width=8)), r"heads of the image.*2.*4"),
    "heads of the text": (open_clip(lambda c: c["model_cfg"]["text_cfg"].update(heads=4)), "heads of the text tower"),
    "epsilon": (
        open_clip(lambda c: c["model_cfg"]["vision_cfg"].update(norm_kwargs={"eps": 1e-3})),
        r"norm epsilon of the image tower: \[1e-05\] there, \[0\.001\] here",
    ),
    "mean": (open_clip(lambda c: c["preprocess_cfg"].update(mean=[0.1] * 3)), r"preprocessing, mean: .*\[0\.1, "),
    "resize": (
        open_clip(lambda c: c["preprocess_cfg"].update(resize_mode="squash")),
        '"shortest" there, "squash" here',
    ),
    "interpolation": (open_clip(lambda c: c["preprocess_cfg"].update(interpolation="bilinear")), '"bilinear" here'),
    "pooling": (open_clip(lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg")), 'pooling .*"avg"'),
    "pooling of the text": (open_clip(lambda c: c["model_cfg"]["text_cfg"].update(pool_type="last")), "end of text"),
    "causal": (open_clip(lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=True)), "causal text: true"),
}
TRANSFORMERS: dict[str, tuple[Change, str]] = {
    "activation": (config(lambda c: c["vision_config"].update(hidden_act="quick_gelu")), 'image tower: .*"quick_gelu"'),
    "form of GELU": (config(lambda c: c["text_config"].update(hidden_act="gelu_pytorch_tanh")), '"gelu_tanh"'),
    "heads": (config(lambda c: c["vision_config"].update(num_attention_heads=4)), "heads of the image tower"),
    "epsilon": (config(lambda c: c["text_config"].update(layer_norm_eps=1e-3)), "norm epsilon of the text tower"),
    "mean": (processor(image_mean=[0.5] * 3), "preprocessing, mean"),
    "size": (processor(size={"shortest_edge": 40}), r"preprocessing, resized: null there, \[40, 40\] here"),
    "not normalised": (processor(do_normalize=False), "preprocessing, std"),
    "not rescaled": (processor(do_rescale=False), "preprocessing, scale"),
    "filter": (processor(resample=2), '"bilinear" here'),
    "vocabulary": (swapped_words, "vocabulary: sha256"),
}


def load(folder: Path) -> ClipBackbone:
    family: Any = folder.name
    return load_backbone(folder_config(family, folder))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone of each family, and in ``adapters`` an adapter that was trained on each."""
    root = tmp_path_factory.mktemp("originals")
    tiny_openclip(root / "open_clip", text_cfg={"context_length": 16})
    tiny_transformers(root / "transformers", context_length=16)
    for family in ("open_clip", "transformers"):
        saved(root / "adapters" / family, load(root / family))
    return root


def saved(folder: Path, backbone: ClipBackbone) -> Path:
    folder.parent.mkdir(exist_ok=True)
    classifier = ClipClassifier(backbone, build_adapter(LinearProbeConfig(), backbone, PROMPTS), PROMPTS)
    save_adapter(folder, classifier, trained_with={})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        pytest.param(family, change, message, id=f"{family}: {name}")
        for family, changes in (("open_clip", OPEN_CLIP), ("transformers", TRANSFORMERS))
        for name, (change, message) in changes.items()
    ],
)
def test_row_53_what_no_weight_says(originals: Path, tmp_path: Path, family: str, change: Change, message: str) -> None:
    shutil.copytree(originals / family, tmp_path / family)
    change(tmp_path / family)
    with pytest.raises(UserError, match=f"has its weights but computes something else(.|\n)*{message}"):
        load_adapter(originals / "adapters" / family, load(tmp_path / family))


@pytest.mark.slow
def test_row_53_statistics_of_batch_norms(tmp_path: Path) -> None:
    folder = tmp_path / "open_clip"
    tiny_openclip(folder, vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, embed_dim=16)
    adapter = saved(tmp_path / "adapter", load(folder))
    load_adapter(adapter)
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state["visual.bn1.running_mean"] += 1e-3
    save_file(state, file)
    with pytest.raises(UserError, match=r"has its weights but(.|\n)*buffers: sha256 .* there, sha256 .* here"):
        load_adapter(adapter)


@pytest.mark.slow
def test_row_53_weights_are_said_with_what_else_differs(originals: Path, tmp_path: Path) -> None:
    folder = tmp_path / "open_clip"
    shutil.copytree(originals / "open_clip", folder)
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    state["logit_scale"] += 0.5
    save_file(state, file)
    with pytest.raises(UserError, match=r"with weights (.|\n)*It also differs in:\n  logit scale: 14\.286 there, 23\."):
        load_adapter(originals / "adapters" / "open_clip", load(folder))


def test_row_53_a_part_that_the_record_lacks_is_noted(originals: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(originals / "adapters" / "transformers", adapter)

    def forget(content: dict[str, Any]) -> None:
        del content["backbone"]["fingerprint"]["vocabulary"]
        content["backbone"]["fingerprint"]["what a later version knows"] = 3

    in_json("disam_peft.json", forget)(adapter)
    with pytest.warns(Notice, match="could not be compared: vocabulary$"):
        load_adapter(adapter)


def test_row_53_adapters_of_0_1_are_loaded_with_a_note() -> None:
    assert read_manifest(OLD).backbone.fingerprint is None  # as 0.1.0 wrote it
    with pytest.warns(
        Notice, match=r"by version 0\.1\.0, .* could not be compared: activation of the image tower, heads"
    ):
        load_adapter(OLD)


def test_row_53_what_0_1_recorded_is_compared(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(OLD, adapter)
    in_json("disam_peft.json", lambda content: content["backbone"].update(quick_gelu=True))(adapter)
    with pytest.raises(UserError, match="QuickGELU: true there, false here"):
        load_adapter(adapter)
    in_json("disam_peft.json", lambda content: content["backbone"].update(sha256="0" * 64))(adapter)
    with pytest.raises(UserError, match="with weights 0000"):
        load_adapter(adapter)


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_the_fingerprint_does_not_depend_on_place_device_state_or_time(
    originals: Path, tmp_path: Path, family: str
) -> None:
    shutil.copytree(originals / family, tmp_path / family)
    first, second = load(originals / family), load(tmp_path / family)
    assert first.fingerprint == second.fingerprint and first.identity == second.identity
    assert json.loads(json.dumps(first.fingerprint)) == first.fingerprint  # JSON types only
    before = first.identity
    build_adapter(LinearProbeConfig(), first, PROMPTS)
    assert first.to(dtype=torch.bfloat16).identity == before


def test_activations_are_named_by_what_they_compute() -> None:
    named = {
        name: activation_name(function)
        for name, function in {
            "gelu": torch.nn.GELU(),
            "gelu_tanh": torch.nn.GELU(approximate="tanh"),
            "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
            "silu": torch.nn.SiLU(),
            "relu": torch.nn.ReLU(inplace=True),
        }.items()
    }
    assert all(name == found for name, found in named.items())
    assert activation_name(torch.nn.Hardswish()).startswith("-0.0000 -0.3333")
