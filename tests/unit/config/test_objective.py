"""The objective in a recipe: defaults, and mistakes in words."""

import pytest

from disam_peft.config.identity import settings_hash
from disam_peft.config.losses import (
    ContrastiveConfig,
    CrossEntropyConfig,
    FocalConfig,
    MarginSoftmaxConfig,
    SigmoidConfig,
)
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


@pytest.mark.parametrize("field", ["penalties", "anchors"])
def test_short_forms_of_terms_are_those_of_their_full_form(recipe_of, tmp_path, field):
    one, other = {"penalties": ("coral", "vrex"), "anchors": ("logits", "weights")}[field]
    full = recipe_of(f"objective.{field}=[{{kind: {one}}}]")
    for short in (one, f"[{one}]", f"{{kind: {one}}}"):
        recipe = recipe_of(f"objective.{field}={short}")
        assert recipe == full and settings_hash(recipe) == settings_hash(full)
        save_recipe(recipe, tmp_path / "short.yaml")
        save_recipe(full, tmp_path / "full.yaml")
        assert (tmp_path / "short.yaml").read_text() == (tmp_path / "full.yaml").read_text()
    both = recipe_of(f"objective.{field}=[{one}, {{kind: {other}, weight: 3}}]")
    assert [(term.kind, term.weight) for term in getattr(both.objective, field)] == [
        (one, getattr(full.objective, field)[0].weight),
        (other, 3.0),
    ]
    with pytest.raises(UserError, match=f"objective.{field}"):
        recipe_of(f"objective.{field}=quux")
    with pytest.raises(UserError, match=f"{one!r} stands 2 times"):
        recipe_of(f"objective.{field}=[{one}, {one}]")


def test_the_kind_of_the_loss_may_be_left_out(recipe_of):
    assert recipe_of("objective.loss={label_smoothing: 0.2}").objective.loss == CrossEntropyConfig(label_smoothing=0.2)
    assert recipe_of("objective.loss={}").objective == ObjectiveConfig(loss=CrossEntropyConfig())


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        ("focal", FocalConfig(gamma=2.0)),
        ("{kind: margin_softmax}", MarginSoftmaxConfig(margin=0.3)),
        ("{kind: sigmoid, bias: -10}", SigmoidConfig(bias=-10.0)),
        ('{class_weights: {dog: 2, "7": 0.5}}', CrossEntropyConfig(class_weights={"dog": 2.0, "7": 0.5})),
        ("{class_weights: no}", CrossEntropyConfig()),
        # what another loss has may stand there while it is off, so that the kind alone can be changed
        (
            "{kind: contrastive, label_smoothing: 0.0, class_weights: none, class_weights_beta: 0.999}",
            ContrastiveConfig(),
        ),
        ("{kind: sigmoid, label_smoothing: 0}", SigmoidConfig()),
    ],
)
def test_losses_are_read_and_written(recipe_of, tmp_path, loss, wanted):
    recipe = recipe_of(f"objective.loss={loss}")
    assert recipe.objective.loss == wanted
    assert recipe.objective.is_plain_mean == (wanted == CrossEntropyConfig())
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_settings_of_losses_are_told_apart_in_the_hash_of_a_run_and_defaults_are_not(recipe_of):
    plain = settings_hash(recipe_of())
    assert settings_hash(recipe_of("objective.loss={class_weights: none, class_weights_beta: 0.999}")) == plain
    losses = ["focal", "{kind: focal, gamma: 1}", "sigmoid", "contrastive", "{class_weights: balanced}"]
    assert len({plain, *(settings_hash(recipe_of(f"objective.loss={loss}")) for loss in losses)}) == 6


@pytest.mark.parametrize("kind", ["margin_softmax", "contrastive"])
def test_a_loss_of_class_features_does_not_train_a_head(recipe_of, kind):
    with pytest.raises(UserError, match=f"objective.loss.kind={kind} compares.*adapter.kind=linear_probe has a head"):
        recipe_of(f"objective.loss={kind}", "adapter={kind: linear_probe}")
    recipe_of("objective.loss=focal", "adapter={kind: linear_probe}")


def test_mixed_images_have_no_captions(recipe_of):
    with pytest.raises(UserError, match="the contrastive loss compares each image with one caption"):
        recipe_of("objective.loss=contrastive", "augment.mixup={}")
    recipe_of("objective.loss=margin_softmax", "augment.mixup={}")


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
        ("objective.loss={kind: focal, gamma: -1}", "objective.loss.gamma: .*greater than or equal to 0"),
        (
            "objective.loss={kind: sigmoid, label_smoothing: 0.1}",
            r"objective.loss: label_smoothing=0.1 has no meaning with kind: sigmoid \(each class is a yes or a no",
        ),
        (
            "objective.loss={kind: contrastive, class_weights: balanced}",
            "objective.loss: class_weights='balanced' has no meaning with kind: contrastive",
        ),
        ("objective.loss.class_weights=balancd", "objective.loss.class_weights: .*did you mean 'balanced'"),
        ("objective.loss.class_weights={dog: -1}", "objective.loss.class_weights.dog: .*greater than or equal to 0"),
        (
            "objective.loss.class_weights={7: 2}",
            "objective.loss.class_weights: the name 7 is no text; put it",
        ),
        ("objective.loss.class_weights={}", "objective.loss.class_weights: no class is named"),
        ("objective.loss.class_weights_beta=1", "objective.loss.class_weights_beta: .*less than 1"),
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
        ("objective.penalties=3", "objective.penalties: .*list"),
        ("objective.mean_over=classes", "objective.mean_over: .*'samples' or 'domains'"),
        (
            "objective.anchors=[{kind: logits}, {kind: logits}]",
            "objective.anchors: the anchor 'logits' stands 2 times; keep one",
        ),
        ("objective.anchors=[zero_shot]", "objective.anchors.0.kind: 'zero_shot' is none of"),
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
