"""Merged checkpoints, as their families' own libraries see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import zero_shot
from disam_peft.errors import UserError
from disam_peft.export.merged import TOLERANCE, export_merged
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, pixels, tiny_backbone, tiny_classifier

ONE_TEMPLATE = ClassPrompts(PROMPTS.class_names, ("a photo of a {}.",))
SENTENCES = [f"a photo of a {name}." for name in PROMPTS.class_names]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain_open_clip(folder: Path, images: Tensor) -> Tensor:
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(SENTENCES)
    image = nn.functional.normalize(model.encode_image(images), dim=-1)
    text = nn.functional.normalize(model.encode_text(tokens), dim=-1)
    return model.logit_scale.exp() * image @ text.T


def plain_transformers(folder: Path, images: Tensor) -> Tensor:
    from transformers import AutoTokenizer, CLIPModel

    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    return CLIPModel.from_pretrained(folder).eval()(pixel_values=images, **tokens).logits_per_image


PLAIN = {"open_clip": plain_open_clip, "transformers": plain_transformers}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", ["lora-both", "dora", "ln_tuning", "full-both", "lora-scale"])
@torch.no_grad()
def test_the_familys_own_loader_takes_it_with_equal_logits(
    twins: tuple[str, str], family: str, cell: str, tmp_path: Path
) -> None:
    backbone = tiny_backbone(twins, family, torch.float32)
    images = pixels(dtype=torch.float32)
    before = zero_shot(backbone, ONE_TEMPLATE.class_names, ONE_TEMPLATE.templates)(images)
    classifier = tiny_classifier(backbone, cell, prompts=ONE_TEMPLATE)
    wanted = classifier(images)
    assert export_merged(tmp_path / "merged", classifier) <= TOLERANCE
    found = PLAIN[family](tmp_path / "merged", images)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (before - wanted).abs().max() > 1e-3
    assert torch.equal(classifier(images), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_row_43_exporting_twice_gives_the_same_files(twins: tuple[str, str], family: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(twins, family, torch.float32)
    classifier = tiny_classifier(backbone, "lora-image").train()
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    export_merged(tmp_path / "first", classifier)
    export_merged(tmp_path / "second", classifier)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") != {}
    assert classifier.training and classifier.adapter is not None and classifier.adapter.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.model.state_dict().items())
    assert classifier.training
    with pytest.raises(UserError, match="already exists and is not empty"):
        export_merged(tmp_path / "first", classifier)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["weights", "nan", "unmerged"])
def test_row_44_a_checkpoint_that_disagrees_is_not_published(
    twins: tuple[str, str], family: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(twins, family, torch.float32)
    classifier = tiny_classifier(backbone, "lora-image")
    original, unmerged = type(backbone).save, tiny_backbone(twins, family, torch.float32).model

    def faulty(self: ClipBackbone, directory: Path, model: nn.Module) -> None:
        original(self, directory, unmerged if fault == "unmerged" else model)
        (path,) = directory.glob("*.safetensors")
        state = load_file(path)
        name = next(name for name in state if name.endswith(("fc1.weight", "c_fc.weight")))
        if fault == "weights":
            state[name][0, 0] += 0.1
        if fault == "nan":
            state[name][0, 0] = float("nan")
        save_file(state, path, metadata={"format": "pt"})

    monkeypatch.setattr(type(backbone), "save", faulty)
    with pytest.raises(UserError, match=r"logits differ by (nan|\d\.\d\de.\d+) of the largest.*nothing was published"):
        export_merged(tmp_path / "merged", classifier)
    assert list(tmp_path.iterdir()) == []


def test_row_44_another_image_transform_is_a_disagreement(
    twins: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    original = type(backbone).save

    def faulty(self: ClipBackbone, directory: Path, model: nn.Module) -> None:
        original(self, directory, model)
        path = directory / "open_clip_config.json"
        config = json.loads(path.read_text())
        config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
        path.write_text(json.dumps(config))

    monkeypatch.setattr(type(backbone), "save", faulty)
    with pytest.raises(UserError, match=r"in more than its weights.*preprocessing"):
        export_merged(tmp_path / "merged", tiny_classifier(backbone, "lora-image"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cell", ["coop-shared", "probe-zero_shot"])
def test_what_cannot_be_merged_leaves_nothing_behind(twins: tuple[str, str], cell: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    with pytest.raises(UserError, match="--to peft"):
        export_merged(tmp_path / "merged", tiny_classifier(backbone, cell))
    with pytest.raises(UserError, match="nothing to merge"):
        export_merged(tmp_path / "merged", zero_shot(backbone, ["cat"], ["a {}."]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_row_43_a_half_precision_backbone_exports_in_its_precision(
    twins: tuple[str, str], family: str, tmp_path: Path
) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family, torch.bfloat16), "lora-both")
    assert 0 < export_merged(tmp_path / "merged", classifier) < 0.06
    (path,) = (tmp_path / "merged").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.bfloat16}
