"""Methods, and rho and lambda over the steps of a run: numbers, or schedules."""

import json
import math

import numpy as np
import pytest
import torch

from disam_peft.config.identity import settings_hash
from disam_peft.config.method import PUBLISHED_ALPHA as of_recipes
from disam_peft.config.method import MethodConfig
from disam_peft.config.recipe import load_recipe, save_recipe
from disam_peft.config.schedules import following_value, in_words, value_in_step
from disam_peft.config.training import TrainConfig
from disam_peft.disam.descent import PUBLISHED_ALPHA
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.training.optimizers import learning_rate_factor
from tests.helpers import paths

REFERENCE = np.load(paths.REFERENCE / "gsam_sagm.npz")

RECIPE = """
name: try
backbone: {name: demo}
adapter: {kind: lora}
data: {root: data}
protocol: {held_out: sketch}
"""
SCHEDULE = "method.rho={kind: linear, from: 0.2, to: 0}"


@pytest.fixture
def recipe_of(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_recipe(path, overrides)


def test_a_linear_setting_takes_both_ends_and_the_middle_exactly(recipe_of):
    method = recipe_of(SCHEDULE, "method.variance_weight={kind: linear, from: 0.1, to: 0.7}").method
    assert [method.rho_in_step(step, 5) for step in (0, 2, 4)] == [0.2, 0.1, 0.0]
    assert [method.variance_weight_in_step(step, 3) for step in range(3)] == [0.1, pytest.approx(0.4), 0.7]
    assert (method.effective_rho, method.effective_variance_weight) == (0.2, 0.7)
    assert method.rho_in_step(0, 1) == 0.2, "a run of one step has only the first"
    assert value_in_step(0.3, 4, 5) == 0.3


def test_words_say_when_the_end_is_reached(recipe_of):
    """A run of 20 steps with ``until: 100`` ends near 0.12, not at 0.2."""
    method = recipe_of("method.rho={kind: linear, from: 0.1, to: 0.2, until: 100}").method
    assert in_words(method.rho) == "0.1 to 0.2 by step 101"
    assert method.rho_in_step(100, 200) == 0.2 and method.rho_in_step(19, 20) == pytest.approx(0.119)
    assert in_words(recipe_of(SCHEDULE).method.rho) == "0.2 to 0"


def test_what_a_method_does_not_use_is_zero_and_changes_nothing(recipe_of):
    erm, sam = (recipe_of(SCHEDULE, f"method.name={name}").method for name in ("erm", "sam"))
    assert (erm.rho_in_step(0, 5), erm.changes, sam.changes) == (0.0, False, True)
    assert sam.variance_weight_in_step(0, 5) == 0.0
    assert not MethodConfig().changes


def test_a_schedule_is_written_as_it_is_read(recipe_of, tmp_path):
    recipe = recipe_of(SCHEDULE)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert "from: 0.2" in (tmp_path / "saved.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rho=-1", r"method.rho: .*greater than or equal to 0"),
        ("method.rho=.nan", r"method.rho: .*(finite|greater than)"),
        ("method.rho={kind: linear, from: -1, to: 0}", r"method.rho\S*from: .*greater than or equal to 0"),
        ("method.rho={kind: linear, from: 1}", r"method.rho\S*to: Field required"),
        ("method.rho={kind: linear, form: 1, to: 0}", r"method.rho\S*form: unknown key; did you mean 'from'"),
        ("method.rho={kind: sine, from: 1, to: 0}", r"method.rho.*'linear'"),
    ],
)
def test_row_26_mistakes_are_told(recipe_of, override, message):
    with pytest.raises(UserError, match=message):
        recipe_of(override)


# -- methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "descent", "alpha", "has_variance"),
    [
        ("sam", "sam", 0.0, False),
        ("disam", "sam", 0.0, True),
        ("gsam", "gsam", 0.4, False),
        ("sagm", "sagm", 0.001, False),
        ("disam_gsam", "gsam", 0.4, True),
        ("disam_sagm", "sagm", 0.001, True),
    ],
)
def test_what_a_method_consists_of(recipe_of, name, descent, alpha, has_variance):
    method = recipe_of(f"method.name={name}").method
    assert (method.descent, method.effective_alpha) == (descent, alpha), "the published default"
    assert method.effective_rho == 0.05 and method.rho_in_step(3, 10) == 0.05
    assert method.effective_variance_weight == method.variance_weight_in_step(3, 10) == (0.1 if has_variance else 0.0)
    given = recipe_of(f"method.name={name}", "method.alpha=0.25").method
    assert given.effective_alpha == (0.25 if descent != "sam" else 0.0)
    assert recipe_of(f"method.name={name}", "method.alpha=0").method.effective_alpha == 0


def test_a_loop_of_ones_own_has_the_published_alpha_too():
    w = torch.ones(2, requires_grad=True)
    for descent, alpha in PUBLISHED_ALPHA.items():
        assert DISAM([w], descent=descent).alpha == alpha == MethodConfig(name=descent).effective_alpha
        assert DISAM([w], descent=descent, alpha=0.0).alpha == 0
    assert of_recipes == PUBLISHED_ALPHA and set(PUBLISHED_ALPHA) == {"sam", "gsam", "sagm"}


# -- schedules -----------------------------------------------------------------------------------------------


def test_a_cosine_falls_slowly_at_both_ends(recipe_of):
    method = recipe_of("method.rho={kind: cosine, from: 0.2, to: 0.1}").method
    wanted = [0.15 + 0.05 * math.cos(math.pi * step / 4) for step in range(5)]
    assert [method.rho_in_step(step, 5) for step in range(5)] == pytest.approx(wanted, rel=1e-15)
    assert method.rho_in_step(0, 1) == 0.2 and method.changes and method.effective_rho == 0.2


def test_the_schedules_are_the_authors():
    """The values of GSAM's own schedulers, of which ``until`` is T_max."""
    cases = json.loads(str(REFERENCE["meta"]))["cases"]
    settings = {
        "linear": {"kind": "linear", "from": 0.2, "to": 0.02, "until": 6},
        "cosine_warmup2": {
            "kind": "cosine", "from": 0.2, "to": 0.02, "until": 6, "warmup_steps": 2, "warmup_from": 0.06
        },
        "proportional_to_cosine_lr": {"kind": "follow_lr", "max": 0.2, "min": 0.02},
    }  # fmt: skip
    seen = []
    for name, about in cases.items():
        if about["rho_schedule"] == "constant":
            continue
        seen.append(about["rho_schedule"])
        method = MethodConfig.model_validate({"rho": settings[about["rho_schedule"]]})
        train = TrainConfig(steps=6, learning_rate=0.1, schedule="cosine")
        found = [method.rho_in_step(step, 6, learning_rate_factor(train, step)) for step in range(6)]
        assert np.abs(np.array(found) - REFERENCE[f"{name}/rho"]).max() <= 1e-15
    assert sorted(seen) == [
        "cosine_warmup2",
        "linear",
        "linear",
        "proportional_to_cosine_lr",
        "proportional_to_cosine_lr",
    ]


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("{kind: constant, value: 0.4, warmup_steps: 2}", [0.0, 0.2, 0.4, 0.4, 0.4]),
        ("{kind: linear, from: 0.4, to: 0.2, warmup_steps: 2, warmup_from: 0.1}", [0.1, 0.25, 0.4, 0.3, 0.2]),
        ("{kind: linear, from: 0.4, to: 0.2, until: 2}", [0.4, 0.3, 0.2, 0.2, 0.2]),
        ("{from: 0.4, to: 0.0}", [0.4, 0.3, 0.2, 0.1, 0.0]),
    ],
)
def test_warm_ups_and_ends(recipe_of, tmp_path, setting, values):
    recipe = recipe_of(f"method.variance_weight={setting}")
    assert [recipe.method.variance_weight_in_step(step, 5) for step in range(5)] == pytest.approx(values, abs=1e-15)
    assert recipe.method.effective_variance_weight == 0.4 and recipe.method.changes
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_a_setting_follows_the_learning_rate(recipe_of):
    method = recipe_of("method.rho={kind: follow_lr, max: 0.1, min: 0.02}").method
    assert [method.rho_in_step(3, 9, rate) for rate in (0.0, 0.5, 1.0)] == pytest.approx([0.02, 0.06, 0.1], rel=1e-15)
    assert method.rho_in_step(3, 9) == 0.1, "of a constant one it is the largest"
    assert following_value(0.3, 0.3, 0.3, 0.1, 0.02) == 0.1
    assert (method.changes, method.effective_rho) == (True, 0.1)


def test_weights_are_perturbed_in_a_part_of_the_steps_alone(recipe_of, tmp_path):
    half = recipe_of("method.from=0.5").method
    assert [half.rho_in_step(step, 5) > 0 for step in range(5)] == [False, False, False, True, True]
    third = recipe_of("method.every=3", "method.from=0.25").method
    assert [step for step in range(16) if third.rho_in_step(step, 16) > 0] == [4, 7, 10, 13]
    assert 0.07 * 100 > 7
    late = recipe_of("method.from=0.07").method
    assert [step for step in range(100) if late.rho_in_step(step, 100) == 0] == [0, 1, 2, 3, 4, 5, 6]
    assert half.changes and third.changes and not recipe_of("method.every=1").method.changes
    recipe = recipe_of("method.from=0.5", "method.every=2")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert "from: 0.5" in (tmp_path / "saved.yaml").read_text() and load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rho={kind: follow_lr, min: 0.1}", r"method.rho\S*max: Field required"),
        ("method.rho={kind: follow_lr, max: 0.01, min: 0.2}", r"method.rho\S*: min=0.2 must be at most max=0.01; swap"),
        ("method.rho={kind: follow_lr, max: 0.1, from: 1}", r"method.rho\S*from: unknown key.*known: kind, max, min"),
        ("method.rho={kind: cosine, from: 1, to: 0, until: 3, warmup_steps: 3}", "until=3 must be more than warmup_st"),
        (
            "method.rho={kind: constant, value: 1, warmup_steps: 1000}",
            r"method.rho: warmup_steps=1000 must be less .*100",
        ),
        (
            "method.variance_weight={from: 1, to: 0, warmup_steps: 5000}",
            "  method.variance_weight: warmup_steps=5000 m",
        ),
        ("method.from=1", r"method.from: Input should be less than 1"),
        ("method.every=0", r"method.every: Input should be greater than or equal to 1"),
        ("method.alpha=-1", r"method.alpha: Input should be greater than or equal to 0"),
        ("method.rho_factors={a: -1}", r"method.rho_factors.a: Input should be greater than or equal to 0"),
        ("method.name=disam_gasm", "did you mean 'disam_gsam'"),
        ("method.variance_scale=relativ", "did you mean 'relative'"),
        ("method.start=0.5", "method.start: unknown key"),
    ],
)
def test_mistakes_in_settings_of_methods_are_told(recipe_of, override, message):
    with pytest.raises(UserError, match=message):
        recipe_of(override)


def test_new_settings_leave_the_name_of_a_run_as_it_was(recipe_of):
    unset = settings_hash(recipe_of())
    assert settings_hash(recipe_of("method.from=0", "method.every=1", "method.rho_factors={}")) == unset
    others = [
        "method.alpha=0.1", "method.from=0.5", "method.every=2", "method.rho_factors={a: 2}",
        "method.variance_scale=relative", "method.variance_form=entropic", "method.name=disam_gsam",
    ]  # fmt: skip
    assert len({unset, *(settings_hash(recipe_of(other)) for other in others)}) == len(others) + 1
