"""Study files: what they become, and all of their mistakes at once."""

import shutil
from itertools import pairwise

import pytest

from disam_peft.config.adapters import ADAPTER_KINDS
from disam_peft.config.shapes import DOMAINS
from disam_peft.errors import UserError
from disam_peft.experiments.study import load_plan
from disam_peft.report.run_measures import ON_HELD_OUT
from tests.helpers.paths import RECIPES

RECIPE = """
recipe:
  backbone: {name: demo}
  adapter: {kind: lora, rank: 4}
  data: {shapes: {images_per_class: 5}}
  protocol: {held_out: sketch}
  train: {steps: 30, warmup_steps: 3, validate_every: 10}
"""


def plan(tmp_path, text=RECIPE, overrides=(), **options):
    path = tmp_path / "my_study.yaml"
    path.write_text(text)
    return load_plan(path, overrides, output=tmp_path / "out", **options)


def test_cells_cross_conditions_arms_domains_and_seeds(tmp_path):
    text = RECIPE + (
        "arms: {erm: , weak: {method.name: disam, method.variance_weight: 0.1}, disam: {method.variance_weight: 1}}\n"
        'conditions: {"1:1": {}, "1:4": {data.shapes.per_domain: {photo: 20}}}\n'
        "held_out: [sketch, painting]\nseeds: [3, 5]\n"
    )
    found = plan(tmp_path, text)
    assert len(found.cells) == len({cell.folder for cell in found.cells}) == 2 * 3 * 2 * 2
    cell = next(c for c in found.cells if (c.condition, c.arm, c.held_out, c.seed) == ("1:4", "weak", "painting", 5))
    assert cell.folder == tmp_path / "out/runs/1-4/weak/seed5/painting"
    assert cell.recipe.seed == cell.recipe.data.shapes.seed == 5, "every seed has images of its own"
    assert cell.recipe.data.shapes.per_domain == {"photo": 20}
    assert (cell.recipe.method.name, cell.recipe.method.variance_weight) == ("disam", 0.1)
    assert cell.recipe.protocol.held_out == "painting"
    assert found.pairs == [("weak", "erm"), ("disam", "erm")]
    assert found.fresh_data
    shared = [cell.shared for cell in found.cells]
    assert sum(a != b for a, b in pairwise(shared)) == 2 * 2 * 2 - 1, "equal data come together"


def test_erm_at_twice_the_steps_stretches_the_schedule(tmp_path):
    found = plan(tmp_path, seeds=1)
    assert list(found.arms) == ["erm", "erm_2x", "sam", "disam"]
    train = {cell.arm: cell.recipe.train for cell in found.cells}
    assert (train["erm_2x"].steps, train["erm_2x"].warmup_steps, train["erm_2x"].validate_every) == (60, 6, 20)
    assert (train["disam"].steps, train["disam"].warmup_steps) == (30, 3)
    assert {cell.arm: cell.recipe.method.name for cell in found.cells}["erm_2x"] == "erm"
    assert found.pairs == [
        *(("erm_2x", "erm"), ("sam", "erm"), ("disam", "erm")),
        *(("disam", "sam"), ("disam", "erm_2x")),
    ]


def test_a_method_needs_no_overrides_and_is_compared_with_what_it_is_without_domains(tmp_path):
    found = plan(tmp_path, RECIPE + "arms: [erm, gsam, sagm, disam_gsam, disam_sagm]\n", seeds=1)
    assert {cell.arm: cell.recipe.method.name for cell in found.cells} == {name: name for name in found.arms}
    assert [pair for pair in found.pairs if "erm" not in pair] == [("disam_gsam", "gsam"), ("disam_sagm", "sagm")]


def test_an_alpha_of_gsam_is_none_of_sagm(tmp_path):
    arms = "arms: [sam, gsam, sagm, disam_gsam, disam_sagm]\n"
    for own, kept in (("disam_gsam", "gsam"), ("sagm", "sagm")):
        found = plan(tmp_path, RECIPE + arms, [f"method.name={own}", "method.alpha=0.25"], seeds=1)
        alphas = {cell.arm: cell.recipe.method.effective_alpha for cell in found.cells}
        published = {"gsam": 0.4, "sagm": 0.001} | {kept: 0.25}
        assert alphas == {"sam": 0, **published, **{f"disam_{name}": alpha for name, alpha in published.items()}}


def test_faults_spare_the_held_out_domain_of_each_cell(tmp_path):
    text = RECIPE + "conditions: {clean: {}, noisy: {data.shapes.wrong_labels: 0.5}}\nheld_out: all\nseeds: 1\n"
    found = plan(tmp_path, text)
    assert {cell.held_out for cell in found.cells} == set(DOMAINS)
    targets = {(cell.condition, cell.recipe.data.shapes.target == cell.held_out) for cell in found.cells}
    assert targets == {("clean", False), ("noisy", True)}


def test_an_arm_of_overrides_is_its_own_in_every_cell(tmp_path):
    arms = "arms: {erm: , noisy: {data.shapes: {images_per_class: 5, wrong_labels: 0.2}}}\n"
    found = plan(tmp_path, RECIPE + arms + "held_out: [sketch, painting]\nseeds: 2\n")
    shapes = {(c.held_out, c.seed): c.recipe.data.shapes for c in found.cells if c.arm == "noisy"}
    assert {key: (value.target, value.seed) for key, value in shapes.items()} == {key: key for key in shapes}
    assert len(shapes) == 4


def test_erm_at_twice_the_steps_stretches_the_annealing_of_penalties(tmp_path):
    conditions = (
        "conditions: {plain: {}, default: {objective: {penalties: [{kind: vrex}]}}, mistaken: {objective: 3},\n"
        "  set: {objective.penalties: [{kind: vrex, weight: 3, anneal: 7}], objective.mean_over: samples}}\n"
    )
    with pytest.raises(UserError, match="objective: Input should be keys and values"):
        plan(tmp_path, RECIPE + conditions, seeds=1)
    found = plan(tmp_path, RECIPE + conditions.replace(" mistaken: {objective: 3},", ""), seeds=1)
    objectives = {(cell.condition, cell.arm): cell.recipe.objective for cell in found.cells}
    anneals = {key: [penalty.anneal for penalty in value.penalties] for key, value in objectives.items()}
    for condition, anneal in (("plain", []), ("default", [500]), ("set", [7])):
        assert anneals[condition, "erm"] == anneals[condition, "disam"] == anneal
        assert anneals[condition, "erm_2x"] == [2 * steps for steps in anneal]
    stretched = objectives["set", "erm_2x"]
    assert (stretched.penalties[0].weight, stretched.mean_over) == (3, "samples"), "the rest stays"


def test_a_plain_recipe_and_the_options_of_the_command(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(
        "name: x\nbackbone: {name: demo}\nadapter: {kind: lora, rank: 2}\ndata: {shapes: {seed: 9}}\n"
        "protocol: {held_out: photo}\n"
    )
    found = load_plan(path, ["train.steps=8"], output=tmp_path, seeds=2, held_out=["sketch"], adapters=["lora", "coop"])
    assert list(found.conditions) == ["lora", "coop"]
    assert {(cell.condition, cell.recipe.adapter.kind) for cell in found.cells} == {("lora", "lora"), ("coop", "coop")}
    assert {cell.recipe.adapter.rank for cell in found.cells if cell.condition == "lora"} == {2}, "its own is kept"
    assert {cell.recipe.train.steps for cell in found.cells} == {8, 16}
    assert {cell.held_out for cell in found.cells} == {"sketch"}
    assert {cell.seed for cell in found.cells} == {0, 1}


def test_the_data_may_stay_the_same(tmp_path):
    found = plan(tmp_path, RECIPE + "data_seed: recipe\n", ["data.shapes.seed=9"])
    assert {cell.recipe.data.shapes.seed for cell in found.cells} == {9}
    assert not found.fresh_data


def test_row_46_all_mistakes_of_a_study_at_once(tmp_path):
    text = RECIPE + (
        "arms: {erms: , sam: {method.rhoo: 1}}\nheld_out: [skech]\nmetric: top2\nbaseline: erm\n"
        "conditions: {a/b: {}, a b: {train.steps: 0}}\n"
    )
    with pytest.raises(UserError) as caught:
        plan(tmp_path, text, ["train.stepz=3"])
    message = str(caught.value)
    for part in (
        "arms.erms: has no overrides and is none of erm, erm_2x, sam, disam, gsam, sagm, disam_gsam, disam_sagm",
        "no domain 'skech'; did you mean 'sketch'?",
        "metric: no measure 'top2'",
        "no arm 'erm' to compare with",
        "conditions: two of the names a/b, a b give the same folder",
    ):
        assert part in message
    with pytest.raises(UserError) as caught:
        plan(tmp_path, RECIPE + "arms: {sam: {method.rhoo: 1}, erm: }\n", ["train.stepz=3"])
    assert "arm 'sam': method.rhoo: unknown key; did you mean 'rho' or 'rho_factors' or 'from'?" in str(caught.value)
    assert "train.stepz: unknown key" in str(caught.value)
    with pytest.raises(UserError, match="unknown key; did you mean 'conditions'"):
        plan(tmp_path, RECIPE + "condition: {}\nseeds: 3\n")
    with pytest.raises(UserError, match="conditions: the name 70 is no text; put it in quotes"):
        plan(tmp_path, RECIPE + "conditions: {1:10: {}}\n")
    with pytest.raises(UserError, match=r"'linear_prob' is none of lora, peft, .*; did you mean 'linear_probe'"):
        plan(tmp_path, adapters=["linear_prob"])


def test_every_kind_of_adapter_can_be_compared_by_its_name_alone_but_those_that_need_a_setting(tmp_path):
    by_name = [kind for kind in ADAPTER_KINDS if kind not in ("peft", "combined")]
    found = plan(tmp_path, adapters=by_name, seeds=1)
    assert {cell.condition: cell.recipe.adapter.kind for cell in found.cells} == {kind: kind for kind in by_name}
    assert {cell.recipe.adapter.rank for cell in found.cells if cell.condition == "lora"} == {4}, "the recipe's own"
    with pytest.raises(UserError, match=r"adapter\.method: Field required"):
        plan(tmp_path, adapters=["lora", "peft"], seeds=1)
    with pytest.raises(UserError, match=r"adapter\.parts: Field required"):
        plan(tmp_path, adapters=["lora", "combined"], seeds=1)


STUDIES = sorted((RECIPES / "studies").glob("[a-z]_*.yaml"))


CHOOSING = {"a_settings", "b_forms", "e_adapter_settings"}
"""Studies that choose settings, on seeds of their own."""


@pytest.mark.slow
def test_every_shipped_study_loads_and_those_that_choose_settings_share_no_seed_with_those_that_judge(tmp_path):
    assert {path.stem for path in STUDIES} > CHOOSING
    seeds = {True: set(), False: set()}
    for path in STUDIES:
        found = load_plan(path, output=tmp_path)
        assert found.question
        of = {cell.seed for cell in found.cells}
        chooses = path.stem in CHOOSING
        seeds[chooses] |= of
        assert chooses or len(of) >= 5
        judged = set(found.metrics) & set(ON_HELD_OUT)
        assert bool(judged) is not chooses, "settings are chosen by source validation alone"
        header = path.read_text().split("question:")[0]
        assert f"disam-peft compare recipes/studies/{path.name}" in header
        assert found.records == RECIPES / f"studies/records/{path.stem}.csv"
    assert not seeds[True] & seeds[False]


def test_row_47_arms_and_conditions_have_folders_of_their_own_inside_the_study(tmp_path):
    text = RECIPE + (
        'arms: {"..": {method.name: sam}, "++": {method.name: erm}, con: {method.name: disam}, disam: }\n'
        'conditions: {"": {}, "../../up": {train.steps: 40}}\nseeds: 1\nheld_out: sketch\n'
    )
    found = plan(tmp_path, text)
    runs = tmp_path / "out/runs"
    assert [cell.folder.relative_to(runs).as_posix() for cell in found.cells] == [
        *("%2E%2E/seed0/sketch", "++/seed0/sketch", "%63on/seed0/sketch", "disam/seed0/sketch"),
        *("up/%2E%2E/seed0/sketch", "up/++/seed0/sketch", "up/%63on/seed0/sketch", "up/disam/seed0/sketch"),
    ]


def test_row_47_names_of_arms_that_cannot_be_folders_are_mistakes(tmp_path):
    text = RECIPE + f"arms: {{{'x' * 300}: {{method.name: sam}}, Sam: {{method.name: sam}}, sam: }}\nseeds: 1\n"
    with pytest.raises(UserError) as caught:
        plan(tmp_path, text)
    assert "2 mistakes" in str(caught.value)
    assert "arms: the name 'xxx" in str(caught.value) and "at most 200 are possible" in str(caught.value)
    assert "arms: two of the names Sam, sam give the same folder" in str(caught.value)


def test_row_50_a_study_holds_out_domains_that_look_like_numbers(tmp_path, domains_folder):
    root = tmp_path / "data"
    for name, domain in (("0", "photo"), ("2009", "art"), ("true", "cartoon")):
        shutil.copytree(domains_folder / domain, root / name)
    text = RECIPE.replace("{shapes: {images_per_class: 5}}", f"{{root: {root}, domains: [0, 2009, true]}}")
    found = plan(tmp_path, text + "held_out: [0, true]\nseeds: 1\narms: [sam, disam]\n")
    assert [cell.held_out for cell in found.cells] == ["0", "0", "true", "true"]
    assert found.cells[0].recipe.data.domains == ["0", "2009", "true"]
    found = plan(tmp_path, text.replace("held_out: sketch", "held_out: 2009") + "seeds: 1\n", ["train.steps=40"])
    assert {cell.held_out for cell in found.cells} == {"2009"}
