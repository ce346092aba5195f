"""Tip-Adapter and Tip-Adapter-F against the values of the authors' code, and the cache by class and domain."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.base import cosine_logits
from disam_peft.adapters.key_value_cache import cache_keys, cache_rows, search_factors, search_values
from disam_peft.adapters.registry import build_adapter
from disam_peft.adapters.tip_adapter import TipAdapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import TipAdapterConfig, takes_no_steps
from disam_peft.config.losses import ContrastiveConfig, head_conflict
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import DOMAINS, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.paths import REFERENCE

VALUES = np.load(REFERENCE / "adapters.npz")
CASES = json.loads(str(VALUES["meta"]))["cases"]
HUNDRED = torch.tensor(100.0, dtype=torch.float64)


def value(key: str) -> Tensor:
    return torch.from_numpy(VALUES[key])


def of_the_authors(**settings: object) -> TipAdapter:
    """With the cache of the reference case."""
    config = TipAdapterConfig(**settings)
    adapter = TipAdapter(config, 4, torch.zeros(8, dtype=torch.float64))
    labels = value("tip/cache_values").argmax(dim=1)
    with torch.no_grad():
        adapter.fit_start(value("tip/cache_keys").T, labels, torch.arange(12))
    return adapter


def test_keys_are_the_normalised_mean_of_raw_features() -> None:
    assert (cache_keys(value("tip/shot_features")) - value("tip/cache_keys").T).abs().max() <= 1e-12
    assert torch.equal(value("tip/cache_values").argmax(dim=1), value("tip/shot_labels"))


def test_logits_are_those_of_the_authors() -> None:
    names = [key for key in VALUES.files if key.startswith("tip/logits")]
    assert len(names) == 4
    for name in names:
        alpha, beta = (float(part) for part in name.removeprefix("tip/logits_alpha").split("_beta"))
        adapter = of_the_authors(alpha=alpha, beta=beta)
        found = adapter.logits(value("tip/query"), value("tip/clip_weights").T, HUNDRED, None)
        assert (found - value(name)).abs().max() <= 1e-10 * value(name).abs().max()


def test_the_search_is_that_of_the_authors() -> None:
    case = CASES["tip"]
    adapter = of_the_authors(search_scale=case["search_scale"], search_step=case["search_step"])
    query, text_CE, labels = value("tip/query"), value("tip/clip_weights").T, value("tip/query_labels")
    zero_shot = cosine_logits(query, text_CE, HUNDRED, None)
    found = adapter.tune(query, labels, torch.zeros_like(labels), zero_shot)
    assert found == {"alpha": case["best_alpha"], "beta": case["best_beta"]}
    assert float(adapter.alpha) == case["best_alpha"] and float(adapter.beta) == case["best_beta"]
    assert search_values(7.0, 3) == pytest.approx([0.1, 2.4, 4.7]), "without the end"


def test_the_search_finds_the_first_best_of_the_mean_over_domains() -> None:
    """Against all pairs one by one, on data where the mean over domains and over images differ."""
    generator = torch.Generator().manual_seed(3)
    features = nn.functional.normalize(torch.randn(90, 6, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.randint(3, (90,), generator=generator)
    zero_shot = 2 * torch.randn(90, 3, generator=generator, dtype=torch.float64)
    domains = torch.cat([torch.zeros(45, dtype=torch.int64), torch.full((5,), 3)])
    keys, values = features[50:], nn.functional.one_hot(labels[50:], 3).double()
    alphas, betas = search_values(3.0, 6), search_values(7.0, 5)

    def by_hand(of_domains: Tensor) -> tuple[float, float, float]:
        tried = []
        for beta in betas:
            for alpha in alphas:
                logits = zero_shot[:50] + alpha * torch.exp(-beta * (1 - features[:50] @ keys.T)) @ values
                right = (logits.argmax(1) == labels[:50]).double()
                scores = [float(right[of_domains == d].mean()) for d in of_domains.unique()]
                tried.append((sum(scores) / len(scores), -len(tried), alpha, beta))
        top1, _, alpha, beta = max(tried)
        return alpha, beta, top1

    pooled = torch.zeros(50, dtype=torch.int64)
    found = []
    for of_domains in (domains, pooled):
        one = search_factors(zero_shot[:50], features[:50], keys, values, labels[:50], of_domains, alphas, betas)
        found.append((one.alpha, one.beta))
        assert (one.alpha, one.beta, one.top1) == pytest.approx(by_hand(of_domains))
    assert found[0] != found[1]


def test_the_search_in_pieces_is_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = of_the_authors()
    monkeypatch.setattr("disam_peft.adapters.key_value_cache.AT_ONCE", 30)
    test_the_search_is_that_of_the_authors()
    assert adapter.needs_tuning() and not of_the_authors(alpha=1.0, beta=0.0).needs_tuning()


def test_a_factor_that_is_set_is_not_searched() -> None:
    labels = value("tip/query_labels")
    zero_shot = cosine_logits(value("tip/query"), value("tip/clip_weights").T, HUNDRED, None)
    for settings in ({"alpha": 2.25}, {"beta": 3.25}):
        found = of_the_authors(**settings).tune(value("tip/query"), labels, torch.zeros_like(labels), zero_shot)
        assert found.items() > settings.items() and len(found) == 2


def test_training_the_keys_is_tip_adapter_f() -> None:
    """Ten steps of AdamW at the authors' settings, on their batches."""
    case = CASES["tip_f"]
    adapter = of_the_authors(trained="keys", alpha=case["alpha"], beta=case["beta"])
    assert list(adapter.trainable()) == ["keys"]
    optimizer = torch.optim.AdamW(
        adapter.trainable().values(), lr=case["lr"], eps=case["adamw_eps"], weight_decay=case["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(10):
        logits = adapter.logits(value("tip_f/features")[step], value("tip/clip_weights").T, HUNDRED, None)
        loss = nn.functional.cross_entropy(logits, value("tip_f/labels")[step])
        assert loss.item() == pytest.approx(float(value("tip_f/loss")[step]), rel=1e-10)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            wanted = value("tip_f/grad_step0")
            assert adapter.keys.grad is not None
            assert (adapter.keys.grad - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        optimizer.step()
        schedule.step()
        assert (adapter.keys - value("tip_f/keys_after")[step]).abs().max() <= 1e-9


def test_the_cache_has_so_many_images_of_each_class_and_domain() -> None:
    labels, domains = torch.arange(60) % 3, torch.arange(60) // 3 % 2 * (torch.arange(60) > 5)
    drawn = [cache_rows(labels, domains, 4, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], drawn[0].unique())
    cells = (3 * domains + labels).bincount()
    assert cells.min() > 4
    assert torch.equal((3 * domains + labels)[drawn[0]].bincount(), torch.full((6,), 4))
    everything = torch.arange(60)
    assert torch.equal(cache_rows(labels, domains, "all", 0), everything)
    assert torch.equal(cache_rows(labels, domains, 99, 0), everything), "of a cell with fewer, all"
    assert len(cache_rows(labels, torch.zeros_like(domains), 4, 0)) == 12


def test_each_entry_says_its_class_and_its_domain(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    adapter = build_adapter(TipAdapterConfig(shots=1), backbone, PROMPTS)
    assert takes_no_steps(adapter.config) and not adapter.trainable()
    features = torch.randn(6, 16, dtype=torch.float64)
    told = adapter.fit_start(features, LABELS, DOMAINS)
    assert told == {"entries": 6, "cells": 6}
    state = adapter.state()
    assert state.keys() == {"keys", "labels", "domains", "alpha", "beta"}
    assert torch.equal(state["labels"], LABELS) and torch.equal(state["domains"], DOMAINS)
    assert torch.equal(state["keys"], nn.functional.normalize(features, dim=-1))
    keys = adapter.keys
    adapter.make_room(LABELS, DOMAINS)
    assert adapter.keys is keys, "of the same size already"


def test_a_state_of_another_size_is_loaded_whole_or_not_at_all(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    one = tiny_classifier(backbone, TipAdapterConfig(trained="keys"))
    assert isinstance(one.adapter, TipAdapter)
    state, wanted = one.adapter.state(), one(pixels())
    other = build_adapter(TipAdapterConfig(trained="keys"), backbone, PROMPTS)
    assert isinstance(other, TipAdapter)
    for fault, message in (
        ({"labels": torch.full((6,), 3)}, "labels holds 3 to 3, which are not from 0 to 2"),
        ({"labels": LABELS - 1}, "labels holds -1 to 1"),
        ({"domains": DOMAINS - 1}, "domains holds -1 to 0"),
        ({"keys": state["keys"][:5]}, r"keys expected shape \(6, 16\), found \(5, 16\)"),
        ({"labels": LABELS[None]}, "labels expected shape"),
    ):
        with pytest.raises(UserError, match=message):
            other.load_state({**state, **fault})
        assert len(other.keys) == 0
    other.load_state(state)
    assert isinstance(other.keys, nn.Parameter)
    assert torch.equal(ClipClassifier(backbone, other, PROMPTS)(pixels()), wanted)


def test_alpha_0_is_zero_shot(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "transformers")
    classifier = tiny_classifier(backbone, TipAdapterConfig(trained="keys", alpha=0.0, beta=1.0))
    assert torch.equal(classifier(pixels()), ClipClassifier(backbone, None, PROMPTS)(pixels()))


def test_what_has_no_meaning_for_a_cache_is_refused(twins: tuple[str, str]) -> None:
    adapter = tiny_classifier(tiny_backbone(twins, "open_clip"), "tip_adapter-keys").adapter
    assert adapter is not None
    with pytest.raises(UserError, match=r"no zero-shot weights.*adapter.alpha is the factor of the cache"):
        TipAdapter.require_zero_shot_weights(adapter.config)
    with pytest.raises(UserError, match="a cache of its own training images"):
        TipAdapter.soup([adapter.config] * 2, [adapter.state()] * 2)
    assert "has a head of its own" in (head_conflict(ContrastiveConfig(), adapter.config) or "")
