"""Frozen weights in bfloat16, 8 and 4 bits: the function of the rounded weights, and an adapter that is bound to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.quantised import METHODS
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.frozen_precision import QuantisedLinear
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.backbone import BackboneConfig, Precision
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import FAMILIES, LABELS, PROMPTS, pixels, tiny_classifier

LORA = LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1)
WIDE: dict[str, AdapterConfig] = {
    "coop": CoOpConfig(context_tokens=4, seed=1),
    "lora, both towers": LORA,
    **{method: PeftAdapterConfig(method=method, seed=1) for method in METHODS},
}


@pytest.fixture
def bits() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")


def loaded(twins: tuple[str, str], family: str, precision: Precision) -> ClipBackbone:
    return load_backbone(BackboneConfig(family=family, name=twins[FAMILIES.index(family)], precision=precision))


def with_rounded_weights(float32: ClipBackbone, quantised: ClipBackbone) -> ClipBackbone:
    """Plain layers that hold what the quantised ones compute with."""
    for name, layer in quantised.model.named_modules():
        if isinstance(layer, QuantisedLinear):
            weight: Any = float32.model.get_submodule(name).weight
            weight.data = layer.float_weight()
    return float32


def outputs(classifier: ClipClassifier) -> tuple[Tensor, list[Tensor]]:
    logits = classifier(pixels(dtype=torch.float32))
    loss = nn.functional.cross_entropy(logits, LABELS)
    return logits.detach(), list(torch.autograd.grad(loss, list(classifier.trainable().values())))


@pytest.mark.slow
@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("adapter", WIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_tower_is_the_float_one_of_its_rounded_weights(
    twins: tuple[str, str], family: str, adapter: str, precision: Precision
) -> None:
    quantised, plain = loaded(twins, family, precision), loaded(twins, family, "float32")
    with_rounded_weights(plain, quantised)
    found, wanted = (outputs(tiny_classifier(one, WIDE[adapter])) for one in (quantised, plain))
    for one, other in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        # Float32, whose products are added in another order; the weights were rounded by some percent.
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.slow
@pytest.mark.usefixtures("bits")
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_no_frozen_bit_and_an_adapter_comes_back(
    twins: tuple[str, str], family: str, precision: Precision, tmp_path: Path
) -> None:
    plain, backbone = loaded(twins, family, "float32"), loaded(twins, family, precision)
    assert backbone.base_hash == plain.base_hash and backbone.identity != plain.identity
    assert float(backbone.logit_scale) == float(plain.logit_scale)
    images = pixels(dtype=torch.float32)
    with torch.no_grad():
        near, exact = backbone.encode_image(images).float(), plain.encode_image(images)
    assert 1e-4 < (near - exact).norm() / exact.norm() < (0.2 if precision == "nf4" else 0.03)
    classifier = ClipClassifier(backbone, build_adapter(LORA, backbone, PROMPTS), PROMPTS)
    optimizer = torch.optim.AdamW(classifier.trainable().values(), lr=1e-2)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nn.functional.cross_entropy(classifier(images), LABELS).backward()
        assert all(p.dtype == torch.float32 and p.grad is not None for p in classifier.trainable().values())
        optimizer.step()
    assert backbone.current_hash() == backbone.base_hash
    classifier.eval()
    save_adapter(tmp_path / "adapter", classifier, trained_with={})
    with torch.no_grad():
        assert torch.equal(load_adapter(tmp_path / "adapter")(images), classifier(images))


def test_row_82_an_adapter_of_another_precision_is_refused_unless_it_is_named(
    twins: tuple[str, str], tmp_path: Path
) -> None:
    half = loaded(twins, "open_clip", "bfloat16")
    classifier = ClipClassifier(half, build_adapter(LORA, half, PROMPTS), PROMPTS)
    save_adapter(tmp_path / "adapter", classifier, trained_with={})
    plain = loaded(twins, "open_clip", "float32")
    with pytest.raises(UserError, match=r"backbone\.precision=bfloat16, and this one has float32.*by its name"):
        load_adapter(tmp_path / "adapter", plain)
    with pytest.raises(UserError, match="precision=nf4 was named"):
        load_adapter(tmp_path / "adapter", plain, precision="nf4")
    assert load_adapter(tmp_path / "adapter", plain, precision="float32").backbone is plain
    again = load_adapter(tmp_path / "adapter", precision="float32").backbone
    assert (again.dtype, again.identity) == (torch.float32, plain.identity)


def test_row_83_quantisation_without_its_library_says_what_to_install(
    twins: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'disam_peft\[quantised\]'"):
        loaded(twins, "open_clip", "nf4")


@pytest.mark.usefixtures("bits")
def test_row_84_what_needs_float_weights_is_refused_and_leaves_the_backbone(twins: tuple[str, str]) -> None:
    backbone = loaded(twins, "transformers", "nf4")
    for config in (FullConfig(), PeftAdapterConfig(method="dora")):
        with pytest.raises(UserError, match=r"needs float weights, and those of .* are nf4"):
            build_adapter(config, backbone, PROMPTS)
    adapter = build_adapter(LORA, backbone, PROMPTS)
    with pytest.raises(UserError, match=r"a merged checkpoint, .* needs float weights"):
        adapter.merged(backbone)


@pytest.mark.slow
@pytest.mark.usefixtures("bits")
def test_no_float_weight_is_kept_for_backward() -> None:
    layer = QuantisedLinear(nn.Linear(64, 48), "nf4").requires_grad_(False)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
        layer(torch.randn(5, 64, requires_grad=True))
    assert not sizes and layer.weight.untyped_storage().nbytes() == 64 * 48 // 2
