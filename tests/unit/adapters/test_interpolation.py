"""WiSE-FT: the authors' values, and every kind of adapter between zero-shot and trained weights, and beyond."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from disam_peft.adapters.adapter_folder import read_adapter, write_adapter
from disam_peft.adapters.interpolation import wise_ft, wise_ft_fisher
from disam_peft.adapters.registry import ADAPTERS
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import (
    CELLS,
    FAMILIES,
    MERGED_CELLS,
    PROMPTS,
    mostly_slow,
    pixels,
    tiny_backbone,
    tiny_classifier,
)

REFERENCE = np.load(Path(__file__).parents[2] / "reference" / "averaging.npz")
NOT_LINEAR = ("dora", "oft", "hra")
WITHOUT = (
    *("coop-shared", "coop-class", "coop-scale", "cocoop", "cocoop-class", "clip_adapter", "tip_adapter-keys"),
    *("visual_prompts", "ivlp", "maple"),
    *("prompts+probe", "lora-both+coop", "full+adapter+probe"),
)
ALPHAS = (0.3, 1.2)
BOTH_FAMILIES = (FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow))


def reference(case: str, key: str) -> torch.Tensor:
    return torch.from_numpy(REFERENCE[f"{case}/{key}"])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_authors_values(alpha: float) -> None:
    theta0, theta1 = reference("wise_ft", "theta0"), reference("wise_ft", "theta1")
    assert (wise_ft(theta0, theta1, alpha) - reference("wise_ft", f"alpha{alpha}")).abs().max() <= 1e-14
    floor = json.loads(str(REFERENCE["meta"]))["cases"]["wise_ft_fisher"]["fisher_floor"]
    fishers = [reference("wise_ft_fisher", key) for key in ("f0_a", "f1_a")]
    assert min(fisher.min() for fisher in fishers) < floor  # which therefore counts
    a = wise_ft_fisher(theta0[:6].view(3, 2), theta1[:6].view(3, 2), fishers[0], fishers[1], alpha, floor)
    b = wise_ft_fisher(theta0[6:], theta1[6:], None, None, alpha, floor)
    found = torch.cat([a.flatten(), b])
    assert (found - reference("wise_ft_fisher", f"alpha{alpha}")).abs().max() <= 1e-14


def test_both_ends_are_met_to_the_bit() -> None:
    theta0, theta1 = torch.randn(100), 1e3 * torch.randn(100)
    assert torch.equal(wise_ft(theta0, theta1, 0), theta0) and torch.equal(wise_ft(theta0, theta1, 1), theta1)


@pytest.mark.parametrize("family", BOTH_FAMILIES)
@pytest.mark.parametrize("cell", mostly_slow(MERGED_CELLS))
@torch.no_grad()
def test_it_computes_with_the_interpolated_merged_weights(twins: tuple[str, str], family: str, cell: str) -> None:
    plain = tiny_backbone(twins, family)
    zero_shot = ClipClassifier(plain, None, PROMPTS)(pixels())
    w0 = dict(plain.model.named_parameters())
    classifier = tiny_classifier(tiny_backbone(twins, family), cell, scramble=0.3)
    trained = classifier(pixels())
    assert (trained - zero_shot).abs().max() > 1e-2
    assert classifier.adapter is not None
    merged = {n: p.clone() for n, p in classifier.adapter.merged(classifier.backbone).named_parameters()}
    with classifier.interpolation() as move_to:
        move_to(0.0)
        assert (classifier(pixels()) - zero_shot).abs().max() <= 1e-12
        for alpha in ALPHAS:
            wanted = tiny_backbone(twins, family)
            for name, parameter in wanted.model.named_parameters():
                parameter.copy_(w0[name] + alpha * (merged[name] - w0[name]))
            move_to(alpha)
            by_hand = ClipClassifier(wanted, None, PROMPTS)(pixels())
            assert (classifier(pixels()) - by_hand).abs().max() <= 1e-10
            assert min((by_hand - trained).abs().max(), (by_hand - zero_shot).abs().max()) > 1e-3
            exported = dict(classifier.adapter.merged(classifier.backbone).named_parameters())
            own = dict(wanted.model.named_parameters())
            assert max(float((exported[name] - own[name]).abs().max()) for name in own) <= 1e-10
            untouched = [name for name in own if torch.equal(w0[name], merged[name])]
            assert untouched and all(torch.equal(exported[name], w0[name]) for name in untouched)
        move_to(1.0)
        assert torch.equal(classifier(pixels()), trained)
        move_to(0.5)
    assert torch.equal(classifier(pixels()), trained)
    after = dict(classifier.adapter.merged(classifier.backbone).named_parameters())
    assert all(torch.equal(after[name], merged[name]) for name in merged)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("logit_bias", [None, -7.5])
@torch.no_grad()
def test_a_probe_lies_between_the_zero_shot_head_and_its_own(
    twins: tuple[str, str], monkeypatch: pytest.MonkeyPatch, family: str, bias: bool, logit_bias: float | None
) -> None:
    backbone = tiny_backbone(twins, family)
    constant = None if logit_bias is None else torch.tensor(logit_bias, dtype=torch.float64)
    monkeypatch.setattr(type(backbone), "logit_bias", property(lambda self: constant))
    zero_shot = ClipClassifier(backbone, None, PROMPTS)(pixels())
    config = LinearProbeConfig(init="random" if bias else "zero_shot", bias=bias, seed=1)
    classifier = tiny_classifier(backbone, config, scramble=0.3)
    trained = classifier(pixels())
    with classifier.interpolation() as move_to:
        move_to(0.0)
        assert (classifier(pixels()) - zero_shot).abs().max() <= 1e-12
        for alpha in ALPHAS:
            move_to(alpha)  # a head is linear, and so are its logits
            assert (classifier(pixels()) - (zero_shot + alpha * (trained - zero_shot))).abs().max() <= 1e-10
    assert torch.equal(classifier(pixels()), trained) and (trained - zero_shot).abs().max() > 0.1


@pytest.mark.parametrize("family", BOTH_FAMILIES)
@pytest.mark.parametrize("cell", mostly_slow(cell for cell in CELLS if cell not in (*NOT_LINEAR, *WITHOUT)))
@torch.no_grad()
def test_an_adapter_that_is_written_at_an_alpha_computes_the_same_elsewhere(
    twins: tuple[str, str], family: str, cell: str, tmp_path: Path
) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family), cell, scramble=0.3)
    adapter, backbone = classifier.adapter, classifier.backbone
    assert adapter is not None
    with classifier.interpolation() as move_to:
        move_to(0.7)
        wanted = classifier(pixels())
    assert not torch.allclose(classifier(pixels()), wanted, atol=1e-3)
    adapter.settle(backbone, PROMPTS, 0.7)
    write_adapter(tmp_path, adapter, backbone, PROMPTS, trained_with={})
    again = ClipClassifier(*read_adapter(tmp_path, tiny_backbone(twins, family)))
    assert torch.equal(again(pixels()), wanted)


@pytest.mark.parametrize("cell", NOT_LINEAR)
def test_what_is_not_linear_in_its_tensors_is_refused_and_left_as_it_was(twins: tuple[str, str], cell: str) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell)
    assert classifier.adapter is not None
    before = classifier.adapter.state()
    with pytest.raises(UserError, match=f"'{cell}' adapter cannot be written at another alpha.*--to merged"):
        classifier.adapter.settle(classifier.backbone, PROMPTS, 0.5)
    after = classifier.adapter.state()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("cell", WITHOUT)
def test_without_zero_shot_weights_it_is_refused_by_its_config_alone(twins: tuple[str, str], cell: str) -> None:
    with pytest.raises(UserError, match="has no zero-shot weights w0"):
        ADAPTERS[type(CELLS[cell])].require_zero_shot_weights(CELLS[cell])
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell)
    with pytest.raises(UserError, match="has no zero-shot weights w0"):
        classifier.interpolation()
    assert classifier.adapter is not None
    with pytest.raises(UserError, match="has no zero-shot weights w0"):
        classifier.adapter.settle(classifier.backbone, PROMPTS, 0.5)
    with pytest.raises(UserError, match="no trained weights"):
        ClipClassifier(tiny_backbone(twins, "open_clip"), None, PROMPTS).interpolation()


@pytest.mark.parametrize("alpha", [-0.1, 2.01, float("nan"), float("inf")])
@pytest.mark.parametrize("cell", ["lora-image", "dora"])
def test_an_alpha_that_is_none_is_refused_and_nothing_moves(twins: tuple[str, str], cell: str, alpha: float) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell)
    before = classifier(pixels())
    with classifier.interpolation() as move_to, pytest.raises(UserError, match="no place on the line"):
        move_to(alpha)
    assert torch.equal(classifier(pixels()), before)


@torch.no_grad()
def test_the_weights_come_back_where_an_evaluation_fails(twins: tuple[str, str]) -> None:
    for cell in ("lora-both", "dora"):
        classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell)
        before = classifier(pixels())
        with pytest.raises(RuntimeError, match="out of memory"), classifier.interpolation() as move_to:
            move_to(0.2)
            raise RuntimeError("out of memory")
        assert torch.equal(classifier(pixels()), before)


@torch.no_grad()
def test_half_precision_is_rounded_once(twins: tuple[str, str]) -> None:
    """Merged weights of a half-precision backbone are interpolated in float32 and rounded at the end."""
    half = tiny_backbone(twins, "open_clip", torch.float16)
    classifier = tiny_classifier(half, "oft", scramble=0.3)
    wide = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float16).to(dtype=torch.float32), "oft")
    assert classifier.adapter is not None and wide.adapter is not None
    wide.adapter.load_state(classifier.adapter.state())
    with classifier.interpolation() as move_to, wide.interpolation() as move_wide:
        move_to(0.3)
        move_wide(0.3)
        found = dict(classifier.adapter.merged(classifier.backbone).named_parameters())
        for name, parameter in wide.adapter.merged(wide.backbone).named_parameters():
            assert torch.equal(found[name], parameter.half())


def test_lora_of_peft_is_the_lora_of_our_own(twins: tuple[str, str]) -> None:
    """B times alpha is the factor alpha / r times alpha: A keeps its bits."""
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), LoraAdapterConfig(rank=2, seed=1))
    assert classifier.adapter is not None
    before = classifier.adapter.state()
    classifier.adapter.settle(classifier.backbone, PROMPTS, 0.7)
    for name, tensor in classifier.adapter.state().items():
        assert torch.equal(tensor, before[name] if "lora_A" in name else 0.7 * before[name])
