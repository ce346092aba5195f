"""``check-data`` takes what training takes, shows it in 80 columns, and ends with what training will say."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image
from typer.testing import CliRunner

from disam_peft.cli.app import app
from disam_peft.cli.data_tables import print_data_report
from disam_peft.cli.output import Terminal
from disam_peft.config.data import SOURCE_OF_SUFFIX, SOURCE_SETTINGS
from disam_peft.data.census import DataReport
from disam_peft.errors import UserError
from tests.helpers.folders import write_domains
from tests.helpers.paths import environment


def images(folder: Path) -> list[dict[str, str]]:
    """One record per image of a folder tree, with its full path."""
    paths = sorted(folder.rglob("*.png"))
    return [{"image": str(path), "label": path.parent.name, "domain": path.parent.parent.name} for path in paths]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files_with_a_record_per_image_are_read(tmp_path: Path, suffix: str) -> None:
    folder = write_domains(tmp_path / "images", count=2)
    records, separator = images(folder), {".csv": ",", ".tsv": "\t"}.get(suffix)
    if separator is None:
        text = "".join(json.dumps(record) + "\n" for record in records)
    else:
        text = "".join(separator.join(row) + "\n" for row in [list(records[0]), *(r.values() for r in records)])
    path = folder / f"list{suffix}"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["check-data", str(path), "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["total"] == len(records) == 24
    assert found["domains"] == ["art", "cartoon", "photo"]


def check(*arguments: object, width: int = 80) -> tuple[int, str]:
    """Exit code and output, with every run of blanks and line ends as one blank."""
    result = CliRunner().invoke(app, ["check-data", *map(str, arguments)], env={"COLUMNS": str(width)})
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_domains(tmp_path / "images", count=5)


def test_it_ends_with_what_train_will_do(folder: Path) -> None:
    code, out = check(folder)
    assert code == 0
    assert words(out).endswith(
        "train can use these data: any of the 3 domains can be held out; images: training 48, validation 12 (of all "
        "domains together)"
    )
    code, out = check(folder, "--held-out", "art")
    assert code == 0 and "art is held out; images: training 32, validation 8, held out 20" in words(out)
    code, out = check(folder, "protocol=all")
    assert code == 0 and "nothing is held out; images: training 48, validation 12" in words(out)


def test_overrides_and_recipes_are_taken(folder: Path, tmp_path: Path) -> None:
    code, out = check(folder, "data.domains=[art, photo]", "protocol.validation_fraction=0.4")
    assert code == 0 and "any of the 2 domains can be held out; images: training 24, validation 16" in words(out)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nbackbone: {{name: y}}\nadapter: {{kind: linear_probe}}\n"
        f"data: {{root: {folder}}}\nprotocol: {{held_out: art}}\n"
    )
    assert "art is held out" in check(recipe)[1]
    assert "photo is held out" in check(recipe, "protocol.held_out=photo")[1]
    code, out = check(folder, "data.clases=union")
    assert code == 2 and "did you mean 'classes'" in out


@pytest.mark.parametrize("kind", ["shapes", "hub", "saved", "root"])
def test_every_source_can_be_named(folder: Path, tmp_path: Path, kind: str) -> None:
    saved = tmp_path / "saved"
    if kind in ("hub", "saved"):
        datasets.Dataset.from_list(images(folder)).save_to_disk(saved)
    source = {
        "shapes": "data.shapes={images_per_class: 2}",
        "hub": f"data.hub={saved}",
        "saved": str(saved),
        "root": f"data.root={folder}",
    }[kind]
    code, out = check(source, *([f"data.image_root={tmp_path}"] if kind in ("hub", "saved") else []))
    assert code == 0, out
    assert ("60 images" in out) == (kind != "shapes")


# -- what training would refuse --------------------------------------------------------------------------------


def test_exit_1_where_classes_differ(folder: Path) -> None:
    shutil.rmtree(folder / "art" / "red")
    code, out = check(folder)
    assert code == 1 and "train will refuse: the domains have different classes" in out
    assert "data.classes=union" in out
    assert check(folder, "data.classes=union")[0] == 0


def test_exit_1_where_no_domain_can_be_held_out(folder: Path, tmp_path: Path) -> None:
    code, out = check(folder / "art")
    assert code == 1 and "train will refuse: no domain can be held out" in out
    assert "the data do not say which domain an image belongs to" in words(out)
    code, out = check(folder / "art", "protocol=all")
    assert code == 0 and "unnamed" in out


def test_row_69_a_domain_without_an_image_is_a_finding(folder: Path) -> None:
    (folder / "scan" / "red").mkdir(parents=True)
    for i in range(30):
        (folder / "scan" / "red" / f"{i}.heic").write_bytes(b"x")
    code, out = check(folder)
    assert code == 1
    assert "passed over: 30 .heic in scan/red" in out
    assert "train will refuse: domain 'scan'" in out and "60 images" in out and "scan" in out


def test_row_70_one_class(folder: Path) -> None:
    for domain in folder.iterdir():
        for name in list(domain.iterdir())[1:]:
            shutil.rmtree(name)
    code, out = check(folder)
    assert code == 1 and "has one class" in out


def test_row_71_conflicts_and_copies_are_findings(folder: Path, tmp_path: Path) -> None:
    first, second = sorted(path.name for path in (folder / "art").iterdir())[:2]
    shutil.copy(folder / "art" / first / "1.png", folder / "art" / second / "conflict.png")
    code, out = check(folder, "--json", tmp_path / "found.json")
    assert code == 0  # a warning, as chosen
    assert "the same image with several classes: 1" in out and f"({first}, {second})" in out
    assert "train will warn: 1 image(s) have several classes" in words(out)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [group["classes"] for group in found["conflicts"]] == [[first, second]]
    assert any("several classes" in text for text in found["train"]["warnings"])
    assert check(folder, "data.duplicates=error")[0] == 1
    shutil.copy(folder / "art" / first / "2.png", folder / "photo" / first / "copy.png")
    for arguments in ((), ("data.verify=false",)):
        code, out = check(folder, *arguments)
        assert code == 1 and "leak: these domains cannot be held out (all)" in words(out)
    assert "leak: these domains cannot be held out (all)" in words(out)
    assert "art (1), photo (1); remove the images from one side, or hold out one of cartoon" in words(out)


def test_row_09_twins_by_case_are_findings(folder: Path) -> None:
    first = sorted(path.name for path in (folder / "art").iterdir())[0]
    (folder / "art" / first).rename(folder / "art" / first.capitalize())
    code, out = check(folder)
    assert code == 1
    assert f"names that differ in case alone: 1 {first.capitalize()} = {first}" in words(out)


def test_a_strip_of_pixels_is_a_finding(folder: Path) -> None:
    first = sorted((folder / "art").iterdir())[0]
    Image.new("RGB", (1_000_000, 1)).save(first / "strip.png")
    code, out = check(folder)
    assert code == 1 and "1000000 x 1 is a strip" in out


def test_given_splits_are_shown(folder: Path, tmp_path: Path) -> None:
    for domain in list(folder.iterdir()):
        for name in list(domain.iterdir()):
            for path in name.iterdir():
                part = {"0": "test", "1": "val"}.get(path.stem, "train")
                target = tmp_path / "given" / part / domain.name / name.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    code, out = check(tmp_path / "given", "--json", tmp_path / "found.json", "--held-out", "art")
    assert code == 0
    assert "given splits" in out and "art 12 4 4" in words(out) and "all 36 12 12" in words(out)
    assert "art is held out; images: training 24, validation 8, held out 20" in words(out)
    assert json.loads((tmp_path / "found.json").read_text())["given"] == [[12, 4, 4]] * 3


# -- the table ---------------------------------------------------------------------------------------------------


def report(num_domains: int, num_classes: int) -> DataReport:
    domains = tuple(f"hospital_{i:02d}" for i in range(num_domains))
    classes = tuple(f"finding_{i:02d}" for i in range(num_classes))
    counts = tuple(tuple(100 * d + c for c in range(num_classes)) for d in range(num_domains))
    return DataReport("d", "", domains, classes, classes, counts, (), (), (), None, {})


@pytest.mark.parametrize(("num_domains", "num_classes"), [(3, 7), (20, 2), (2, 50), (50, 65), (65, 3)])
def test_every_domain_and_class_is_shown_in_80_columns(num_domains: int, num_classes: int) -> None:
    shown = report(num_domains, num_classes)
    console = Terminal(width=80, record=True, file=io.StringIO())
    print_data_report(shown, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = words("\n".join(lines))
    for d, name in enumerate(shown.domains):
        assert name in text and str(sum(shown.counts[d])) in text
    for name in shown.classes:
        assert name in text
    assert "…" not in text and "..." not in text


def test_suffixes_lead_to_settings_that_are_there() -> None:
    assert set(SOURCE_OF_SUFFIX.values()) <= set(SOURCE_SETTINGS)


@pytest.mark.slow
def test_data_are_judged_without_loading_torch() -> None:
    """It takes seconds and several hundred megabytes."""
    code = "import sys, disam_peft.experiments.data_verdict; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == 0
