"""What may be given anew where the adapter of a finished run is evaluated again."""

from pathlib import Path

import pytest

from disam_peft.config.evaluation_overrides import recipe_for_evaluation
from disam_peft.config.recipe import Recipe, save_recipe
from disam_peft.errors import UserError


@pytest.fixture
def recorded(tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "try",
            "backbone": {"name": "demo"},
            "adapter": {"kind": "lora"},
            "data": {"root": "images"},
            "protocol": {"held_out": "sketch"},
        }
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    "override",
    [
        "backbone.name=ViT-L-14",
        "backbone.pretrained=openai",
        "backbone={name: demo}",
        "prompts.templates=a sketch of a {}.",
        "adapter.rank=64",
        "adapter={kind: coop}",
        "method.name=sam",
        "seed=7",
        "seed=0",
        "protocol.held_out=photo",
        "protocol.validation_fraction=0.5",
        "protocol={kind: all}",
        "name=other",
        "output=elsewhere",
        "domains.infer=kmeans",
        "augment.flip=0",
        "objective.mean_over=domains",
        "average={kind: ema}",
        "selection.metric=nll",
        "features.views=2",
        "train.steps=5",
        "train={mixed_precision: bf16}",
    ],
)
def test_row_51_what_made_the_adapter_is_refused_with_the_list_of_what_may_change(recorded, override):
    with pytest.raises(UserError) as caught:
        recipe_for_evaluation(recorded, ["evaluation.batch_size=3", override])
    message = str(caught.value)
    assert message.startswith(f"{override.partition('=')[0]}: not for evaluate")
    assert "data.*, evaluation.*, features.store, features.folder, train.mixed_precision" in message


def test_row_51_all_that_is_refused_is_named_at_once(recorded):
    with pytest.raises(UserError, match=r"^seed, method\.name: not for evaluate"):
        recipe_for_evaluation(recorded, ["seed=1", "data.root=other", "method.name=sam", "seed=2"])


def test_data_evaluation_and_precision_may_change(recorded):
    recipe = recipe_for_evaluation(
        recorded,
        [
            "data.root=other",
            "evaluation={batch_size: 3}",
            "features.store=true",
            "features.folder=stores",
            "train.mixed_precision=bf16",
            "train.timeout_minutes=3",
        ],
    )
    assert recipe.data.root == Path("other") and recipe.evaluation.batch_size == 3
    assert recipe.train.mixed_precision == "bf16" and recipe.features.store
    with pytest.raises(UserError, match=r"data\.rot: unknown key; did you mean 'root'"):
        recipe_for_evaluation(recorded, ["data.rot=other"])
