"""A run with a feature store decodes every image once; zero-shot reads what the adapter's evaluations read."""

from __future__ import annotations

from collections import Counter

import pytest

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.evaluation.results import Evaluator
from disam_peft.experiments import build, run
from disam_peft.experiments.run_cache import RunCache

ADAPTERS = {
    "lora": {"kind": "lora", "blocks": {"last": 1}},
    "lora-all": {"kind": "lora", "blocks": "all"},
    "lora-text": {"kind": "lora", "towers": ["text"]},
    "ln_tuning": {"kind": "peft", "method": "ln_tuning", "blocks": [1]},
    "coop": {"kind": "coop", "context_tokens": 4},
    "cocoop": {"kind": "cocoop", "context_tokens": 2},
    "linear_probe": {"kind": "linear_probe"},
    "clip_adapter": {"kind": "clip_adapter"},
    "full-last": {"kind": "full", "blocks": {"last": 1}},
    "full-projection": {"kind": "full", "blocks": "none", "projection": True},
    "full-text": {"kind": "full", "towers": ["text"]},
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
IMAGES = 96


class Watched:
    """What a run looks at.

    Attributes:
        decoded: how often each image was decoded after the check of the data.
        encoded: by the number of blocks in front of a store (None: the whole tower), images that went through them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: Counter[str] = Counter()
        self.encoded: Counter[int | None] = Counter()
        image, encode = DomainDataset.image, ClipClassifier.encode_frozen

        def counted(dataset, index):
            self.decoded[dataset.keys[index]] += 1
            return image(dataset, index)

        def counted_encode(classifier, pixels):
            self.encoded[classifier.image_split] += len(pixels)
            return encode(classifier, pixels)

        monkeypatch.setattr(DomainDataset, "image", counted)
        monkeypatch.setattr(ClipClassifier, "encode_frozen", counted_encode)


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path):
    def make(adapter, name="run", *, store=True, batch_size=64):
        return Recipe.model_validate(
            {
                "name": name,
                "output": tmp_path / "runs",
                "backbone": {"name": openclip_name},
                "adapter": adapter,
                "data": {"root": domains_folder},
                "augment": {"kind": "none"},
                "features": {"store": store, "folder": tmp_path / f"stores of {name}"},
                "protocol": {"held_out": "photo"},
                "train": {"steps": 4, "batch_size": 4, "workers": 0},
                "evaluation": {"workers": 0, "batch_size": batch_size, "example_errors": 0},
            }
        )

    return make


@pytest.mark.slow
@every_adapter
def test_every_image_is_decoded_once(make_recipe, monkeypatch, adapter):
    watched = Watched(monkeypatch)
    run.train(make_recipe(adapter))
    assert len(watched.decoded) == IMAGES
    assert set(watched.decoded.values()) == {1}
    # three stores at one split, each with the blank image that tells its shape
    assert list(watched.encoded.values()) == [IMAGES + 3]


@pytest.mark.slow
@every_adapter
def test_zero_shot_from_the_adapters_store_has_the_same_bits(make_recipe, monkeypatch, adapter):
    [shared] = run.train(make_recipe(adapter, "shared"))
    [images] = run.train(make_recipe(adapter, "images", store=False))
    monkeypatch.setattr(build, "planned_image_split", lambda config, backbone: None)
    [apart] = run.train(make_recipe(adapter, "apart"))
    assert shared.rows == apart.rows
    assert [row for row in shared.rows if row.method == "zero_shot"] == images.rows[: len(images.rows) // 2]


def test_without_a_store_nobody_asks_for_the_split(make_recipe, monkeypatch):
    monkeypatch.setattr(build, "planned_image_split", None)
    run.train(make_recipe(ADAPTERS["lora"], store=False))


@pytest.mark.slow
def test_zero_shot_numbers_are_kept_per_split(make_recipe, monkeypatch):
    """In batches unlike the store's, where the frozen part ends is a matter of rounding."""
    cache, judged = RunCache(), []
    predict = Evaluator.predict_splits
    monkeypatch.setattr(Evaluator, "predict_splits", lambda *a, **k: judged.append(k["label"]) or predict(*a, **k))
    for name, adapter in ADAPTERS.items():
        recipe = make_recipe(adapter, name, batch_size=7)
        [together] = run.train(recipe, cache=cache)
        [alone] = run.train(recipe, overwrite=True)
        assert together.rows == alone.rows
    # lora and full-last (2), lora-all (0), ln_tuning (1), full-projection (3), and one for those that leave the whole
    # tower as it is
    assert judged.count("zero_shot") == 5 + len(ADAPTERS)
