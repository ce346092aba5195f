"""Recipes: strict, all mistakes at once, and what is written is what is read."""

import pytest

from disam_peft.config.average import kept_averages
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig, MixupConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.recipe import Recipe, as_dict, differences, load_recipe, save_recipe
from disam_peft.errors import UserError
from tests.helpers.paths import RECIPES

STUDIES = sorted([*RECIPES.glob("studies/?_*.yaml"), *RECIPES.rglob("table*.yaml")])
PATHS = sorted(set(RECIPES.rglob("*.yaml")) - set(STUDIES) - {RECIPES / "studies/lora.yaml"})
GOOD = """
name: try
backbone: {name: ViT-B-32, pretrained: openai}
adapter: {kind: lora, rank: 4, blocks: {last: 2}}
data: {root: data/PACS}
protocol: {held_out: sketch}
"""


def write(tmp_path, text=GOOD):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_shipped_recipe_loads():
    paths = PATHS
    assert len(paths) == len({load_recipe(path).name for path in paths}) >= 9, "names of runs must not collide"
    combinations = {(r.adapter.kind, r.method.name) for r in map(load_recipe, paths)}
    assert combinations >= {(a, m) for a in ("lora", "coop", "linear_probe") for m in ("erm", "sam", "disam")}


@pytest.mark.parametrize("path", STUDIES[:2] + STUDIES[-1:], ids=lambda path: path.stem)
def test_a_study_in_the_place_of_a_recipe_is_told_with_the_command_that_runs_it(path):
    with pytest.raises(UserError, match=r"is a study of several arms, and no recipe; run it with: disam-peft compare"):
        load_recipe(path)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_header_of_a_recipe_gives_the_command_that_runs_it(path):
    header = path.read_text().split("name:")[0]
    assert f"disam-peft train {path.relative_to(RECIPES.parent).as_posix()}" in header


def test_overrides_are_yaml_and_reach_every_depth(tmp_path):
    recipe = load_recipe(
        write(tmp_path),
        ["train.steps=7", "adapter.blocks=[0, 2]", "data.domains=[a, b]", "method.name=sam", "evaluation.batch_size=3"],
    )
    assert (recipe.train.steps, recipe.adapter.blocks, recipe.method.name) == (7, [0, 2], "sam")
    assert recipe.data.domains == ["a", "b"]
    assert recipe.evaluation.batch_size == 3
    assert load_recipe(write(tmp_path), ["backbone.pretrained=none"]).backbone.pretrained == "none"
    assert load_recipe(write(tmp_path), ["adapter={kind: coop, class_specific: true}"]).adapter == CoOpConfig(
        class_specific=True
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"'train\.steps' must look like train\.steps=200"),
        ("=3", "must look like"),
        ("train.steps=[1", "is not valid YAML"),
        ("name.first=x", r"'name\.first=x': name holds the value 'probe', not further keys"),
    ],
)
def test_a_mistake_in_an_override_alone_is_an_error(tmp_path, override, message):
    """Also where the recipe is sound without the override."""
    path = write(tmp_path)
    path.write_text(path.read_text().replace(f"name: {load_recipe(path).name}", "name: probe"))
    with pytest.raises(UserError, match=message):
        load_recipe(path, [override])


def test_row_46_all_mistakes_at_once_each_with_the_nearest_key(tmp_path):
    overrides = ["train.stepz=3", "adapter.rnk=2", "method.rho=-1", "protocol.held_ot=x", "no-equals-sign", "nme=x"]
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path), overrides)
    message = str(caught.value)
    for part in (
        "6 mistakes in recipe",
        "train.stepz: unknown key; did you mean 'steps'",
        "adapter.rnk: unknown key; did you mean 'rank'",
        "method.rho: Input should be greater than or equal to 0 (given: -1)",
        "protocol.held_ot: unknown key; did you mean 'held_out'",
        "override 'no-equals-sign' must look like train.steps=200",
        "nme: unknown key; did you mean 'name'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.kind=lorra", "adapter.*'lora', 'peft', 'coop', 'linear_probe'"),
        ("method.rho=nan", "method.rho"),
        ("method.variance_weight=-0.1", "method.variance_weight.*greater than or equal to 0"),
        ("train.gradient_accumulation_steps=33", "batch_size=32 images into more micro-batches.*use at most 32"),
        ("train.warmup_steps=1000", "warmup_steps=1000 must be less than steps=1000"),
        ("name=a/b", "name"),
        ("train=5", "train"),
        ("data.root=null", "exactly one of"),
        ("train.optimizer=adam", "'adamw' or 'sgd'"),
    ],
)
def test_row_26_values_out_of_range_name_the_key(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "message"), [("name: [", "not valid YAML"), ("- 1", "must hold keys"), ("", "must hold keys")]
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, text))
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_resolved_recipe_reads_back_equal(tmp_path, path):
    recipe = load_recipe(path, ["train.clip_norm=1.5", "data.root=some/where"])
    save_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert "steps:" in (tmp_path / "resolved.yaml").read_text()


def test_differences_name_every_changed_setting():
    base = Recipe(
        name="a",
        backbone=BackboneConfig(name="ViT-B-32"),
        adapter=LoraAdapterConfig(),
        data=DataConfig(root="x"),
        protocol=ProtocolConfig(held_out="sketch"),
    )
    changed = base.model_copy(update={"seed": 3, "adapter": LoraAdapterConfig(rank=2)})
    assert differences(as_dict(base), as_dict(base)) == []
    assert differences(as_dict(base), as_dict(changed)) == ["adapter.rank: 8 -> 2", "seed: 0 -> 3"]
    assert differences({}, {"seed": 3}) == ["seed: None -> 3"]
    assert differences({"a": {"b": 1}}, {"a": {}}) == ["a.b: 1 -> None"]


@pytest.mark.parametrize("value", ["none", "no", "off", "", "~", "{kind: null}", "{kind: no}", "{kind: none}"])
def test_no_average_and_no_tracker_in_every_spelling_of_yaml(tmp_path, value):
    recipe = load_recipe(write(tmp_path), [f"average={value}", f"train.tracker={value}"])
    assert (recipe.average.kind, recipe.train.tracker.kind) == ("none", "none")
    assert recipe == load_recipe(write(tmp_path), [])


@pytest.mark.parametrize(
    ("value", "decays"),
    [
        ("ema", [0.999]),
        ("[ema]", [0.999]),
        ("[ema, {kind: ema, decay: 0.5}, no]", [0.999, 0.5]),
        ("[]", []),
        ("[none]", []),
    ],
)
def test_an_average_may_be_a_word_and_an_empty_list_is_none(tmp_path, value, decays):
    recipe = load_recipe(write(tmp_path), [f"average={value}"])
    assert [average.decay for average in kept_averages(recipe.average)] == decays
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_swad_with_too_few_validations_is_a_mistake_that_names_the_setting(tmp_path):
    swad, steps = "average=swad", ["train.steps=100", "train.validate_every=50"]
    with pytest.raises(UserError, match=r"n_converge=3 validations, and this run has 2 .*lower train.validate_every"):
        load_recipe(write(tmp_path), [swad, *steps])
    load_recipe(write(tmp_path), ["average={kind: swad, n_converge: 2}", *steps])
    load_recipe(write(tmp_path), [swad, "train.steps=101", "train.validate_every=50"])


def test_one_average_or_several_are_written_as_they_are_read(tmp_path):
    one, several = ["average={kind: ema, decay: 0.9}"], ["average=[{kind: ema}, {kind: ema, decay: 0.5}]"]
    for number, overrides in enumerate((one, several)):
        recipe = load_recipe(write(tmp_path), overrides)
        save_recipe(recipe, tmp_path / f"{number}.yaml")
        assert load_recipe(tmp_path / f"{number}.yaml") == recipe
    assert [average.decay for average in recipe.average] == [0.999, 0.5]
    with pytest.raises(UserError, match=r"average"):
        load_recipe(write(tmp_path), ["average={kind: ema, decay: 1}"])


@pytest.mark.parametrize("kind", ["standard", "none"])
def test_mixup_stands_beside_either_augmentation_and_is_written_as_it_is_read(tmp_path, kind):
    recipe = load_recipe(write(tmp_path), [f"augment.kind={kind}", "augment.mixup={}"])
    assert recipe.augment.mixup == MixupConfig(alpha=0.2, of="images")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    plain, mixed = (load_recipe(write(tmp_path), ["name={hash}", *more]) for more in ([], ["augment.mixup={}"]))
    assert plain.name != mixed.name
    with pytest.raises(UserError, match=r"augment.mixup mixes images, but with features.store training reads none"):
        load_recipe(write(tmp_path), ["augment.mixup={}", "features.store=true"])
    with pytest.raises(UserError, match=r"mixup makes images of two classes, and the contrastive loss"):
        load_recipe(write(tmp_path), ["augment.mixup={}", "objective.loss=contrastive"])
    with pytest.raises(UserError, match=r"augment.mixup.alpha: .*greater than 0"):
        load_recipe(write(tmp_path), ["augment.mixup.alpha=0"])
