"""Settings that have no effect, and methods that are other methods."""

from __future__ import annotations

import pytest

from disam_peft.config.method import MethodConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.unused import method_in_words, unused_settings


def recipe(**changes):
    values = {
        "name": "x",
        "backbone": {"name": "demo"},
        "adapter": {"kind": "lora"},
        "data": {"shapes": {}},
        "protocol": {"held_out": "photo"},
    }
    return Recipe.model_validate({**values, **changes})


def test_what_the_method_does_not_use_is_said():
    method = {"rho": 0.1, "variance_weight": 0.7, "adaptive": True}
    assert unused_settings(recipe(method={"name": "disam", **method})) == []
    assert unused_settings(recipe(method={"name": "sam", **method})) == [
        "method.variance_weight=0.7 (sam has no variance term)"
    ]
    assert unused_settings(recipe(method={"name": "erm", **method})) == [
        "method.rho=0.1 (erm perturbs no weights)",
        "method.variance_weight=0.7 (erm perturbs no weights)",
        "method.adaptive=true (erm perturbs no weights)",
    ]


def test_settings_of_the_other_methods_are_said():
    method = {"alpha": 0.2, "variance_over": "samples", "variance_scale": "relative", "from": 0.5, "every": 2}
    assert unused_settings(recipe(method={"name": "disam_gsam", **method})) == []
    assert unused_settings(recipe(method={"name": "disam", **method})) == [
        "method.alpha=0.2 (disam has no alpha, only gsam and sagm have one)"
    ]
    assert unused_settings(recipe(method={"name": "sagm", **method})) == [
        "method.variance_over=samples (sagm has no variance term)",
        "method.variance_scale=relative (sagm has no variance term)",
    ]
    assert unused_settings(recipe(method={"name": "disam_sagm", "variance_form": "entropic", **method})) == [
        "method.variance_over=samples (the entropic form counts domains by their images)",
        "method.variance_scale=relative (the entropic form is relative to the mean loss)",
    ]
    of_erm = unused_settings(recipe(method={"name": "erm", "rho_factors": {"*": 2}, **method}))
    assert [line.split("=")[0].removeprefix("method.") for line in of_erm] == [
        *("variance_over", "variance_scale", "alpha", "from", "every", "rho_factors")
    ]
    assert len(unused_settings(recipe(method={"rho": 0, **method}))) == 5


def test_a_start_behind_the_last_step_is_said():
    """Half of a step is none: 0.95 of 10 steps begin behind the tenth."""
    method = {"name": "disam_gsam", "from": 0.95, "rho": 0.1}
    for steps, number in ((10, 2), (20, 0)):
        found = unused_settings(recipe(method=method, train={"steps": steps}))
        assert len(found) == number
        assert all("method.from=0.95 of train.steps=10 leaves no step that perturbs" in line for line in found)


def test_defaults_are_not_told_even_where_a_resolved_recipe_has_them_all():
    whole = MethodConfig(name="erm").model_dump()
    assert unused_settings(recipe(method=whole)) == []


def test_other_settings_without_effect_are_said():
    found = unused_settings(
        recipe(method={"name": "sam"}, train={"momentum": 0.5, "log_ascent_cosine": True}, features={"views": 4})
    )
    assert [line.split("=")[0] for line in found] == ["train.log_ascent_cosine", "train.momentum", "features.views"]
    assert unused_settings(recipe(train={"momentum": 0.5, "optimizer": "sgd"})) == []


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "erm"}, "erm"),
        ({"name": "sam", "rho": 0.1}, "sam (rho 0.1)"),
        ({"name": "disam"}, "disam (rho 0.05, lambda 0.1)"),
        ({"name": "disam", "variance_weight": 0}, "disam (rho 0.05, lambda 0), which with lambda 0 is sam"),
        ({"name": "disam", "rho": 0}, "disam (rho 0), which without a perturbation is erm"),
        ({"name": "disam", "rho": {"kind": "linear", "from": 0, "to": 0.1}}, "disam (rho 0 to 0.1, lambda 0.1)"),
        ({"name": "gsam"}, "gsam (rho 0.05, alpha 0.4)"),
        (
            {"name": "disam_sagm", "variance_scale": "relative", "from": 0.5, "every": 3},
            "disam_sagm (rho 0.05, relative lambda 0.1, alpha 0.001, from 50% of the steps on, in every 3rd step)",
        ),
        (
            {"name": "disam_gsam", "variance_weight": 0, "alpha": 0},
            "disam_gsam (rho 0.05, lambda 0, alpha 0), which with lambda 0 is gsam",
        ),
        (
            {"rho": {"kind": "follow_lr", "max": 0.1}, "variance_form": "entropic", "every": 12},
            "disam (rho 0 to 0.1 with the learning rate, tau 0.1, in every 12th step)",
        ),
        ({"name": "sam", "rho_factors": {"*lora_A*": 0.5}}, "sam (rho 0.05, 0.5 rho for *lora_A*)"),
        ({"name": "sam", "rho": {"kind": "constant", "value": 0.2, "warmup_steps": 9}}, "sam (rho 0.2)"),
    ],
)
def test_a_method_in_words_says_which_other_method_it_is(method, words):
    assert method_in_words(MethodConfig.model_validate(method)) == words
