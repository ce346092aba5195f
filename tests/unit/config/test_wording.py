"""Settings in words: one wording for what a run says, the report and the list of runs."""

from __future__ import annotations

import pytest

from disam_peft.config.recipe import Recipe
from disam_peft.config.uncommon import setting_in_a_name, uncommon_settings
from disam_peft.config.wording import SPEAKING, number_text, setting_in_words, settings_that_tell


def told(**changes):
    values = {"name": "a", "backbone": {"name": "demo"}, "adapter": {"kind": "lora"}, "data": {"root": "images"}}
    return settings_that_tell(Recipe.model_validate({**values, "protocol": {"held_out": "x"}, **changes}))


PENALTIES = [{"kind": "vrex", "anneal": 20}, {"kind": "groupdro", "eta": 0.1}, {"kind": "coral"}]
WORDS = [
    ("average", {}, "-"),
    ("average", {"average": "swad"}, "swad"),
    ("average", {"average": ["ema", {"kind": "swad", "tolerance_ratio": 0.2}]}, "ema + swad (tolerance_ratio 0.2)"),
    ("objective.penalties", {}, "-"),
    ("objective.penalties", {"objective": {"penalties": [{"kind": "fishr"}]}}, "fishr"),
    (
        "objective.penalties",
        {"objective": {"penalties": [{"kind": "fishr", "weight": 1e6, "anneal": 20, "ema": 0.5}]}},
        "fishr (weight 1e6 from step 21 on, ema 0.5)",
    ),
    (
        "objective.penalties",
        {"objective": {"penalties": PENALTIES}},
        "vrex (weight 10 from step 21 on) + groupdro (eta 0.1) + coral",
    ),
    ("objective.anchors", {}, "-"),
    (
        "objective.anchors",
        {"objective": {"anchors": [{"kind": "logits"}, {"kind": "class_features", "weight": 25, "distance": "l1"}]}},
        "logits anchor + class_features anchor (weight 25, distance l1)",
    ),
    (
        "objective.anchors",
        {"objective": {"anchors": [{"kind": "logits", "distance": "l1"}]}},
        "logits anchor (distance l1)",
    ),
    ("objective.loss", {}, "cross_entropy"),
    ("objective.loss", {"objective": {"loss": {"kind": "focal", "gamma": 3}}}, "focal (gamma 3)"),
    (
        "objective.loss",
        {"objective": {"loss": {"class_weights": {"dog": 2, "cat": 1}}}},
        "cross_entropy (class_weights {dog=2, cat=1})",
    ),
]


@pytest.mark.parametrize(("key", "changes", "words"), WORDS)
def test_terms_and_averages_are_said_by_what_is_not_as_by_default(key, changes, words):
    assert setting_in_words(key, told(**changes)[key]) == words


def test_every_speaking_setting_is_tried():
    assert {key for key, _, _ in WORDS} == set(SPEAKING)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e6, "1e6"), (1e12, "1e12"), (1000.0, "1000"), (1e-5, "1e-05"), (0.05, "0.05"), (12345678, "12345678")],
)
def test_numbers(value, text):
    assert number_text(value) == text


def test_many_class_weights_are_told_apart_without_being_listed():
    weights = [{f"c{i}": 1.0 + (i == odd) for i in range(300)} for odd in (3, 4)]
    first, second = (
        setting_in_words("objective.loss", told(objective={"loss": {"class_weights": one}})["objective.loss"])
        for one in weights
    )
    assert first != second and "300 values" in first and len(first) < 60


def test_what_a_method_does_not_use_tells_nothing():
    erm, other = (told(method={"name": "erm", "rho": rho, "variance_weight": 0.3}) for rho in (0.05, 0.5))
    assert erm == other and not {"method.rho", "method.variance_weight", "method.alpha"} & set(erm)
    sam = told(method={"name": "sam"})
    assert sam["method.rho"] == 0.05 and "method.variance_weight" not in sam
    assert told(method={"name": "disam"})["method.variance_weight"] == 0.1


def test_each_says_what_most_do_not_have():
    rows = [{"rank": "4", "average": "-", "rate": str(n)} for n in range(3)]
    rows += [{"rank": "8", "average": "swad", "rate": "3"}]
    assert uncommon_settings(rows) == [
        {"rate": "0"},
        {"rate": "1"},
        {"rate": "2"},
        {"rank": "8", "average": "swad", "rate": "3"},
    ]
    assert uncommon_settings([{"average": "-", "rank": "4"}, {"average": "ema", "rank": "8"}]) == [
        {"rank": "4"},
        {"average": "ema", "rank": "8"},
    ], "without a majority all say theirs, but none is no word"
    rows = [{"average": "ema"}, {"average": "ema"}, {"average": "-"}]
    assert uncommon_settings(rows) == [{}, {}, {"average": "-"}]


def test_settings_of_adapters_and_methods_are_compared_within_one_kind():
    rows = [{"adapter.kind": "lora", "adapter.lr": "1"}] * 2 + [{"adapter.kind": "coop", "adapter.lr": "5"}]
    assert uncommon_settings(rows) == [{}, {}, {"adapter.kind": "coop"}]
    coral = {"objective.penalties": "coral", "objective.mean_over": "domains"}
    rows = [{"objective.penalties": "-", "objective.mean_over": "samples"}] * 2 + [coral]
    assert uncommon_settings(rows) == [{}, {}, {"objective.penalties": "coral"}], "which follows from coral"


@pytest.mark.parametrize(
    ("title", "text", "name"),
    [("rank", "4", "rank=4"), ("objective.penalties", "coral", "coral"), ("average", "-", "no average")],
)
def test_names(title, text, name):
    assert setting_in_a_name(title, text) == name
