"""What ``scripts/benchmark.py`` compares computes the same; in float64, where rounding hides nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from disam_peft.data import check

pytest.importorskip("pytorch_optimizer", reason='the peers need the extra: pip install -e ".[bench]"')

from tests.helpers.paths import SCRIPTS

CPU = torch.device("cpu")
EXACT = 1e-12
EXACT_SAM = 1e-7
"""pytorch_optimizer takes the gradient's norm in float32."""


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def tiny_config() -> Any:
    from bench.models import clip_config

    tower = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
    return clip_config({**tower, "image_size": 32, "patch_size": 16}, tower, projection_dim=16)


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Any) -> Path:
    from bench.models import write_clip

    write_clip(tmp_path, tiny_config)
    return tmp_path


def test_every_lora_variant_has_the_peers_gradients(folder: Path) -> None:
    from bench.lora import lora_steps
    from bench.steps import difference

    step = lora_steps(folder, 2, 6, CPU, torch.float64)
    sam, erm = step["sam"].gradients(), step["erm"].gradients()
    assert len(sam) == 2 * 2 * 2  # A and B of q and v in two blocks
    for name in ("our sam", "our sam, stored"):
        assert difference(step[name].gradients(), sam) < EXACT_SAM
    for name in ("our erm", "our erm, stored"):
        assert difference(step[name].gradients(), erm) < EXACT
    # The measure can tell methods apart: another method is not nearly the same gradient.
    assert difference(step["our disam"].gradients(), sam) > 1e-6
    assert difference(erm, sam) > 1e-3


def test_every_coop_variant_has_the_peers_gradients(folder: Path) -> None:
    from bench.coop import coop_steps
    from bench.steps import difference

    step = coop_steps(folder, 9, 6, CPU, torch.float64)
    sam, erm = step["sam"].gradients(), step["erm"].gradients()
    assert sam["context"].shape == (16, 32)
    for name in ("our sam", "our sam, stored"):
        assert difference(step[name].gradients(), sam) < EXACT_SAM
    assert difference(step["our erm, stored"].gradients(), erm) < EXACT
    assert difference(erm, sam) > 1e-3


def test_every_variant_of_prompts_has_the_peers_gradients(folder: Path) -> None:
    from bench.prompts import maple_pair, visual_pair
    from bench.steps import difference

    for pair in (visual_pair(folder, 2, CPU, torch.float64), maple_pair(folder, 5, 3, CPU, torch.float64)):
        step = pair.steps(6)
        sam, erm = step["sam"].gradients(), step["erm"].gradients()
        for ending in ("", ", stored"):
            assert difference(step[f"our sam{ending}"].gradients(), sam) < EXACT_SAM
            assert difference(step[f"our erm{ending}"].gradients(), erm) < EXACT
        assert difference(erm, sam) > 1e-4


def test_steps_leave_the_weights_where_they_are(folder: Path) -> None:
    from bench.lora import lora_steps

    step = lora_steps(folder, 1, 6, CPU)
    before = {name: p.detach().clone() for name, p in step["sam"].params.items()}
    for one in step.values():
        one.run()
    for name, value in before.items():
        assert torch.equal(step["sam"].params[name], value)
        assert torch.equal(step["our disam"].params[name], value)


def test_split_attention_has_the_gradients_of_pefts_own(tiny_config: Any) -> None:
    from bench.attention import agreement, attention_steps

    assert agreement(attention_steps(tiny_config, 4, CPU)) < 5e-6


def test_a_memory_budget_changes_no_gradient(folder: Path) -> None:
    from bench.memory import memory_steps
    from bench.steps import difference

    budget = 5e-4  # half a megabyte: several chunks of these prompts
    step = memory_steps(folder, 40, 4, (budget,), CPU)
    assert difference(step[budget].gradients(), step[None].gradients()) < 5e-6


def test_peak_memory_of_a_new_process_is_not_this_ones(folder: Path) -> None:
    from bench.memory import peak_gb

    held = torch.ones(500_000_000)  # two gigabytes here are none there
    process, step = peak_gb(folder, 5, 4, None, CPU)
    assert held[-1] == 1
    assert 0.1 < process < 1.5
    assert 0 <= step < 0.2


def test_bookkeeping_and_the_table(folder: Path) -> None:
    from bench import bookkeeping
    from bench.measure import Row, machine, table

    shares, milliseconds = bookkeeping.rows(folder, 6, 2, CPU)
    assert len(shares.values) == len(milliseconds.values) == 2
    assert all(value > 0 for value in (*shares.values, *milliseconds.values))
    lines = table([Row("a", [0.3, 0.1, 0.2], 0.25, 3e-7, 4e-7), shares]).splitlines()
    assert lines[2] == "| a | 0.2 | 0.1 | 0.3 | <= 0.25 | 3e-07 | 4e-07 |"
    assert "<= 1 % |" in lines[3]
    assert f"torch {torch.__version__}" in machine(CPU)


def test_every_section_gives_rows_with_small_differences(folder: Path, tiny_config: Any) -> None:
    from bench import accumulation, attention, cocoop, coop, growth, lora, probe, tip_adapter_f

    rows = [
        *lora.rows(folder, 3, 4, 1, CPU),
        *attention.rows(tiny_config, 4, 1, CPU),
        *coop.few_classes(folder, 5, 4, 1, CPU),
        *coop.many_classes(folder, 7, 4, 1, CPU),
        *cocoop.times(folder, 5, 3, 1, CPU),
        *probe.rows(folder, 1, CPU, images=96),
        *tip_adapter_f.rows(folder, 1, CPU, images=96),
    ]
    # every target of a ratio that these sections answer for
    assert [row.target for row in rows if row.target is not None] == [
        0.66,
        1.25,
        0.42,
        0.85,
        0.92,
        0.09,
        0.05,
        0.1,
        0.04,
        1.2,
        1.2,
        0.001,
        0.5,
        0.2,
        0.01,
        0.01,
    ]
    for row in rows:
        assert row.values[0] > 0
        compared = " / our ERM" not in row.what  # between our own two methods there is nothing to agree
        assert (row.difference is not None) == compared
        assert (row.difference or 0) < 3e-5, row.what
        assert (row.rounding or 0) < 3e-5, row.what
    two_phase, by_domain = accumulation.rows(folder, 7, 1, CPU)
    assert two_phase.target == 1.35
    assert all(0 < (row.difference or 0) < 1e-5 for row in (two_phase, by_domain))
    assert [len(row.values) for row in growth.rows(folder, 2, CPU)] == [2, 2, 2]


def test_whole_runs_of_both_kinds(
    folder: Path, domains_folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from bench import whole_run

    monkeypatch.setattr(whole_run, "LAST", 1)
    recipes, checked = [], []
    train, find = whole_run.run.train, check._find
    monkeypatch.setattr(whole_run.run, "train", lambda recipe: recipes.append(recipe) or train(recipe))
    monkeypatch.setattr(check, "_find", lambda *arguments: checked.append(1) or find(*arguments))
    rows = whole_run.rows(folder, domains_folder, "photo")
    assert [row.target for row in rows] == [0.45, None, None, 0.45, None, None, 0.45]
    (coop, coop_ours, coop_naive, lora, lora_ours, lora_naive, both) = (row.values[0] for row in rows)
    assert coop == coop_ours / coop_naive > 0
    assert lora == lora_ours / lora_naive > 0
    assert both == (coop_ours + lora_ours) / (coop_naive + lora_naive)
    assert [line.split(":")[0].strip() for line in capsys.readouterr().err.splitlines() if line.endswith(" s")] == [
        f"{name}, {which}" for name in ("CoOp", "LoRA last 1") for which in ("ours", "naive loop")
    ]
    # 52 training images: three epochs of two steps
    assert [(recipe.train.steps, recipe.train.validate_every) for recipe in recipes] == [(6, 2)] * 2
    assert len(checked) == 3 * 96, "once to count the images, and within each run of ours"
    assert os.environ["DISAM_PEFT_CACHE"] == str(own_cache)
    assert not (own_cache / "features").exists()


def test_interleaved_counts_no_cold_round() -> None:
    from bench.measure import interleaved, ratios

    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert ratios([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]
