"""rho and lambda over the steps of a run: numbers, or schedules."""

import pytest

from disam_peft.config.method import MethodConfig, value_in_step
from disam_peft.config.recipe import load_recipe, save_recipe
from disam_peft.errors import UserError

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
        ("method.rho={kind: cosine, from: 1, to: 0}", r"method.rho.*'linear'"),
    ],
)
def test_row_26_mistakes_are_told(recipe_of, override, message):
    with pytest.raises(UserError, match=message):
        recipe_of(override)
