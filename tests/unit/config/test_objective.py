"""The objective in a recipe: defaults, and mistakes in words."""

import pytest

from disam_peft.config.losses import CrossEntropyConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import VRexConfig
from disam_peft.config.recipe import as_dict, load_recipe, save_recipe
from disam_peft.errors import UserError

RECIPE = """
name: objective
backbone: {name: ViT-B-16, pretrained: openai}
adapter: {kind: lora}
data: {root: data}
protocol: {held_out: sketch}
"""


@pytest.fixture
def recipe_of(tmp_path):
    def of(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE)
        return load_recipe(path, overrides)

    return of


def test_the_default_is_the_plain_mean_of_the_cross_entropy(recipe_of):
    objective = recipe_of().objective
    assert objective == ObjectiveConfig()
    assert objective.loss == CrossEntropyConfig(label_smoothing=0.0)
    assert objective.penalties == objective.anchors == []
    assert objective.is_plain_mean


def test_a_recipe_with_everything_is_read_back(recipe_of, tmp_path):
    recipe = recipe_of(
        "objective={loss: {kind: cross_entropy, label_smoothing: 0.1}, mean_over: samples, "
        "penalties: [{kind: vrex, weight: 2, anneal: 0, in_ascent: false}], anchors: []}"
    )
    assert recipe.objective.penalties == [VRexConfig(weight=2.0, anneal=0, in_ascent=False)]
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert "mean_over" not in as_dict(recipe_of())["objective"], "what is unset stays unset"


def test_the_kind_of_the_loss_may_be_left_out(recipe_of):
    assert recipe_of("objective.loss={label_smoothing: 0.2}").objective.loss == CrossEntropyConfig(label_smoothing=0.2)
    assert recipe_of("objective.loss={}").objective == ObjectiveConfig(loss=CrossEntropyConfig())


def test_vrex_has_the_published_defaults():
    config = VRexConfig()
    assert (config.weight, config.anneal, config.in_ascent) == (10.0, 500, True)


@pytest.mark.parametrize(
    ("settings", "effective"),
    [
        ({}, "samples"),
        ({"mean_over": "domains"}, "domains"),
        ({"penalties": [VRexConfig()]}, "domains"),
        ({"penalties": [VRexConfig()], "mean_over": "samples"}, "samples"),
    ],
)
def test_the_mean_follows_the_penalty_unless_it_is_set(settings, effective):
    config = ObjectiveConfig(**settings)
    assert config.effective_mean_over == effective
    assert config.is_plain_mean == (settings == {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.loss.label_smoothing=1.0", r"objective.loss.label_smoothing: .*less than 1 \(given: 1.0\)"),
        ("objective.loss.label_smoothing=-0.1", "objective.loss.label_smoothing: .*greater than or equal to 0"),
        ("objective.loss.kind=hinge", "objective.loss.kind: (?=.*'cross_entropy')(?=.*'hinge')"),
        (
            "objective.penalties=[{kind: vrex, weight: -1}]",
            "objective.penalties.0.weight: .*or equal to 0",
        ),
        ("objective.penalties=[{kind: vrex, weight: .inf}]", "objective.penalties.0.weight: .*finite"),
        (
            "objective.penalties=[{kind: vrex, anneal: -5}]",
            "objective.penalties.0.anneal: .*or equal to 0",
        ),
        ("objective.penalties=[{kind: irmm}]", "objective.penalties.0.kind: (?=.*'vrex')(?=.*'irmm')"),
        ("objective.penalties=[{kind: vrex, wieght: 1}]", "wieght: unknown key; did you mean 'weight'"),
        ("objective.penalties=[{kind: vrex}, {kind: vrex}]", "objective.penalties: the penalty 'vrex' stands 2 times"),
        ("objective.penalties=[{}]", r"objective.penalties.0.kind: Field required \(one of .*vrex\)$"),
        (
            "objective.penalties=[{kind: vrex}, {weight: 3}]",
            r"objective.penalties.1.kind: Field required \(one of .*vrex\)$",
        ),
        ("objective.penalties={kind: vrex}", "objective.penalties: .*list"),
        ("objective.mean_over=classes", "objective.mean_over: .*'samples' or 'domains'"),
        (
            "objective.anchors=[{kind: logits}, {kind: logits}]",
            "objective.anchors: the anchor 'logits' stands 2 times; keep one",
        ),
        ("objective.anchors=[zero_shot]", "objective.anchors.0: .*zero_shot"),
        ("objective.anchors=[{kind: logit}]", "objective.anchors.0.kind: .*did you mean 'logits'"),
        ("objective.anchors=[{weight: 3}]", r"objective.anchors.0.kind: Field required \(one of .*weights\)"),
        ("objective.anchors=[{kind: weights, weight: -1}]", "objective.anchors.0.weight: .*or equal to 0"),
        ("objective.anchors=[{kind: logits, distance: l2}]", "objective.anchors.0.distance: .*'kl' or 'l1'"),
        ("objective.anchors=[{kind: logits, in_ascent: false}]", "in_ascent: unknown key"),
    ],
)
def test_mistakes_are_told(recipe_of, override, message):
    with pytest.raises(UserError, match=message):
        recipe_of(override)
