"""Runs are pooled where they are equal but for their seed; everything else has a line of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from matplotlib.container import BarContainer

from disam_peft.common.finished import Finished, write_finished
from disam_peft.common.records import append_event, read_results, write_results
from disam_peft.config.evaluation import SharpnessConfig
from disam_peft.config.recipe import load_recipe, save_recipe
from disam_peft.errors import UserError
from disam_peft.report.configurations import configuration_titles, configurations, data_titles, telling_apart
from disam_peft.report.figures import accuracy_bars, configuration_dots, domain_curves
from disam_peft.report.groups import SHOWN, group_runs
from disam_peft.report.held_out_tables import best_by_source_validation, held_out_tables
from disam_peft.report.result_tables import markdown_text
from disam_peft.report.run_measures import run_measures
from disam_peft.report.runs import read_runs
from tests.helpers.synthetic_runs import images, write_many, write_run


def tables_of(folder):
    return held_out_tables(configurations(read_runs([folder])))


def test_runs_that_differ_in_a_setting_are_never_merged(tmp_path):
    """Same seed, method, backbone, adapter and domain: the later one took the place of the earlier."""
    for rank, value in ((4, 0.5), (16, 0.75)):
        adapter = {"kind": "lora", "rank": rank}
        write_run(tmp_path / f"rank{rank}/sketch", value=value, recorded=images(), adapter=adapter)
    [table] = tables_of(tmp_path)
    assert (table.corner, *table.titles) == ("method", "rank", "sketch")
    assert table.texts() == [
        ("zero-shot", ["", "25.0"]),
        ("DISAM", ["4", "50.0"]),
        ("DISAM", ["16", "75.0"]),
    ]
    assert "| DISAM | 16 | 75.0 |" in table.markdown()
    assert r"DISAM & 16 & 75.0 \\" in table.latex()


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({"train": {"learning_rate": 0.5}}, "learning_rate"),
        ({"train": {"mixed_precision": "bf16"}}, "mixed_precision"),
        ({"rho": 0.5}, "rho"),
        ({"average": {"kind": "ema"}}, "average"),
        ({"objective": {"mean_over": "domains"}}, "mean_over"),
        ({"protocol": {"held_out": "sketch", "validation_fraction": 0.4}}, "validation_fraction"),
        ({"augment": {"flip": 0}}, "flip"),
        ({"prompts": {"templates": "a {}"}}, "templates"),
    ],
)
def test_every_kind_of_setting_tells_runs_apart(tmp_path, settings, title):
    write_run(tmp_path / "one/sketch", recorded=images())
    write_run(tmp_path / "two/sketch", value=0.75, recorded=images(), **settings)
    [table] = tables_of(tmp_path)
    assert title in table.label_columns or any(name.endswith(f".{title}") for name in table.label_columns)
    assert [texts[-1] for name, texts in table.texts() if name == "DISAM"].count("50.0") == 1
    assert [texts[-1] for name, texts in table.texts() if name == "DISAM"].count("75.0") == 1


def test_settings_without_effect_on_the_numbers_and_names_do_not_tell_apart(tmp_path):
    write_run(tmp_path / "one/sketch", value=0.25, recorded=images())
    other = {"train": {"workers": 2}, "evaluation": {"example_errors": 3, "sharpness": {}}, "data": {"root": "moved"}}
    write_run(tmp_path / "two/sketch", seed=1, value=0.75, recorded=images(), **other)
    [table] = tables_of(tmp_path)
    assert table.texts() == [("sketch", ["25.0", "50.0 ± 35.4"])], "two seeds of one configuration"


def test_methods_are_columns_where_nothing_else_differs(tmp_path):
    for method, value in (("erm", 0.5), ("disam", 0.75)):
        write_run(tmp_path / method / "sketch", method=method, value=value, recorded=images())
    [table] = tables_of(tmp_path)
    assert (table.titles, table.texts()) == (("zero-shot", "ERM", "DISAM"), [("sketch", ["25.0", "50.0", "75.0"])])
    write_run(tmp_path / "double/sketch", method="erm", value=0.6, recorded=images(), train={"steps": 400})
    [table] = tables_of(tmp_path)
    assert [(name, texts[0]) for name, texts in table.texts()][1:] == [
        ("ERM", "400"),
        ("ERM", "1000"),
        ("DISAM", "1000"),
    ]
    assert table.titles == ("steps", "sketch"), "how often it validates follows from the steps"


def test_runs_on_other_data_have_a_table_and_zero_shot_rows_of_their_own(tmp_path):
    write_run(tmp_path / "a/sketch", value=0.5, zero_shot=0.1, recorded=images("a"))
    write_run(tmp_path / "b/sketch", value=0.75, zero_shot=0.2, recorded=images("b"))
    first, second = tables_of(tmp_path)
    assert first.texts() == [("sketch", ["10.0", "50.0"])]
    assert second.texts() == [("sketch", ["20.0", "75.0"])]
    assert first.title != second.title
    assert all("images (8 images, sha256 " in table.title for table in (first, second))


@pytest.mark.slow
def test_runs_on_other_data_have_figures_of_their_own(tmp_path):
    write_run(tmp_path / "a/sketch", recorded=images("a"))
    write_run(tmp_path / "b/sketch", recorded=images("b"))
    groups = group_runs(read_runs([tmp_path]))
    assert [group.held_out for group in groups] == ["sketch", "sketch"]
    assert len({group.about for group in groups}) == 2


def test_data_are_called_by_their_source_where_that_tells_them_apart(tmp_path):
    write_run(tmp_path / "a/sketch", recorded=images("a"))
    folder = write_run(tmp_path / "b/sketch", recorded=images("b"))
    text = (folder / "recipe.yaml").read_text().replace("root: images", "root: other/pacs.zip")
    (folder / "recipe.yaml").write_text(text)
    found = configurations(read_runs([tmp_path]))
    assert sorted(data_titles(found).values()) == ["images", "pacs.zip"]


def test_runs_of_an_older_version_are_told_from_others_by_what_their_recipe_says(tmp_path):
    write_run(tmp_path / "old/sketch", value=0.5)
    write_run(tmp_path / "old1/sketch", seed=1, value=0.7)
    write_run(tmp_path / "new/sketch", seed=2, value=0.9, recorded=images())
    tables = {table.title: table.texts() for table in tables_of(tmp_path)}
    [old] = [texts for title, texts in tables.items() if "content not recorded" in title]
    assert old == [("sketch", ["25.0", "60.0 ± 14.1"])]
    assert len(tables) == 2


def test_zero_shot_rows_belong_to_their_prompts(tmp_path):
    for number, (template, zero_shot) in enumerate((("a {}", 0.1), ("the {}", 0.3))):
        for seed in (0, 1):
            folder = tmp_path / f"{number}{seed}/sketch"
            prompts = {"templates": template}
            write_run(folder, seed=seed, value=0.5, zero_shot=zero_shot, recorded=images(), prompts=prompts)
    [table] = tables_of(tmp_path)
    assert table.titles == ("templates", "seeds", "sketch")
    assert [line for line in table.texts() if line[0] == "zero-shot"] == [
        ("zero-shot", ["a {}", "1", "10.0"]),
        ("zero-shot", ["the {}", "1", "30.0"]),
    ]
    assert [line for line in table.texts() if line[0] == "DISAM"] == [
        ("DISAM", ["a {}", "2", "50.0 ± 0.0"]),
        ("DISAM", ["the {}", "2", "50.0 ± 0.0"]),
    ]


def test_a_copy_of_a_run_counts_once_and_other_numbers_of_the_same_settings_are_shown(tmp_path):
    folder = write_run(tmp_path / "a/sketch", value=0.5, recorded=images())
    shutil.copytree(folder, tmp_path / "copy/sketch")
    [table] = tables_of(tmp_path)
    assert table.texts() == [("sketch", ["25.0", "50.0"])]
    write_run(tmp_path / "b/sketch", value=0.75, recorded=images())
    [table] = tables_of(tmp_path)
    assert table.titles[0] == "folder"
    assert [texts for name, texts in table.texts() if name == "DISAM"] == [["a", "50.0"], ["b", "75.0"]]


def test_runs_with_other_weights_of_one_name_are_never_pooled(tmp_path):
    """A folder of weights may hold others by now; runs of an older version, which did not record them, stand apart."""
    for seed, backbone in enumerate(("a" * 64, "a" * 64, "b" * 64, "")):
        write_finished(write_run(tmp_path / f"s{seed}" / "sketch", seed=seed), Finished(backbone=backbone))
    runs = read_runs([tmp_path])
    found = configurations(runs)
    assert [[run.trained.seed for run in one.runs] for one in found] == [[0, 1], [2], [3]]
    assert telling_apart(found) == ["backbone.identity"] and len({one.zero_shot_key for one in found}) == 3
    assert len(configurations([runs[0], runs[1], runs[3]])) == 1, "as before, where nothing says that there are others"


def test_runs_of_other_given_parts_are_never_pooled(tmp_path):
    """The same images, of which others validate: that is no other seed. A share that the seed draws is one."""
    given = [("validation", *[""] * 7), ("validation", *[""] * 7), ("", "validation", *[""] * 6), None, None]
    for seed, parts in enumerate(given):
        drawn = "validation" if seed == 4 else "training"
        write_run(tmp_path / f"s{seed}/sketch", seed=seed, recorded=replace(images(part=drawn), given=parts))
    found = configurations(read_runs([tmp_path]))
    assert [[run.trained.seed for run in one.runs] for one in found] == [[0, 1], [2], [3, 4]]
    assert len(set(data_titles(found).values())) == 3


def test_runs_of_other_numbers_in_folders_of_the_same_name_are_told_apart_by_more_of_their_path(tmp_path):
    for place, value in (("two/A/x", 0.5), ("two/B/x", 0.75)):
        for held_out in ("sketch", "art"):
            write_run(tmp_path / place / held_out, held_out=held_out, value=value, recorded=images())
    shutil.copytree(tmp_path / "two/B/x", tmp_path / "two/C/x")  # a copy of the second counts once as well
    [table] = tables_of(tmp_path)
    found = [texts[:2] for name, texts in table.texts() if name == "DISAM"]
    assert found == [["A/x", "50.0"], ["B/x", "75.0"]]


def test_runs_of_other_numbers_side_by_side_in_one_folder_are_both_shown(tmp_path):
    write_run(tmp_path / "x/sketch", value=0.5, recorded=images())
    write_run(tmp_path / "x/again", value=0.75, recorded=images())
    [table] = tables_of(tmp_path)
    found = [(texts[0].rpartition("/")[2], texts[1]) for name, texts in table.texts() if name == "DISAM"]
    assert sorted(found) == [("again", "75.0"), ("sketch", "50.0")]


def test_what_was_not_run_is_missing_in_tables_and_figures(tmp_path):
    for held_out in ("sketch", "art"):
        write_run(tmp_path / "erm" / held_out, method="erm", held_out=held_out, value=0.5, recorded=images())
    write_run(tmp_path / "disam/sketch", value=0.75, recorded=images())
    [table] = tables_of(tmp_path)
    assert dict(table.texts()) == {
        "art": ["25.0", "50.0", "n/a"],
        "sketch": ["25.0", "50.0", "75.0"],
        "mean": ["25.0", "50.0", "n/a"],
    }
    [axes] = accuracy_bars(table, 7.0).axes
    heights = sorted(bar.get_height() for bars in axes.containers if isinstance(bars, BarContainer) for bar in bars)
    assert heights == [25.0, 25.0, 25.0, 50.0, 50.0, 50.0, 75.0], "no bar of height 0"
    write_run(tmp_path / "more/sketch", value=0.8, recorded=images(), train={"steps": 400})
    [table] = tables_of(tmp_path)
    assert [texts[-2:] for name, texts in table.texts() if name == "DISAM"] == [["80.0", "n/a"], ["75.0", "n/a"]]
    [axes] = configuration_dots(table, 7.0).axes
    shown = sorted(float(x) for line in axes.lines for x in line.get_xdata())
    assert shown == pytest.approx([25, 25, 25, 50, 50, 50, 75, 80]), "no dot for what was not run"


def test_runs_on_all_domains_have_a_table_of_the_domains(tmp_path):
    folder = write_run(tmp_path / "a/all_domains", value=0.5, recorded=images())
    rows = json.loads((folder / "results.json").read_text())
    for row in rows:
        row["held_out"] = None
        if row["pooled"] is None:
            row["split"], row["domain"] = "source_validation", "photo"
    (folder / "results.json").write_text(json.dumps(rows))
    [table] = tables_of(tmp_path)
    assert table.title == "lora on demo: accuracy (%) on all domains"
    assert table.texts() == [("zero-shot", ["25.0"]), ("DISAM", ["50.0"])]


def test_titles_of_configurations_name_what_tells_them_apart(tmp_path):
    write_run(tmp_path / "erm/sketch", method="erm", recorded=images())
    for rho in (0.1, 0.5):
        write_run(tmp_path / f"sam{rho}/sketch", value=rho, recorded=images(), method="sam", rho=rho)
    found = configurations(read_runs([tmp_path]))
    assert sorted(configuration_titles(found)) == ["ERM", "SAM (rho=0.1)", "SAM (rho=0.5)"]
    assert telling_apart(found) == ["method.rho"]


SCHEDULES = {
    "0.05": {},
    "linear(from=0.1, to=0.02)": {"rho": {"kind": "linear", "from": 0.1, "to": 0.02}},
    "linear(from=0.1, to=0.02, until=9)": {"rho": {"kind": "linear", "from": 0.1, "to": 0.02, "until": 9}},
    "cosine(from=0.1, to=0.02)": {"rho": {"kind": "cosine", "from": 0.1, "to": 0.02}},
    "follow_lr(max=0.1, min=0.02)": {"rho": {"kind": "follow_lr", "max": 0.1, "min": 0.02}},
    "constant(value=0.05, warmup_steps=9, warmup_from=0)": {
        "rho": {"kind": "constant", "value": 0.05, "warmup_steps": 9}
    },
}


def test_runs_with_other_schedules_are_never_pooled_and_have_one_column_for_them(tmp_path):
    for number, schedule in enumerate(SCHEDULES.values()):
        method = {"name": "disam_gsam", **schedule}
        write_run(tmp_path / f"{number}/sketch", method="disam_gsam", value=number / 10, recorded=images())
        rewrite_method(tmp_path / f"{number}/sketch", method)
    [table] = tables_of(tmp_path)
    assert table.titles == ("rho", "sketch")
    found = {texts[0]: texts[1] for name, texts in table.texts() if name == "DISAM + GSAM"}
    assert found == {title: f"{10.0 * number:.1f}" for number, title in enumerate(SCHEDULES)}


@pytest.mark.parametrize(
    ("settings", "title", "texts"),
    [
        ({"alpha": 0.1}, "alpha", {"0.4", "0.1"}),
        ({"from": 0.5}, "from", {"0", "0.5"}),
        ({"every": 2}, "every", {"1", "2"}),
        ({"rho_factors": {"*lora_A*": 0.5, "visual.*": 0}}, "rho_factors", {"-", "*lora_A*=0.5, visual.*=0"}),
        ({"variance_scale": "relative"}, "variance_scale", {"absolute", "relative"}),
        ({"variance_form": "entropic"}, "variance_form", {"variance", "entropic"}),
        ({"variance_weight": {"from": 0.1, "to": 0.7}}, "variance_weight", {"0.1", "linear(from=0.1, to=0.7)"}),
    ],
)
def test_every_setting_of_a_method_tells_runs_apart_in_one_column(tmp_path, settings, title, texts):
    for number, method in enumerate(({}, settings)):
        folder = write_run(tmp_path / f"{number}/sketch", method="disam_gsam", value=number / 4, recorded=images())
        rewrite_method(folder, {"name": "disam_gsam", **method})
    found = configurations(read_runs([tmp_path]))
    assert telling_apart(found) == [f"method.{title}"] and len(found) == 2
    assert set(configuration_titles(found)) == {f"DISAM + GSAM ({title}={text})" for text in texts}
    [table] = tables_of(tmp_path)
    assert table.titles == (title, "sketch")
    assert {cells[0] for name, cells in table.texts() if name == "DISAM + GSAM"} == texts


def rewrite_method(folder, method):
    recipe = load_recipe(folder / "recipe.yaml", [f"method={json.dumps(method)}"])
    save_recipe(recipe, folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("results.json", lambda rows: rows[:4], "has no row of a trained adapter"),
        (
            "results.json",
            lambda rows: [{**row, "method": "magic"} for row in rows],
            "method 'magic' is none of",
        ),
        (
            "confusion.json",
            lambda found: [{**found[0], "counts": [[0, 1]]}],
            r"\[0, 1\] is not \[true, predicted,",
        ),
        ("confusion.json", lambda found: [{**found[0], "counts": [[0, 4, 1]]}], "of 4 classes"),
    ],
)
def test_records_that_cannot_be_are_errors_that_name_the_file(tmp_path, file, change, message):
    folder = write_run(tmp_path / "a/sketch", recorded=images(), details=True)
    path = folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=f"{file}.*{message}"):
        [run] = read_runs([tmp_path])
        assert run.rows and run.confusions


def test_a_step_without_losses_of_domains_is_left_out_of_the_curves(tmp_path):
    folder = write_run(tmp_path / "a/sketch", recorded=images())
    append_event(folder / "metrics.jsonl", "step", step=20, loss=0.5)
    [run] = read_runs([tmp_path])
    axes, *_ = domain_curves([("DISAM", run)], "domain_loss", "loss", 7.0).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 10]] * 3
    assert run_measures(run)["train_loss"] is None, "the last third has none"


@pytest.mark.slow
def test_a_hundred_runs_give_a_page_one_would_show(tmp_path):
    write_many(tmp_path / "runs", 100, seeds=1)
    records = read_runs([tmp_path / "runs"])
    [table] = held_out_tables(configurations(records))
    assert len(table.lines) == 1 + 50
    assert table.titles == ("rank", "learning_rate", "art", "sketch", "mean")
    [axes] = configuration_dots(table, 7.0).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["zero-shot", "ERM", "SAM", "DISAM"]
    groups = group_runs(records)
    assert [group.held_out for group in groups] == ["art", "sketch"]
    for group in groups:
        assert len(group.errors) == SHOWN
        assert group.selected.startswith("6 of 50 configurations are shown")


def test_what_is_shown_of_many_is_chosen_by_the_sources_alone(tmp_path):
    """The highest accuracies on source validation, as many of each method; never by the held-out domain."""
    for place in range(4):
        for method in ("erm", "sam"):
            write_run(
                tmp_path / f"{method}{place}/sketch",
                method=method,
                value=place / 10,
                recorded=images(),
                train={"steps": 100 + place},
            )
    found = configurations(read_runs([tmp_path]))
    chosen = best_by_source_validation(found, 3)
    assert sorted((one.method, one.settings["train.steps"]) for one in chosen) == [
        ("erm", 102),
        ("erm", 103),
        ("sam", 103),
    ]


def test_names_make_no_links_and_no_pictures_in_markdown():
    assert markdown_text("![x](http://a/b.png) `c` *d* a|b \\") == r"!\[x\](http://a/b.png) \`c\` \*d\* a\|b \\"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("ascent_steps", 3), ("seed", 5), ("hessian_iterations", 9), ("hessian_tolerance", 0.1), ("gradient_group", 4)],
)
def test_sharpness_that_was_measured_with_other_settings_is_not_pooled(tmp_path, key, value):
    measured = [{}, {}, {key: value}, {"slice_points": 3}]  # the plane of losses is in no table
    for seed, settings in enumerate(measured):
        evaluation = {"sharpness": settings}
        folder = write_run(tmp_path / f"{seed}/sketch", seed=seed, recorded=images(), evaluation=evaluation)
        like = next(row for row in read_results(folder / "results.json") if row.method == "disam")
        row = replace(like, split="held_out", metric="hessian_max", value=float(seed), n=8, pooled=None)
        write_results(folder / "sharpness.json", [row])
    [group] = group_runs(read_runs([tmp_path]))
    default = getattr(SharpnessConfig(), key)
    assert group.sharpness.columns == tuple(f"DISAM, measured with {key}={told}" for told in (default, value))
    [(_, cells)] = group.sharpness.lines
    assert [cell.mean for cell in cells] == pytest.approx([4 / 3, 2.0]), "seeds 0, 1 and 3; and seed 2 alone"
