"""Sharpness, maps and mistakes in the report: numbers by hand, names that bite, records that are not there."""

import base64
import io
import json
from dataclasses import replace
from typing import get_args
from xml.etree import ElementTree

import pytest
from PIL import Image

from disam_peft.cli import app as cli
from disam_peft.common.records import (
    Confusion,
    ExampleError,
    LossSlice,
    ResultRow,
    append_event,
    read_list,
    write_list,
    write_results,
)
from disam_peft.config.method import MethodConfig
from disam_peft.report.drawing import METHOD_COLOURS
from disam_peft.report.figures import _smoothed, titles
from disam_peft.report.groups import group_runs
from disam_peft.report.page import build_report
from disam_peft.report.result_tables import METHOD_TITLES
from disam_peft.report.runs import read_runs
from disam_peft.report.sharpness_tables import compare_sharpness
from tests.helpers.report_pages import Reader, rows

NASTY = "<b>$x$ & \\ _y"
PLANE = LossSlice(
    "held_out", NASTY, 8, ["gradient", "top eigenvector"], [0.05], [-0.5, 0.0, 0.5], [[2.0, 1.0, None]] * 3
)


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_run(folder, method, seed=0, *, held_out=NASTY, details=True, value=0.5):
    folder.mkdir(parents=True)
    write_results(
        folder / "results.json", rows("zero_shot", held_out, seed, 0.25) + rows(method, held_out, seed, value)
    )
    for step in (1, 2):
        values = {"domain_loss": {"_art": 1.0, "photo": None}, "domain_weight": {"_art": 0.4, "photo": 0.6}}
        append_event(folder / "metrics.jsonl", "step", step=step, loss=1.0, ascent_cosine=0.9, **values)
    if not details:
        return
    common = ("ViT-B-32", "lora", method, held_out, seed)
    measures = {"sample_loss": 1.5, "worst_loss_rho_0.05": 2.0, "sharpness_rho_0.05": 0.5 + seed, "hessian_max": 1234.0}
    write_results(
        folder / "sharpness.json",
        [
            ResultRow(*common, split, domain, metric, number, 8, pooled=pooled)
            for split, domain, pooled in (("source_validation", "pooled", "all"), ("held_out", held_out, None))
            for metric, number in {**measures, "gradient_variance": None}.items()
        ],
    )
    write_list(folder / "loss_slice.json", [PLANE])
    write_list(folder / "confusion.json", [Confusion(held_out, ["dog", NASTY], [[0, 0, 3], [0, 1, 1], [1, 1, 4]])])
    error = ExampleError(f"{NASTY}/1.png", "dog", NASTY, 0.987, png())
    write_list(folder / "errors.json", [error, replace(error, key="gone.png", png="")])


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "runs/erm/x", "erm")
    write_run(tmp_path / "runs/disam/x", "disam")
    write_run(tmp_path / "runs/old/x", "sam", details=False)
    return tmp_path / "runs"


@pytest.mark.slow
def test_every_part_is_there_whole_and_escaped(runs, tmp_path):
    build_report(read_runs([runs]), tmp_path / "report.html", figures=tmp_path / "paper")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.fetched == []
    assert not {"b", "script"} & reader.tags
    assert "&lt;b&gt;$x$ &amp; \\ _y" in page
    assert "99&nbsp;%" in page
    assert "no image" in page
    assert page.count(png()) == 2, "one thumbnail of each of two runs"
    for cell in ("rise of the loss within 0.05, held out", "0.500", "1.23e+03"):
        assert cell in reader.cells, cell
    names = {path.name for path in (tmp_path / "paper").iterdir()}
    parts = ("losses", "weights", "cosine", "loss_planes", "confusion")
    stems = {"00_accuracy_1", *(f"{stem_of(names)}_{part}" for part in parts)}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")} | {"tables.md", "tables.tex"}
    for path in (tmp_path / "paper").glob("*.svg"):
        text = "".join(ElementTree.parse(path).getroot().itertext())
        if "confusion" in path.name:
            assert NASTY in text, "a dollar sign is no formula"
            assert "DISAM: 88 % right" in text
        if "losses" in path.name:
            assert "_art" in text, "a name with an underscore is in the legend"
    assert Image.open(next((tmp_path / "paper").glob("*losses.png"))).size[0] == 1520
    markdown, latex = ((tmp_path / "paper" / name).read_text(encoding="utf-8") for name in ("tables.md", "tables.tex"))
    assert "| measure | ERM | DISAM |" in markdown
    assert "| held out | zero-shot | ERM | SAM | DISAM |" in markdown
    assert latex.count(r"\begin{tabular}") == 2


def stem_of(names):
    [stem] = {name.split("_losses")[0] for name in names if "_losses" in name}
    assert stem.startswith("01_")
    return stem


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes(runs, tmp_path):
    for name in ("one", "two"):
        build_report(read_runs([runs / "disam"]), tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    files = sorted(path.name for path in (tmp_path / "one_figures").iterdir())
    assert len(files) == 14
    for name in files:
        assert (tmp_path / "one_figures" / name).read_bytes() == (tmp_path / "two_figures" / name).read_bytes(), name


@pytest.mark.slow
def test_the_command_takes_a_folder_for_figures(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "runs/erm/x", "erm", details=False)
    words = ["report", tmp_path / "runs", "--output", tmp_path / "a.html", "--figures", tmp_path / "paper"]
    monkeypatch.setattr("sys.argv", ["disam-peft", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "paper/tables.tex").is_file()
    assert not (tmp_path / "a_figures").exists()


@pytest.mark.slow
def test_sharpness_over_seeds_by_hand(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"runs/erm-{seed}/x", "erm", seed)
    write_run(tmp_path / "runs/disam-0/x", "disam")
    [table] = compare_sharpness(row for run in read_runs([tmp_path]) for row in run.sharpness)
    assert table.columns == ("ERM", "DISAM")
    assert table.title.endswith("sharpness on 8 images of source validation, 8 images of held out")
    lines = dict(table.texts())
    assert lines["rise of the loss within 0.05, held out"] == ["1.00 ± 0.707", "0.500"]
    assert lines["loss at w, source validation"] == ["1.50 ± 0.00", "1.50"]
    assert list(lines) == [
        f"{label}, {split}"
        for label in ("loss at w", "rise of the loss within 0.05", "largest Hessian eigenvalue")
        for split in ("source validation", "held out")
    ], "what follows from others, and what is not defined, is left out"
    [group] = group_runs(read_runs([tmp_path]))
    assert group.about == "lora on ViT-B-32, figures of seed 0, the first of 2"
    assert [name for name, _ in group.errors] == ["ERM", "DISAM"]


def test_old_runs_have_curves_only(tmp_path):
    write_run(tmp_path / "runs/old/x", "sam", details=False)
    [run] = read_runs([tmp_path])
    assert (run.sharpness, run.loss_slices, run.confusions, run.errors) == ([], [], [], [])
    [group] = group_runs([run])
    assert (group.sharpness, group.planes, group.confusion, group.errors) == (None, None, None, [])
    assert group.losses is not None


@pytest.mark.slow
def test_a_matrix_of_many_classes_is_left_out(tmp_path):
    write_run(tmp_path / "runs/erm/x", "erm", details=False)
    (tmp_path / "runs/erm/x/metrics.jsonl").write_text("")
    for classes, shown in ((40, True), (41, False)):
        matrix = Confusion("x", [f"class {i}" for i in range(classes)], [[0, 39, 5]])
        write_list(tmp_path / "runs/erm/x/confusion.json", [matrix])
        [group] = group_runs(read_runs([tmp_path]))
        assert (group.confusion is not None) == shown
        assert group.losses is None, "nothing was recorded"


def test_runs_of_one_method_are_told_apart(tmp_path):
    write_run(tmp_path / "runs/rho-1/x", "sam")
    write_run(tmp_path / "runs/rho-2/x", "sam")
    write_run(tmp_path / "runs/erm/x", "erm")
    assert titles(read_runs([tmp_path])) == ["ERM", "SAM (rho-1)", "SAM (rho-2)"]


def test_the_moving_average_stays_centred():
    straight = [float(i) for i in range(40)]
    assert _smoothed(straight) == pytest.approx(straight)
    peak = [0.0] * 20 + [5.0] + [0.0] * 19  # 40 values: two neighbours on either side
    assert _smoothed(peak)[17:24] == [0, 1, 1, 1, 1, 1, 0]
    assert _smoothed([7.0, 0.0, 0.0])[0] == 7.0


def test_records_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "errors.json"
    write_list(path, [PLANE])
    assert read_list(path, LossSlice) == [PLANE]
    assert json.loads(path.read_text())[0]["losses"][0] == [2.0, 1.0, None]
    with pytest.raises(ValueError, match="not a list of rows with the keys confidence, key"):
        read_list(path, ExampleError)


def test_every_method_has_a_title_and_a_colour():
    names = get_args(MethodConfig.model_fields["name"].annotation)
    assert len(names) == 7 and set(METHOD_TITLES) == {"zero_shot", *names}
    assert set(METHOD_COLOURS) == set(METHOD_TITLES.values()) and len(set(METHOD_COLOURS.values())) == 8
