"""The demo, end to end on a few images: what it promises to leave behind is there, and works."""

import pytest

from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.evaluation import SharpnessConfig
from disam_peft.errors import UserError
from disam_peft.experiments.demo import MISLEADING, demo
from disam_peft.report.runs import read_runs


def test_the_demo_leaves_a_report_a_sheet_and_an_adapter_that_loads(tmp_path, monkeypatch):
    quick = SharpnessConfig(samples=10, ascent_steps=1, hessian_iterations=3, gradient_group=5, slice_points=3)
    monkeypatch.setattr("disam_peft.experiments.demo.SHARPNESS", quick)
    said = []
    lines = demo(tmp_path / "demo", "sketch", steps=2, images_per_class=5, say=said.append)
    assert [line.arm for line in lines] == ["zero-shot", "ERM", "SAM", "DISAM", "ERM + anchor"]
    assert [line.gradients for line in lines] == [None, 2, 4, 4, 2]
    runs = {run.folder.parent.name: run for run in read_runs([tmp_path / "demo/runs"])}
    assert list(runs) == ["demo-anchor", "demo-disam", "demo-erm", "demo-sam"]
    for line, name in zip(lines[1:], ("erm", "sam", "disam", "anchor"), strict=True):
        rows = [row for row in runs[f"demo-{name}"].chosen_rows if row.split == "held_out" and row.is_of("sketch")]
        assert {row.n for row in rows} == {60}
        assert {"top1": line.accuracy, "nll": line.nll, "ece": line.ece}.items() <= {
            r.metric: r.value for r in rows
        }.items()
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert "DISAM" in page
    assert MISLEADING.split(":")[0] in page
    for heading in ("Convergence of each", "Cosine between", "Sharpness of", "was taken for", "The surest errors"):
        assert heading in page, heading
    assert (tmp_path / "demo/domains.png").read_bytes()[:4] == b"\x89PNG"
    assert len(load_adapter(tmp_path / "demo/adapter").class_names) == 12
    assert len(said) == 6
    assert said[-1].startswith("exported ")
    again = demo(tmp_path / "demo", "sketch", steps=2, images_per_class=5, say=said.append)
    assert again == lines, "finished runs are kept"


def test_row_06_the_demo_names_the_domains_too(tmp_path):
    with pytest.raises(UserError, match="did you mean 'sketch'"):
        demo(tmp_path / "demo", "sketches", steps=2, images_per_class=5)
