"""Closed-form probes: ridge and LDA by their definitions, regularisation and scale by source validation."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from disam_peft.adapters.closed_form import FeatureMoments, judge, lda_head, ridge_head
from disam_peft.adapters.closed_form_probe import SEARCHED, ClosedFormProbe
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import ClosedFormProbeConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import DOMAINS, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier


def some_images(count: int = 80, classes: int = 3, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised features around a mean of each class, of unequally frequent classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) ** 2 * classes).long()
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(means[labels] + 1.2 * noise, dim=-1), labels


@pytest.mark.parametrize("rows", [7, 65_536])
@pytest.mark.parametrize("regularisation", [1e-3, 0.5])
def test_ridge_is_the_least_squares_of_its_definition(
    regularisation: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one system of equations, with rows of their own for the penalty."""
    monkeypatch.setattr("disam_peft.adapters.closed_form.ROWS", rows)
    features, labels = some_images()
    head = ridge_head(FeatureMoments.of(features, labels, 3), regularisation)
    one = torch.ones(80, 1, dtype=torch.float64)
    penalty = torch.cat([(80 * regularisation) ** 0.5 * torch.eye(6).double(), 0 * one[:6]], dim=1)
    system = torch.cat([torch.cat([features, one], dim=1), penalty])
    targets = torch.cat([nn.functional.one_hot(labels, 3).double(), torch.zeros(6, 3, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(system, targets, driver="gelsd").solution
    assert (head.weight_CE - wanted[:6].T).abs().max() <= 1e-11
    assert (head.bias_C - wanted[6]).abs().max() <= 1e-11
    assert head.weight_CE.abs().max() > 1e-2


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_lda_is_the_posterior_of_normal_distributions(shrinkage: float) -> None:
    features, labels = some_images()
    head = lda_head(FeatureMoments.of(features, labels, 3), shrinkage)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    centred = features - means[labels]
    within = centred.T @ centred / 80
    shrunk = (1 - shrinkage) * within + shrinkage * within.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    normals = [torch.distributions.MultivariateNormal(mean, shrunk) for mean in means]
    share = labels.bincount() / 80
    log_joint = torch.stack([normals[c].log_prob(features) + share[c].log() for c in range(3)], dim=1)
    found = head.logits(features).log_softmax(1)
    assert (found - log_joint.log_softmax(1)).abs().max() <= 1e-6
    assert found.exp().max(1).values.min() < 0.9, "and not certain everywhere"


def test_a_class_without_images_is_an_error_for_lda_and_never_answered_by_ridge() -> None:
    features, labels = some_images()
    moments = FeatureMoments.of(features, labels, 4)
    assert not torch.isfinite(lda_head(moments, 0.5).weight_CE).all(), "the start is refused for that"
    ridge = ridge_head(moments, 0.1)
    assert torch.equal(ridge.weight_CE[3], torch.zeros(6, dtype=torch.float64)) and ridge.bias_C[3] == 0


def test_domains_count_alike_and_the_scale_is_that_of_the_lowest_nll() -> None:
    features, labels = some_images()
    domains = (torch.arange(80) >= 70).long() * 5
    logits = lda_head(FeatureMoments.of(features, labels, 3), 0.3).logits(features) * 3
    found = judge(logits, labels, domains)
    parts = [slice(0, 70), slice(70, 80)]

    def nll(scale: float) -> float:
        return sum(float(nn.functional.cross_entropy(scale * logits[part], labels[part])) for part in parts) / 2

    right = (logits.argmax(1) == labels).double()
    assert found.top1 == pytest.approx(sum(float(right[part].mean()) for part in parts) / 2)
    assert found.nll == pytest.approx(nll(found.scale), abs=1e-12)
    assert found.nll < min(nll(0.97 * found.scale), nll(1.03 * found.scale)) and 0.1 < found.scale < 1
    assert judge(logits, labels, domains, scale=2.0).nll == pytest.approx(nll(2.0), abs=1e-12)
    certain = 0.1 * nn.functional.one_hot(labels, 3).double()
    assert judge(certain, labels, domains).scale == pytest.approx(100, rel=1e-3), "without a minimum: the largest"


def probe(solver: str, **settings: object) -> ClosedFormProbe:
    config = ClosedFormProbeConfig(solver=solver, **settings)
    return ClosedFormProbe(config, torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("solver", SEARCHED)
@torch.no_grad()
def test_regularisation_and_scale_are_chosen_on_held_back_images(solver: str) -> None:
    features, labels = some_images(30)
    held_back, wanted = some_images(200, seed=1)
    domains = torch.arange(200) % 2
    adapter = probe(solver)
    assert adapter.needs_tuning() and adapter.fit_start(7 * features, labels, labels) == {}
    told = adapter.tune(5 * held_back, wanted, domains, torch.zeros(200, 3))
    moments, closed_form = FeatureMoments.of(features, labels, 3), {"ridge": ridge_head, "lda": lda_head}[solver]
    tried = {value: judge(closed_form(moments, value).logits(held_back), wanted, domains) for value in SEARCHED[solver]}
    best = max(tried, key=lambda value: (tried[value].top1, -tried[value].nll))
    assert told["regularisation"] == best and told["scale"] == pytest.approx(tried[best].scale, rel=1e-6)
    assert len({judged.top1 for judged in tried.values()}) > 1, "there was something to choose"
    head = closed_form(moments, best)
    by_hand = tried[best].scale * head.logits(held_back)
    assert (adapter.logits(held_back, features, torch.tensor(1.0), None) - by_hand).abs().max() <= 1e-10
    fixed = probe(solver, regularisation=0.2, scale=4.0)
    assert not fixed.needs_tuning()
    assert fixed.fit_start(features, labels, labels) == {"regularisation": 0.2, "scale": 4.0}
    assert (fixed.weight - 4 * closed_form(moments, 0.2).weight_CE).abs().max() <= 1e-12
    part = probe(solver, regularisation=0.2)
    part.fit_start(features, labels, labels)
    assert part.tune(held_back, wanted, domains, by_hand)["regularisation"] == 0.2


def test_the_head_is_trained_where_the_config_says_so(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    fitted = build_adapter(ClosedFormProbeConfig(regularisation=0.1, scale=10.0), backbone, PROMPTS)
    trained = build_adapter(ClosedFormProbeConfig(regularisation=0.1, scale=10.0, trained="head"), backbone, PROMPTS)
    assert not fitted.trainable() and trained.trainable().keys() == {"weight", "bias"}
    assert fitted.head_bias is None and trained.head_bias is not None
    with torch.no_grad():
        for adapter in (fitted, trained):
            adapter.fit_start(backbone.encode_image(pixels()), LABELS, DOMAINS)
    logits = [ClipClassifier(backbone, adapter, PROMPTS)(pixels()) for adapter in (fitted, trained)]
    assert torch.equal(logits[0], logits[1])
    assert (logits[0].argmax(1) == LABELS).all(), "six images, and their own features"
    with pytest.raises(UserError, match="is fitted and not trained has no way from zero-shot"):
        ClosedFormProbe.require_zero_shot_weights(fitted.config)
    ClosedFormProbe.require_zero_shot_weights(trained.config)


def test_wise_ft_of_a_trained_head_begins_at_zero_shot(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, "closed_form_probe-head")
    with classifier.interpolation() as move_to:
        move_to(0.0)
        wanted = ClipClassifier(backbone, None, PROMPTS)(pixels())
        assert (classifier(pixels()) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_shrinkage_above_1_is_refused() -> None:
    with pytest.raises(ValidationError, match="that of lda is a share of the covariance, and at most 1"):
        ClosedFormProbeConfig(solver="lda", regularisation=1.5)
    assert ClosedFormProbeConfig(regularisation=1.5).regularisation == 1.5
