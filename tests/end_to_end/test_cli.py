"""The commands as a user types them, end to end on tiny data and a tiny random CLIP of either family."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from disam_peft.cli.app import main
from disam_peft.common.frontier_records import read_frontier
from disam_peft.common.prediction_table import read_predictions
from disam_peft.common.records import read_events, read_results
from disam_peft.common.run_images import read_images
from disam_peft.experiments import run
from disam_peft.experiments.run_folder import find_runs
from tests.helpers.paths import PACS_MINI, ROOT

QUICK = ["train.steps=4", "train.batch_size=6", "train.warmup_steps=0", "train.workers=0", "evaluation.workers=0"]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line; gives (exit code, standard output, standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["disam-peft", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call


@pytest.fixture
def arguments(domains_folder, openclip_name, tmp_path):
    """Overrides that make any recipe of recipes/pacs small."""
    backbone = [f"backbone.name={openclip_name}", "backbone.pretrained=null"]
    return [f"data.root={domains_folder}", f"output={tmp_path / 'runs'}", *backbone, *QUICK]


SMALL_LORA = "adapter.blocks={last: 1}"


def test_train_evaluate_export(cli, arguments, tmp_path):
    recipe = ROOT / "recipes/pacs/lora_disam.yaml"
    code, out, err = cli("train", recipe, "protocol.held_out=photo", SMALL_LORA, *arguments)
    assert code == 0, err
    assert "photo" in out
    assert "zero-shot" in out
    folder = tmp_path / "runs/pacs-lora-disam"
    rows = read_results(folder / "photo/results.json")
    assert {(r.method, r.split, r.domain) for r in rows if r.metric == "top1"} == {
        (method, split, domain)
        for method in ("zero_shot", "disam")
        for split, domains in (
            ("source_validation", ("art", "cartoon", "mean", "worst")),
            ("held_out", ("photo", "mean", "worst")),
        )
        for domain in domains
    }
    assert {r.n for r in rows if (r.split, r.domain) == ("held_out", "photo")} == {32}
    assert len(read_events(folder / "photo/metrics.jsonl", "validation")) == 4

    code, out, err = cli("evaluate", folder)
    assert code == 0, err
    assert "…" not in out, "fits a terminal of 80 columns"
    again = json.loads((folder / "photo/evaluation.json").read_text())
    recorded = [row.__dict__ for row in rows if row.method == "disam"]
    assert again == recorded, "reloading gives the same numbers, to the last bit"

    for to, file in (("peft", "adapter_model.safetensors"), ("merged", "open_clip_model.safetensors")):
        code, out, err = cli("export", folder, "--to", to, "--output", tmp_path / to)
        assert code == 0, err
        assert (tmp_path / to / file).is_file()
    code, _, err = cli("export", folder, "--to", "lora", "--rank", "2", "--alpha", "0.5", "--output", tmp_path / "lora")
    assert code == 0 and "the LoRA of rank 2 lacks" in err, err
    assert "disam_peft_lora.json" in {file.name for file in (tmp_path / "lora").iterdir()}
    code, _, err = cli("export", folder, "--to", "peft", "--output", tmp_path / "peft")
    assert code == 2
    assert "is not empty" in err


def test_two_runs_with_averages_a_soup_its_frontier_and_exports_at_an_alpha(cli, arguments, tmp_path):
    recipe, output = ROOT / "recipes/pacs/lora_disam.yaml", tmp_path / "mixed"
    averages = "average=[{kind: ema, decay: 0.5}, bma, {kind: swad, n_converge: 1, variant: published}]"
    for number, name in enumerate(("one", "two"), start=1):
        words = ["protocol.held_out=photo", SMALL_LORA, f"adapter.rank={number}", f"name={name}", averages]
        code, out, err = cli("train", recipe, *words, *arguments)
        assert code == 0, err
        assert all(f"disam, {weights}" in out for weights in ("raw", "ema", "bma", "swad"))
    folders = [tmp_path / "runs" / name for name in ("one", "two")]
    rows = [row for row in read_results(folders[0] / "photo/results.json") if row.method != "zero_shot"]
    assert {row.weights for row in rows} == {"raw", "ema", "bma", "swad"}
    assert len({row.weights for row in rows if row.chosen}) == 1

    code, out, err = cli("soup", *folders, "--held-out", "photo", "--method", "greedy", "--output", output)
    assert code == 0, err
    assert out.count("kept: ") + out.count("left out: ") == 2 and "kept: " in out and "held out" in out
    assert out.count(" % in the soup") == 2 and "recorded" not in out and f"next: disam-peft evaluate {output}" in out
    code, out, err = cli("evaluate", output)
    assert code == 0, err
    assert json.loads((output / "evaluation.json").read_text()) == [
        row.__dict__ for row in read_results(output / "results.json") if row.method != "zero_shot"
    ]
    code, out, err = cli("frontier", output, "--alphas", "0:1.2:0.4")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line[:6].strip() in ("0", "0.4", "0.8", "1.2")] == [
        *("0", "0.4", "0.8", "1.2"),
        *("0", "0.4", "0.8", "1.2"),
    ]
    assert "recommended: alpha=" in out and "by source validation" in out and "…" not in out
    code, out, err = cli("evaluate", output, "--alpha", "0.4")
    assert code == 0, err
    found = read_frontier(output / "frontier.json")
    at_alpha = {
        (row.split, row.domain, row.metric, row.pooled): row.value for row in read_results(output / "evaluation.json")
    }
    assert {row.weights for row in read_results(output / "evaluation.json")} == {"soup, alpha=0.4"}
    for row in found.rows:
        if row.alpha == 0.4:
            assert at_alpha[row.split, row.domain, row.metric, row.pooled] == row.value
    for to in ("peft", "merged"):
        code, _, err = cli("export", output, "--to", to, "--alpha", "0.4", "--output", tmp_path / to)
        assert code == 0, err
    code, _, err = cli("report", tmp_path / "runs", output, "--output", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "soup" in page and "zero-shot to trained weights" in page
    code, out, err = cli("runs", output)
    assert code == 0 and "greedy of " in out
    code, _, err = cli("soup", output, folders[1] / "photo", "--output", tmp_path / "of_a_soup")
    assert code == 0, err
    code, _, err = cli("soup", *folders, "--method", "gready", "--output", tmp_path / "other")
    assert code == 2 and "did you mean 'greedy'" in err
    code, _, err = cli("soup", folders[0], "--output", tmp_path / "other")
    assert code == 2 and "needs two runs or more" in err


@pytest.mark.parametrize(
    "name", ["paper/pacs/coop_disam", "paper/pacs/coop_erm", "pacs/linear_probe_sam", "pacs/lora_sam"]
)
def test_every_adapter_trains_and_reloads(cli, arguments, tmp_path, name):
    recipe = ROOT / f"recipes/{name}.yaml"
    adapter = [SMALL_LORA] if recipe.stem.startswith("lora") else []
    code, _, err = cli(
        "train",
        recipe,
        "protocol.held_out=art",
        *adapter,
        *arguments,
        "train.tracker=tensorboard",
    )
    assert code == 0, err
    [folder] = find_runs(tmp_path / "runs" / f"pacs-{recipe.stem.replace('_', '-')}")
    assert list((folder.parent / "tensorboard/art").iterdir())
    code, _, err = cli("evaluate", folder)
    assert code == 0, err
    method = name.rsplit("_", 1)[1]
    rows = [row.__dict__ for row in read_results(folder / "results.json") if row.method == method]
    assert json.loads((folder / "evaluation.json").read_text()) == rows


def test_transformers_backbones_train_and_serve_peft(cli, arguments, transformers_dir, tmp_path):
    family = ["backbone.family=transformers", f"backbone.name={transformers_dir}"]
    code, _, err = cli(
        "train", ROOT / "recipes/pacs/lora_disam.yaml", "protocol.held_out=art", *arguments, *family, SMALL_LORA
    )
    assert code == 0, err
    code, _, err = cli("export", tmp_path / "runs/pacs-lora-disam", "--to", "peft", "--output", tmp_path / "peft")
    assert code == 0, err
    assert (tmp_path / "peft/adapter_config.json").is_file()


def test_leave_one_out_in_turn_keeps_finished_runs(cli, arguments, tmp_path):
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    assert cli("train", recipe, "protocol.held_out=art", *arguments)[0] == 0
    folder = tmp_path / "runs/pacs-linear-probe-disam"
    before = (folder / "art/results.json").stat().st_mtime_ns
    code, out, err = cli("train", recipe, "protocol.held_out=all", *arguments)
    assert code == 0, err
    assert "art: this very run is finished already" in out
    assert "mean" in out
    assert (folder / "art/results.json").stat().st_mtime_ns == before
    assert {row.held_out for row in read_results(folder / "results.json")} == {"art", "cartoon", "photo"}
    code, _, err = cli("export", folder, "--to", "peft", "--output", tmp_path / "out")
    assert code == 2
    assert "holds 3 runs (art, cartoon, photo): choose one with --held-out" in err
    assert cli("export", folder, "--to", "peft", "--output", tmp_path / "out", "--held-out", "photo")[0] == 0


def test_row_37_another_run_is_never_overwritten_unasked(cli, arguments, tmp_path):
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    assert cli("train", recipe, "protocol.held_out=art", *arguments)[0] == 0
    results = tmp_path / "runs/pacs-linear-probe-disam/art/results.json"
    before = results.read_bytes()
    code, _, err = cli("train", recipe, "protocol.held_out=art", *arguments, "method.rho=0.2", "seed=5")
    assert code == 2
    assert "method.rho: 2.5 -> 0.2" in err
    assert "seed: 0 -> 5" in err
    assert results.read_bytes() == before
    assert cli("train", recipe, "protocol.held_out=art", *arguments, "method.rho=0.2", "--overwrite")[0] == 0
    assert results.read_bytes() != before
    results.unlink()
    code, _, err = cli("train", recipe, "protocol.held_out=art", *arguments, "method.rho=0.2")
    assert code == 2
    assert "holds a finished run whose results.json is gone; --resume makes it again" in err


def test_a_folder_of_somebody_else_is_left_alone(cli, arguments, tmp_path):
    theirs = tmp_path / "runs/pacs-linear-probe-disam/art"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("years of work")
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    code, _, err = cli("train", recipe, "protocol.held_out=art", *arguments)
    assert code == 2
    assert "no run of disam-peft" in err
    assert cli("train", recipe, "protocol.held_out=art", *arguments, "--overwrite")[0] == 2
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_evaluate_on_other_data_with_fewer_classes(cli, arguments, domains_folder, tmp_path):
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    assert cli("train", recipe, "protocol.held_out=art", *arguments)[0] == 0
    other = tmp_path / "other"
    for name in ("red", "blue"):
        shutil.copytree(domains_folder / "photo" / name, other / "studio" / name)
    folder = tmp_path / "runs/pacs-linear-probe-disam"
    code, out, err = cli("evaluate", folder, "--data", other)
    assert code == 0, err
    assert "studio" in out
    rows = json.loads((folder / "art/evaluation.json").read_text())
    n = {row["split"]: row["n"] for row in rows if row["pooled"] is None}
    assert {(row["split"], row["domain"]) for row in rows if row["pooled"] is None} == {
        ("seen_training", "studio"),
        ("seen_validation", "studio"),
    }, "photo was a source: copies of its images have been seen, whatever their names are now"
    assert sum(n.values()) == 16
    table = read_predictions(folder / "art/evaluation_predictions.parquet")
    assert {split: table.split.count(split) for split in n} == n
    assert set(table.label) == {"blue", "red"} and set(table.domain) == {"studio"}
    (other / "studio/red").rename(other / "studio/purple")
    code, _, err = cli("evaluate", folder, "--data", other)
    assert code == 2
    assert "classes that the adapter was not trained for: purple" in err
    code, _, err = cli("evaluate", folder, "--data", other, "data.classes=intersection")
    assert code == 0 and "8 of 16 images are left out: the adapter does not know purple" in err
    assert set(read_predictions(folder / "art/evaluation_predictions.parquet").label) == {"blue"}
    (other / "studio/blue").rename(other / "studio/mauve")
    code, _, err = cli("evaluate", folder, "--data", other, "data.classes=intersection")
    assert code == 2 and "classes that the adapter was not trained for: mauve, purple" in err


def test_row_52_evaluate_on_other_data_with_the_domains_of_the_run(cli, arguments, domains_folder, tmp_path):
    """Rows of half of the run's images, and of a new one: never "source validation" or "held out"."""
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    assert cli("train", recipe, "protocol.held_out=art", *arguments)[0] == 0
    folder, other = tmp_path / "runs/pacs-linear-probe-disam/art", tmp_path / "other"
    trained = read_predictions(folder / "predictions.parquet")
    assert set(trained.split) == {"source_validation", "held_out"} and len(trained) > 32
    known = read_images(folder / "images.parquet")
    shutil.copytree(domains_folder, other)
    for path in sorted(other.rglob("*.png"))[::2]:
        path.unlink()
    Image.effect_noise((32, 32), 60).convert("RGB").save(other / "photo/red/new.png")
    code, out, err = cli("evaluate", tmp_path, "--data", other)
    assert code == 0, err
    assert "seen training" in out and "unseen" in out and "source val." not in out and "held out" not in out
    assert read_predictions(folder / "predictions.parquet") == trained, "those of its own data stay"
    table = read_predictions(folder / "evaluation_predictions.parquet")
    assert len(table) == 49, "evaluated whole"
    part_of = dict(zip(known.content, known.part, strict=True))
    names = {"training": "seen_training", "validation": "seen_validation", "held_out": "unseen", None: "unseen"}
    assert [names[part_of.get(content)] for content in table.content] == list(table.split)
    rows = read_results(folder / "evaluation.json")
    for domain in ("art", "cartoon", "photo"):
        for split in set(table.split):
            places = [i for i in range(49) if (table.domain[i], table.split[i]) == (domain, split)]
            values = [r.value for r in rows if (r.split, r.domain, r.pooled, r.metric) == (split, domain, None, "top1")]
            right = [table.label[i] == table.predicted[i] for i in places]
            assert values == ([sum(right) / len(right)] if right else [])
    code, _, err = cli("evaluate", tmp_path, "--data", other, "--sharpness")
    assert code == 2 and "sharpness is measured on the run's own data" in err


def test_row_51_evaluate_refuses_what_made_the_adapter(cli, arguments, tmp_path):
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    assert cli("train", recipe, "protocol.held_out=art", *arguments)[0] == 0
    folder = tmp_path / "runs/pacs-linear-probe-disam/art"
    for override in ("protocol.held_out=photo", "seed=7", "backbone.name=ViT-L-14", "adapter.rank=64"):
        code, _, err = cli("evaluate", folder, override)
        assert code == 2 and "What may be given here is backbone.precision, data.*, evaluation.*" in err, override
        assert not (folder / "evaluation.json").exists()


def test_row_49_domains_called_mean_worst_and_pooled(cli, arguments, domains_folder, tmp_path):
    data = tmp_path / "data"
    for name, domain in zip(("mean", "pooled", "worst"), ("art", "cartoon", "photo"), strict=True):
        shutil.copytree(domains_folder / domain, data / name)
    recipe, quick = ROOT / "recipes/pacs/linear_probe_disam.yaml", [*arguments, f"data.root={data}"]
    sharpness = "evaluation.sharpness={samples: 6, ascent_steps: 1, hessian_iterations: 3, slice_points: 0}"
    code, out, err = cli("train", recipe, "protocol.held_out=all", *quick, sharpness)
    assert code == 0, err
    assert "mean over domains" in out
    runs = tmp_path / "runs/pacs-linear-probe-disam"
    rows = read_results(runs / "mean/results.json")
    n = {(r.split, r.domain, r.pooled): r.n for r in rows if r.metric == "top1" and r.method == "disam"}
    assert n["held_out", "mean", None] == 32 and n["held_out", "mean", "mean"] == 1
    assert n["source_validation", "worst", None] > 2 == n["source_validation", "worst", "worst"]
    sharp = read_results(runs / "pooled/sharpness.json")
    assert {(r.split, r.domain, r.pooled) for r in sharp} == {
        ("source_validation", "pooled", "all"),
        ("held_out", "pooled", None),
    }
    assert cli("evaluate", runs)[0] == 0
    assert read_results(runs / "mean/evaluation.json") == [row for row in rows if row.method == "disam"]
    code, _, err = cli("report", tmp_path / "runs", "--output", tmp_path / "report.html")
    assert code == 0, err
    markdown = (tmp_path / "report_figures/tables.md").read_text()
    assert all(f"\n| {name} | " in markdown for name in ("mean", "pooled", "worst", "mean over domains"))


def test_row_06_a_misspelt_held_out_domain(cli, arguments):
    code, _, err = cli("train", ROOT / "recipes/pacs/lora_disam.yaml", "protocol.held_out=phto", *arguments)
    assert code == 2
    assert "did you mean 'photo'" in err
    assert "Traceback" not in err


def test_row_07_a_leak_stops_before_training(cli, arguments, domains_folder, tmp_path):
    leaky = tmp_path / "leaky"
    shutil.copytree(domains_folder, leaky)
    shutil.copy(leaky / "art/red/0.png", leaky / "photo/red/copy.png")
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    code, _, err = cli("train", recipe, "protocol.held_out=photo", *arguments, f"data.root={leaky}")
    assert code == 2
    assert "leak: 1 image file(s)" in err
    assert "copy.png" in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("adapter"))


def test_check_data_counts_and_exits_with_1_for_a_bad_file(cli, domains_folder, tmp_path):
    code, out, _ = cli("check-data", domains_folder, "--json", tmp_path / "report.json")
    assert code == 0
    assert "96 images" in out
    assert json.loads((tmp_path / "report.json").read_text())["total"] == 96
    broken = tmp_path / "broken"
    shutil.copytree(domains_folder, broken)
    (broken / "art/red/0.png").write_bytes((broken / "art/red/0.png").read_bytes()[:200])
    shutil.copy(broken / "art/red/1.png", broken / "photo/red/again.png")
    code, out, _ = cli("check-data", broken)
    assert code == 1
    assert "bad files: 1" in out
    assert "several domains (a leak once one of them is held out): 1" in out
    (broken / "art/red/0.png").unlink()
    code, out, _ = cli("check-data", broken, "--held-out", "photo")
    assert code == 1
    assert "train will refuse: leak: 1 image file(s) of the held-out domain" in out


def test_zero_shot_with_a_list_of_templates_and_the_imagenet_ensemble(cli, arguments, tmp_path):
    recipe = ROOT / "recipes/pacs/linear_probe_erm.yaml"
    seen = []
    for name, templates in (
        ("one", "a photo of a {}."),
        ("two", "['a photo of a {}.', 'a sketch of a {}.']"),
        ("many", "imagenet"),
    ):
        code, _, err = cli(
            "train", recipe, "protocol.held_out=art", *arguments, f"prompts.templates={templates}", f"name={name}"
        )
        assert code == 0, err
        rows = read_results(tmp_path / f"runs/{name}/art/results.json")
        seen.append(next(r.value for r in rows if (r.method, r.domain, r.metric) == ("zero_shot", "art", "nll")))
    assert len(set(seen)) == 3


def test_help_needs_no_heavy_import():
    code = "import sys, disam_peft.cli.app; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_base_weights_are_bit_identical_after_a_run(arguments, openclip_name, tmp_path):
    from disam_peft.backbones.families import load_backbone
    from disam_peft.classification.saved_classifier import load_adapter
    from disam_peft.config.backbone import BackboneConfig
    from disam_peft.config.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes/pacs/lora_disam.yaml", [*arguments, SMALL_LORA, "protocol.held_out=art"])
    [outcome] = run.train(recipe)
    backbone = load_backbone(BackboneConfig(name=openclip_name))
    classifier = load_adapter(outcome.folder / "adapter", backbone)
    assert classifier.backbone.current_hash() == backbone.base_hash
    assert outcome.fit is not None


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes is tested on POSIX systems")
def test_two_processes_give_the_results_of_one(arguments, tmp_path):
    """Same batches, one all-reduce of sums, gradients added up: equal but for the order of float32 additions."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    recipe = [str(ROOT / "recipes/pacs/lora_disam.yaml"), SMALL_LORA, "protocol.held_out=photo", "augment.kind=none"]
    nlls = []
    for processes in (1, 2):
        # accelerate's own launcher starts several processes on a CPU through MPI alone
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["-m", "disam_peft.cli", "train", *recipe, *arguments, f"name=with-{processes}"]
        subprocess.run([*launch, *words], env=environment, check=True, capture_output=True, timeout=120)
        rows = read_results(tmp_path / f"runs/with-{processes}/photo/results.json")
        assert {row.n for row in rows if (row.split, row.domain) == ("held_out", "photo")} == {32}, "each sample once"
        nlls.append(torch.tensor([row.value for row in rows if row.metric == "nll"]))
    assert (nlls[0] - nlls[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("script", ["finetune_folder.py", "own_loop.py", "own_objective.py"])
def test_recipe_scripts_run(script, domains_folder, openclip_name, tmp_path):
    words = [domains_folder, "photo", "--backbone", openclip_name, "--pretrained", "", "--steps", "3"]
    result = subprocess.run(
        [sys.executable, ROOT / "recipes" / script, *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "on photo: " in result.stdout
    assert len((ROOT / "recipes" / script).read_text().splitlines()) <= 85
    if script == "finetune_folder.py":
        assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.skipif(not PACS_MINI.is_dir(), reason="the PACS sample does not lie beside the repository")
def test_pacs_sample_runs_to_the_end(cli, arguments, tmp_path):
    recipe = ROOT / "recipes/pacs/linear_probe_disam.yaml"
    code, out, err = cli(
        "train", recipe, *arguments, f"data.root={PACS_MINI}", "protocol.held_out=sketch", "train.steps=2"
    )
    assert code == 0, err
    rows = read_results(tmp_path / "runs/pacs-linear-probe-disam/sketch/results.json")
    assert {row.n for row in rows if (row.split, row.domain) == ("held_out", "sketch")} == {420}
    assert "n/a" not in out
