"""The recipes of the paper's tables: they load, no copy drifts, and headers have the published scores."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import yaml

from disam_peft.config.identity import flat
from disam_peft.config.recipe import as_dict, load_recipe
from disam_peft.experiments.study import load_plan
from tests.helpers.paths import RECIPES

PAPER = RECIPES / "paper"
TITLES = {
    "pacs": "PACS",
    "vlcs": "VLCS",
    "officehome": "OfficeHome",
    "terraincognita": "TerraIncognita",
    "domainnet": "DomainNet",
}
FAMILIES = {"coop": "CoOp", "full": "ERM", "clipood": "CLIPOOD"}
METHODS = {"erm": "", "sam": " + SAM", "disam": " + DISAM"}
ROWS = {f"{family}_{method}": FAMILIES[family] + METHODS[method] for family in FAMILIES for method in METHODS}

# What differs between data sets: 12 images of each source domain, and what CLIPood's and SAGM's code have for each.
BATCH = {"domainnet": 60}
LEARNING_RATE = {"officehome": 1e-5, "domainnet": 1e-5}
STEPS = {"domainnet": 10000}
ALPHA = {"officehome": 0.0005, "domainnet": 0.0005}


@cache
def settings(data_set: str, name: str) -> dict[str, Any]:
    return flat(as_dict(load_recipe(PAPER / data_set / f"{name}.yaml")))


def header(data_set: str, name: str) -> str:
    lines = (PAPER / data_set / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


@cache
def published() -> dict[str, dict[str, str]]:
    """Row -> data set, or ``average`` -> the score as README has it."""
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith("| ")]
    [start] = [i for i, cells in enumerate(lines) if cells[0] == "row"]
    columns = [*TITLES, "average"]
    assert lines[start][1:] == [*TITLES.values(), "average"]
    rows = lines[start + 1 : start + 9]
    return {row: dict(zip(columns, cells, strict=True)) for row, *cells in rows}


def others(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Settings in which two recipes differ."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_every_data_set_has_the_same_recipes_and_studies():
    files = {folder.name: {path.name for path in folder.iterdir()} for folder in PAPER.iterdir() if folder.is_dir()}
    expected = {f"{name}.yaml" for name in (*ROWS, "lora", "table1", "table2")}
    assert files == dict.fromkeys(TITLES, expected)


@pytest.mark.parametrize("name", [*ROWS, "lora"])
def test_a_row_differs_between_data_sets_only_in_what_belongs_to_the_data_set(name):
    pacs = settings("pacs", name)
    tuned = name.startswith(("full", "clipood"))
    for data_set in TITLES:
        here = settings(data_set, name)
        expected = pacs | {
            "name": str(pacs["name"]).replace("pacs", data_set),
            "data.root": here["data.root"],
            "train.batch_size": BATCH.get(data_set, 36),
        }
        if tuned:
            expected["train.steps"] = STEPS.get(data_set, 5000)
            expected["train.learning_rate"] = LEARNING_RATE.get(data_set, 5e-6)
        assert here == expected
    assert len({settings(data_set, name)["data.root"] for data_set in TITLES}) == len(TITLES)


@pytest.mark.parametrize("data_set", TITLES)
def test_rows_of_a_data_set_differ_only_in_what_they_are_about(data_set):
    erm = settings(data_set, "full_erm")
    for name in ROWS:
        family, method = name.split("_")
        here, plain = settings(data_set, name), settings(data_set, f"{family}_erm")
        assert here["name"] == f"{data_set}-{family}-{method}"
        assert others(here, plain) == ({"name", "method.name"} if method != "erm" else set())
        assert here["method.name"] == method
        assert (here["method.rho"], here["method.variance_weight"]) == (0.05, 0.1)
        about = {key.split(".")[0] for key in others(plain, erm)}
        assert about == {"full": set(), "clipood": {"name", "objective", "average"}}.get(
            family, {"name", "adapter", "augment", "train"}
        )
        assert here["train.batch_size"] == erm["train.batch_size"]


def test_the_settings_of_clipood_are_those_of_its_paper():
    found = settings("pacs", "clipood_erm")
    assert (found["objective.loss.kind"], found["objective.loss.margin"]) == ("margin_softmax", 0.3)
    assert (found["average.kind"], found["average.beta"]) == ("bma", 0.5)
    assert (found["train.optimizer"], found["train.weight_decay"]) == ("adamw", 0.1)
    assert found["adapter.kind"] == "full"


@pytest.mark.parametrize("data_set", TITLES)
@pytest.mark.parametrize("name", ["table1", "table2"])
def test_studies_load_and_differ_in_the_data_set_alone(data_set, name, tmp_path):
    study = yaml.safe_load((PAPER / data_set / f"{name}.yaml").read_text(encoding="utf-8"))
    text = (PAPER / f"pacs/{name}.yaml").read_text(encoding="utf-8").replace("PACS", TITLES[data_set])
    alpha = ALPHA.get(data_set, 0.001)
    assert study == yaml.safe_load(text.replace("method.alpha: 0.001", f"method.alpha: {alpha}"))
    demo = ["backbone={name: demo}", "data.shapes={}", "protocol.held_out=photo"]
    plan = load_plan(PAPER / data_set / f"{name}.yaml", demo, output=tmp_path, seeds=1)
    cells = {cell.arm: cell.recipe for cell in plan.cells}
    if name == "table2":
        assert list(cells) == [row.replace(" ", "") for row in ROWS.values()]
        assert [cell.method.name for cell in cells.values()] == [name.split("_")[1] for name in ROWS]
        assert [cell.adapter.kind for cell in cells.values()] == 3 * ["coop"] + 6 * ["full"]
        return
    methods = {"SAM": "sam", "DISAM": "disam", "GSAM": "gsam", "GSAM+DISAM": "disam_gsam", "SAGM": "sagm"}
    sagm = dict.fromkeys(["SAGM+DISAM", "SAGM+DISAM+CORAL"], "disam_sagm")
    assert {arm: cell.method.name for arm, cell in cells.items() if cell.method.name != "erm"} == methods | sagm
    penalties = {arm: [penalty.kind for penalty in cell.objective.penalties] for arm, cell in cells.items()}
    assert {arm: kinds for arm, kinds in penalties.items() if kinds} == {
        "SAGM+DISAM+CORAL": ["coral"],
        **{arm: [arm.lower().replace("-", "")] for arm in ("V-REx", "IRM", "GroupDRO", "CORAL", "MMD", "Fishr")},
    }
    assert {arm for arm, cell in cells.items() if cell.augment.mixup is not None} == {"Mixup"}
    annealed = [p for cell in cells.values() for p in cell.objective.penalties if p.anneal >= cell.train.steps]
    assert not annealed, "every penalty reaches its weight within the run"


def test_the_table_of_published_scores_agrees_with_its_averages():
    assert set(published()) == {"zero-shot", "CoOp", "CoOp + SAM", "CoOp + DISAM", "ERM"} | {
        f"CLIPOOD{method}" for method in METHODS.values()
    }
    for row, scores in published().items():
        mean = sum(float(scores[data_set].split(" ")[0]) for data_set in TITLES) / len(TITLES)
        assert mean == pytest.approx(float(scores["average"]), abs=0.1), row


@pytest.mark.parametrize("data_set", TITLES)
def test_headers_have_the_published_scores_of_their_row_and_data_set(data_set):
    zero_shot = published()["zero-shot"][data_set]
    for name, row in ROWS.items():
        text = header(data_set, name)
        assert text.startswith(f"{row} on {TITLES[data_set]}: ")
        assert f"zero-shot {zero_shot})" in text
        if row in published():
            assert re.findall(r"Published: (.*?) \(", text) == [published()[row][data_set]]
        else:
            assert "none is published" in text and f"(ERM {published()['ERM'][data_set]}, " in text
    study = header(data_set, "table2")
    for family in FAMILIES.values():
        said = f"{family} {published()[family][data_set]}"
        if f"{family} + SAM" in published():
            said += f", + SAM {published()[f'{family} + SAM'][data_set]}"
            said += f", + DISAM {published()[f'{family} + DISAM'][data_set]}"
        assert said in study
    assert f"zero-shot {zero_shot};" in study and f"zero-shot {zero_shot} " in header(data_set, "lora")
    table1 = re.split("[;,] ", re.findall(r"data sets\): (.*?)\. Taken", header(data_set, "table1"))[0])
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    [numbers] = re.findall(r"^\| 63\.9 .*$", text, re.M)
    assert [part.split(" ")[-1] for part in table1] == numbers.strip("| ").split(" | ")


@pytest.mark.parametrize("data_set", TITLES)
def test_headers_say_which_of_two_settings_they_take(data_set):
    other = {"terraincognita": ("0.01", "0.01, 0.2")}.get(data_set, ("0.5", "0.5, 0.1"))
    for family in FAMILIES:
        assert f"rho 0.05 (section 4.5), not {other[0]} (" in header(data_set, f"{family}_sam")
        assert f"rho 0.05, lambda 0.1 (section 4.5), not {other[1]} (" in header(data_set, f"{family}_disam")
    assert f"SAGM's alpha {ALPHA.get(data_set, 0.001)}, " in header(data_set, "table1")
    for study in ("table1", "table2"):
        assert f"rho 0.05, lambda 0.1 (section 4.5), not {other[1]} (" in header(data_set, study)
    assert all("recipes/paper/README.md" in header(data_set, name) for name in (*ROWS, "lora", "table1", "table2"))


def test_readme_names_every_file():
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.yaml`" in text for name in (*ROWS, "lora", "table1", "table2"))
