"""LP-FT: the probe is the minimum of its function, and training starts from its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn

from disam_peft.adapters.logistic_regression import fit_head
from disam_peft.adapters.lp_ft import INNER, LpFtAdapter
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.adapters import ADAPTER_CONFIGS
from disam_peft.config.composed_adapters import LpFtConfig, ProbeStartConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError
from disam_peft.export.peft import export_peft
from tests.helpers.adapter_cells import FAMILIES, LABELS, LAST_TWO, PROMPTS, pixels, tiny_backbone, tiny_classifier

BELOW = {
    "lora": LoraAdapterConfig(blocks=LAST_TWO, rank=2, seed=1),
    "dora": PeftAdapterConfig(method="dora", blocks=LAST_TWO, options={"r": 2}, seed=1),
    "full": FullConfig(),
    "clip_adapter": ClipAdapterConfig(seed=1),
}


def normalised(count: int = 40, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("train_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [1e-3, 1e-1])
def test_the_head_is_the_minimum_that_scipy_finds(
    train_bias: bool, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = normalised(), torch.arange(40) % 4
    start, bias = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.full((4,), 0.5)
    f, y, w0 = features.numpy(), labels.numpy(), start.double().numpy()

    def objective(x: Any) -> tuple[float, Any]:
        w, b = x[:24].reshape(4, 6), x[24:] if train_bias else np.full(4, 0.5)
        log_p = log_softmax(f @ w.T + b, axis=1)
        error = (np.exp(log_p) - np.eye(4)[y]) / 40
        gradient = [(error.T @ f + weight_decay * (w - w0)).ravel(), *([error.sum(0)] if train_bias else [])]
        value = -log_p[np.arange(40), y].mean() + weight_decay / 2 * ((w - w0) ** 2).sum()
        return value, np.concatenate(gradient)

    begin = np.concatenate([w0.ravel(), *([np.full(4, 0.5)] if train_bias else [])])
    found = minimize(objective, begin, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    settings: dict[str, Any] = {"train_bias": train_bias, "weight_decay": weight_decay, "steps": 500}
    head = fit_head(features, labels, start, bias, **settings)
    w = found.x[:24].reshape(4, 6)
    assert np.abs(head.weight_CE.numpy() - w).max() <= 1e-6
    assert np.abs(head.bias_C.numpy() - (found.x[24:] if train_bias else 0.5)).max() <= 1e-6
    mine = np.concatenate([head.weight_CE.numpy().ravel(), *([head.bias_C.numpy()] if train_bias else [])])
    assert objective(mine)[0] <= found.fun + 1e-12
    log_p = log_softmax(f @ head.weight_CE.numpy().T + head.bias_C.numpy(), axis=1)
    assert head.loss == pytest.approx(-log_p[np.arange(40), y].mean(), abs=1e-12)
    assert head.top1 == np.mean(log_p.argmax(1) == y) and 1 < head.steps < 500
    assert (head.weight_CE - start).abs().max() > 0.1

    monkeypatch.setattr("disam_peft.adapters.logistic_regression.ROWS", 7)
    in_rows = fit_head(features, labels, start, bias, **settings)
    assert (in_rows.weight_CE - head.weight_CE).abs().max() <= 1e-6
    assert in_rows.loss == pytest.approx(head.loss, abs=1e-7) and in_rows.top1 == head.top1


def test_no_step_too_many_and_the_nearer_to_the_start_the_larger_the_decay() -> None:
    features, labels = normalised(), torch.arange(40) % 4
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert fit_head(features, labels, start, torch.zeros(4), steps=3).steps == 3
    moved = [
        float((fit_head(features, labels, start, torch.zeros(4), weight_decay=decay).weight_CE - start).norm())
        for decay in (1e-3, 1e-1, 10.0)
    ]
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0


def started(twins: tuple[str, str], family: str, config: LpFtConfig) -> tuple[ClipClassifier, LpFtAdapter]:
    """The classifier before its first step, with the head fitted to 6 images."""
    backbone = tiny_backbone(twins, family, torch.float32)
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, PROMPTS), PROMPTS)
    adapter = classifier.adapter
    assert isinstance(adapter, LpFtAdapter)
    images = pixels(dtype=torch.float32)
    with torch.no_grad():
        numbers = adapter.fit_start(
            classifier.tower_features(classifier.encode_frozen(images)), LABELS, torch.zeros_like(LABELS)
        )
    assert set(numbers) == {"training_loss", "training_top1", "probe_steps"}
    return classifier, adapter


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("below", ["lora", "dora", "full"])
def test_the_first_logits_are_those_of_the_probe_to_the_bit(twins: tuple[str, str], family: str, below: str) -> None:
    """Of a probe that is computed apart from the adapter, on the features of the plain tower."""
    config = LpFtConfig(adapter=BELOW[below])
    images, plain = pixels(dtype=torch.float32), tiny_backbone(twins, family, torch.float32)
    with torch.no_grad():
        features = nn.functional.normalize(plain.encode_image(images), dim=-1)
    start = plain.logit_scale * zero_shot(plain, PROMPTS.class_names, PROMPTS.templates).class_features()
    head = fit_head(features, LABELS, start, torch.zeros(3), weight_decay=1e-3)
    wanted = nn.functional.linear(features, head.weight_CE.float(), head.bias_C.float())
    classifier, adapter = started(twins, family, config)
    classifier.train()
    found = classifier.logits(classifier.encode_frozen(images))
    assert torch.equal(found, wanted) and found.requires_grad
    assert torch.equal(adapter.trainable()["head.weight"], head.weight_CE.float())
    unfitted = nn.functional.linear(features, start)
    assert (wanted - unfitted).abs().max() > 1e-2, "the fit did something"
    names = adapter.trainable().keys()
    assert {"head.weight", "head.bias"} < names and all(name.startswith(("head.", "adapter.")) for name in names)


@pytest.mark.parametrize("below", BELOW)
def test_a_step_moves_head_and_adapter_and_the_folder_brings_both_back(
    twins: tuple[str, str], below: str, tmp_path: Path
) -> None:
    config = LpFtConfig(adapter=BELOW[below], probe=ProbeStartConfig(init="zeros", weight_decay=1e-3))
    classifier, adapter = started(twins, "open_clip", config)
    images, before = pixels(dtype=torch.float32), adapter.state()
    optimizer = torch.optim.SGD(adapter.trainable().values(), lr=0.1)
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier.logits(classifier.encode_frozen(images)), LABELS).backward()
        optimizer.step()
    after = adapter.state()
    assert all(not torch.equal(after[name], before[name]) for name in after if "magnitude" not in name)
    wanted = classifier(images)
    save_adapter(tmp_path / "adapter", classifier, trained_with={})
    export_peft(tmp_path / "exported", classifier)
    adapter.detach(classifier.backbone)
    for folder in ("adapter", "exported"):
        again = load_adapter(tmp_path / folder, classifier.backbone)
        assert torch.equal(again(images), wanted)
        assert again.adapter is not None
        again.adapter.detach(classifier.backbone)


def test_zeros_start_from_equal_logits(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    config = LpFtConfig(adapter=BELOW["lora"], probe=ProbeStartConfig(init="zeros", bias=False))
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, PROMPTS), PROMPTS)
    assert not classifier(pixels(dtype=torch.float32)).any()
    assert "head.bias" not in classifier.trainable()


@pytest.mark.slow
def test_the_fit_sees_what_stands_behind_the_tower(twins: tuple[str, str]) -> None:
    """CLIP-Adapter's bottleneck is random at the start; the head is fitted to its output, not to the tower's."""
    classifier, adapter = started(twins, "open_clip", LpFtConfig(adapter=BELOW["clip_adapter"]))
    features = adapter.image_features(classifier.backbone.encode_image(pixels(dtype=torch.float32)))
    head = LpFtAdapter.build(adapter.config, classifier.backbone, PROMPTS).head
    wanted = fit_head(nn.functional.normalize(features, dim=-1), LABELS, head.weight, head.bias, weight_decay=1e-3)
    torch.testing.assert_close(adapter.head.weight.detach(), wanted.weight_CE.float())
    assert (adapter.head.weight - head.weight).abs().max() > 1e-2


def test_soups_average_heads_and_what_is_below_them(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    configs = [LpFtConfig(adapter=BELOW["lora"]), LpFtConfig(adapter=BELOW["lora"].model_copy(update={"rank": 3}))]
    states, features, heads = [], [], []
    for config in configs:
        classifier = tiny_classifier(backbone, config)
        assert isinstance(classifier.adapter, LpFtAdapter)
        states.append(classifier.adapter.state())
        heads.append(classifier.adapter.head.weight.detach())
        features.append(dict(classifier.adapter.inner.merged(backbone).named_parameters()))
        classifier.adapter.detach(backbone)
    mean, state = LpFtAdapter.soup(configs, states)
    assert isinstance(mean, LpFtConfig) and isinstance(mean.adapter, LoraAdapterConfig)
    assert mean.adapter.rank == 5
    found = build_adapter(mean, backbone, PROMPTS)
    assert isinstance(found, LpFtAdapter)
    found.load_state(state)
    torch.testing.assert_close(found.head.weight.detach(), (heads[0] + heads[1]) / 2, rtol=0, atol=1e-12)
    for name, parameter in found.inner.merged(backbone).named_parameters():
        torch.testing.assert_close(parameter, (features[0][name] + features[1][name]) / 2, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match=r"different parts \(lora and linear_probe, full and linear_probe\)"):
        LpFtAdapter.soup([configs[0], LpFtConfig(adapter=FullConfig())], states)
    with pytest.raises(UserError, match="differ in bias"):
        LpFtAdapter.soup([configs[0], configs[1].model_copy(update={"probe": ProbeStartConfig(bias=False)})], states)
    with pytest.raises(UserError, match="'dora' adapters cannot be averaged"):
        LpFtAdapter.soup([LpFtConfig(adapter=BELOW["dora"])] * 2, states)


def test_a_checkpoint_of_clip_has_no_place_for_the_head(twins: tuple[str, str]) -> None:
    classifier, adapter = started(twins, "open_clip", LpFtConfig(adapter=BELOW["lora"]))
    with pytest.raises(UserError, match=r"classifies by a head of its own.*use --to peft"):
        adapter.merged(classifier.backbone)
    with pytest.raises(UserError, match=r"'clip_adapter' .* has no zero-shot weights"):
        LpFtAdapter.require_zero_shot_weights(LpFtConfig(adapter=BELOW["clip_adapter"]))


def test_what_may_stand_below_a_head() -> None:
    assert INNER.keys() == {type(config) for config in BELOW.values()} | {LoraAdapterConfig, PeftAdapterConfig}
    assert INNER.keys() < set(ADAPTER_CONFIGS)
    for settings, message in (
        ({"kind": "coop"}, "coop trains prompts, and with a head of its own the text has no part"),
        ({"kind": "linear_probe"}, "linear_probe has a head of its own, and lp_ft has one already"),
        ({"kind": "lp_ft"}, "lp_ft has a head of its own"),
        ({"kind": "lora", "towers": ["image", "text"]}, r"has text, .*; use towers: \[image\]"),
        ({"kind": "full", "logit_scale": "trained"}, "the head has no logit scale; leave it out"),
    ):
        with pytest.raises(ValidationError, match=message):
            LpFtConfig.model_validate({"adapter": settings})


def test_another_alpha_of_what_is_not_linear_is_refused_without_advising_a_merge(twins: tuple[str, str]) -> None:
    """Below a head a merged checkpoint, which the adapter alone would advise, does not exist."""
    backbone = tiny_backbone(twins, "open_clip")
    adapter = build_adapter(LpFtConfig(adapter=BELOW["dora"]), backbone, PROMPTS)
    told = r"the 'peft' adapter below the head cannot be written .* evaluate --alpha compute"
    with pytest.raises(UserError, match=told) as refused:
        adapter.settle(backbone, PROMPTS, 0.5)
    assert "merged" not in str(refused.value)
