"""Every adapter on two classes of transformers that differ from CLIPModel in all that matters: SigLIP pools all tokens
of an image and sees the padding of a text; AltCLIP reads texts with a BERT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import folder_config, load_backbone
from disam_peft.classification.classifier import ClipClassifier
from tests.helpers.adapter_cells import CELLS, LABELS, MERGED_CELLS, PROMPTS, pixels, tiny_classifier
from tests.helpers.tiny_hf import tiny_hf
from tests.matrix.test_adapter_contract import hold_dora_norms, largest_gradient_error

KINDS = ("siglip", "altclip")
# A number that is added to all logits cancels in the softmax, of which gradients are asked here.
PAIRS = [(kind, cell) for kind in KINDS for cell in CELLS if kind != "siglip" or not cell.endswith("-scale")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipBackbone]:
    folders = {kind: Path(tiny_hf(kind, tmp_path_factory.mktemp(kind))) for kind in KINDS}
    return {kind: load_backbone(folder_config("transformers", folder)) for kind, folder in folders.items()}


def own(shared: ClipBackbone) -> ClipBackbone:
    backbone = copy.copy(shared)
    backbone.model = copy.deepcopy(shared.model)
    backbone._base = dict(backbone.model.named_parameters())
    return backbone.to(dtype=torch.float64)


@pytest.mark.parametrize(("kind", "cell"), PAIRS)
def test_split_gradient_and_merge(
    loaded: dict[str, ClipBackbone], kind: str, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = tiny_classifier(own(loaded[kind]), cell)
    adapter, images = classifier.adapter, pixels()
    assert adapter is not None
    whole = classifier(images)
    assert torch.equal(classifier.logits(classifier.encode_frozen(images)), whole)
    if cell in MERGED_CELLS:
        merged = own(loaded[kind])
        merged.model = adapter.merged(classifier.backbone)
        assert (ClipClassifier(merged, None, PROMPTS)(images) - whole).abs().max() < 1e-9
    if cell == "dora":
        hold_dora_norms(monkeypatch)
    assert largest_gradient_error(classifier) <= 1e-5


def test_the_bias_of_siglip_is_trained_beside_the_scale(loaded: dict[str, ClipBackbone]) -> None:
    """It has no gradient under a softmax, and one under the sigmoid loss, for which it is made."""
    classifier = tiny_classifier(own(loaded["siglip"]), "lora-scale")
    name = "trained_scale.logit_bias"
    bias = classifier.trainable()[name]
    logits = classifier(pixels())
    softmax = nn.functional.cross_entropy(logits, LABELS)
    sigmoid = nn.functional.binary_cross_entropy_with_logits(logits, nn.functional.one_hot(LABELS, 3).double())
    (of_softmax,) = torch.autograd.grad(softmax, bias, retain_graph=True)
    (of_sigmoid,) = torch.autograd.grad(sigmoid, bias)
    assert of_softmax.abs() < 1e-12 and of_sigmoid.abs() > 1e-3
