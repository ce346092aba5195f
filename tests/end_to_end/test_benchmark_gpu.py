"""The benchmark's section for GPUs, on a CPU with a tiny CLIP: what it counts, what it says, and what it survives."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("pytorch_optimizer", reason='the peers need the extra: pip install -e ".[bench]"')

from tests.helpers.paths import SCRIPTS

CPU = torch.device("cpu")
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
IMAGES, CLASSES, WIDTH = 6, 5, 16


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from bench.gpu_models import models
    from bench.models import write_clip

    write_clip(tmp_path, models()["tiny"].config)
    return tmp_path


# -- operations ----------------------------------------------------------------------------------------------


def test_attention_counts_forward_and_backward() -> None:
    from bench.flops import count_flops

    B, H, L, D = 2, 3, 5, 8
    query, key, value = (torch.randn(B, H, L, D, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    product = 2 * B * H * L * L * D
    with torch.no_grad():
        assert count_flops(forward).attention == 2 * product
    found = count_flops(lambda: forward().sum().backward())
    # backward computes the weights anew, then gradients of query, key, value and of the weights
    assert found.attention == found.total == (2 + 5) * product


def test_each_variant_executes_what_it_should(folder: Path) -> None:
    from bench.flops import count_flops
    from bench.lora import lora_pair
    from bench.probe import probe_pair
    from bench.steps import Pinned

    for autocast in (BF16, partial(BF16, enabled=False)):
        counted = {}
        for name, step in lora_pair(folder, 1, CPU).steps(IMAGES, autocast=autocast, store=Pinned).items():
            step.run()  # the class features are computed once for all steps
            counted[name] = count_flops(step.run).total
        assert counted["sam"] == 2 * counted["erm"]
        assert counted["our disam, stored"] == 2 * counted["our erm, stored"] > 0
        frozen = counted["our erm"] - counted["our erm, stored"]
        assert frozen > 0
        assert counted["our disam"] == frozen + counted["our disam, stored"] < counted["sam"]

        head = probe_pair(folder, CLASSES, CPU).steps(IMAGES, autocast=autocast, store=Pinned)["our disam, stored"]
        head.run()
        # two passes, each with the logits and the gradient of the weight
        assert count_flops(head.run).total == 2 * 2 * 2 * IMAGES * CLASSES * WIDTH


# -- what limits a step --------------------------------------------------------------------------------------


def test_kernels_are_told_apart_by_their_names() -> None:
    from bench.kernels import ATTENTION, HOST_COPY, MATRIX, OTHER, SMALL, category

    names = {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": MATRIX,
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": MATRIX,
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>": MATRIX,
        "void cublasLt::splitKreduce_kernel<32, 16, int>": MATRIX,
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": ATTENTION,
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": ATTENTION,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": ATTENTION,
        "triton_poi_fused__scaled_dot_product_flash_attention_view_3": SMALL,
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>": SMALL,
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": SMALL,
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": SMALL,
        "Memcpy DtoD (Device -> Device)": SMALL,
        "Memcpy HtoD (Pinned -> Device)": HOST_COPY,
        "void somebody::elses_kernel": OTHER,
    }
    assert {name: category(name) for name in names} == names


def test_limits_in_words() -> None:
    from bench.kernels import limited_by

    kernels = [("gemm_a", 0.05), ("layer_norm", 0.02), ("gemm_b", 0.01), ("flash_fwd", 0.015), ("strange", 0.005)]
    busy = "matrix products 60 %, element-wise, norms, copies 20 %, attention 15 %"
    assert limited_by(kernels, 0.11) == busy
    assert limited_by(kernels, 0.09) == busy  # a profiler's clock may run a little fast
    assert limited_by(kernels, 0.4) == "the host: device idle 75 % of the step, 5 kernels"
    assert limited_by([], 0.4) == "not measured"


# -- the whole section ---------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    from bench import gpu, gpu_case, gpu_models

    monkeypatch.setattr(gpu_case, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(gpu_case, "SMALL_BATCH", IMAGES)
    monkeypatch.setattr(gpu_models, "CLASSES", CLASSES)
    monkeypatch.setattr(gpu, "copy_rates", lambda device: {"device to device": 1e9})
    tiny = gpu_models.models()["tiny"]
    return partial(gpu.measure_all, [tiny], batch=IMAGES, rounds=2, device=CPU, backend="eager")


def test_a_row_for_every_variant(
    quick: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import gpu
    from bench.gpu_models import cases, compiled_cases, models

    tiny = models()["tiny"]
    last_third, *_ = compiled_cases(tiny)
    monkeypatch.setattr(gpu, "compiled_cases", lambda model: [last_third])
    text = quick(with_compiled=True, json=tmp_path / "raw.json")
    assert (tmp_path / "raw.md").read_text() == f"{text}\n"
    labels = [(case.name, case.label(name)) for case in cases(tiny) for name in case.variants]
    endings = ("", ", compiled")
    labels += [(last_third.name, f"{last_third.label(name)}{end}") for end in endings for name in last_third.variants]
    (section,) = json.loads((tmp_path / "raw.json").read_text())["sections"]
    results = section["results"]
    assert [(one["case"], one["variant"]) for one in results] == labels
    watched = capsys.readouterr().err
    for one in results:
        assert one["problem"] is None
        assert len(one["seconds"]) == 2 and min(one["seconds"]) > 0
        assert one["flops"]["total"] > 0
        assert f"| {one['case']} | {one['variant']} | {IMAGES} |" in text
        assert f"{one['case']} | {one['variant']} | {IMAGES} |" in watched
        assert (one["first_seconds"] is not None) == (len(one["over_eager"]) == 2) == one["variant"].endswith("piled")
        # the backend of this test computes what eager code does
        assert one["eager_difference"] in (None, 0.0)
    against_sam = [one for one in results if one["over_sam"]]
    # of the compiled case all, and those of its eager twins but the one that is the measure
    assert len(against_sam) == sum(len(case.variants) - 1 for case in cases(tiny)) + 2 * len(last_third.variants) - 1
    assert len(section["agreements"]) == 4
    for one in section["agreements"]:
        assert one["wide"] < 1e-5
        assert 1e-4 < one["mixed"] < 3 * one["rounding"] < 0.3
    assert section["left_out"] == []


def test_no_case_is_started_when_the_minutes_are_used_up(quick: Callable[..., str]) -> None:
    from bench.gpu_models import cases, models

    text = quick(minutes=0.0)
    names = [case.name for case in cases(models()["tiny"])]
    assert text.endswith(f"Left out, as the minutes were used up: {'; '.join(names)}.")


class _FakePair:
    """Its peer needs memory for whole batches that is not there; one of ours fails in another way."""

    def __init__(self, error: Exception, limit: int) -> None:
        self.classifier, self.peer = nn.Linear(1, 1), nn.Linear(1, 1)
        self._error, self._limit = error, limit

    def steps(self, batch_size: int, **_: Any) -> dict[str, Any]:
        from bench.steps import Step

        weight = torch.ones(3)

        def step(error: Exception | None) -> Step:
            def run() -> None:
                if error is not None and batch_size > self._limit:
                    raise error
                weight.grad = weight @ torch.ones(3, 3)

            return Step(run, {"weight": weight})

        names = ("erm", *(f"our {method}{end}" for method in ("disam", "sam", "erm") for end in ("", ", stored")))
        return {"sam": step(self._error), **{name: step(None) for name in names}}


@pytest.mark.parametrize(
    "error, batches",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB"), [8, 4]),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), [8, 4]),
        (ValueError("something else\nin two lines"), [8]),
    ],
)
def test_a_failure_is_an_entry_and_memory_is_tried_with_less(
    quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, batches: list[int]
) -> None:
    from bench import gpu, gpu_case
    from bench.gpu_models import Case

    monkeypatch.setattr(gpu_case, "SMALL_BATCH", 1)
    variants = ("sam", "erm", "our disam")
    case = Case("fake", lambda folder, device: _FakePair(error, limit=4), "peer", variants)
    monkeypatch.setattr(gpu, "cases", lambda model: [case])
    monkeypatch.setattr(gpu, "write_clip", lambda folder, config: None)
    monkeypatch.setattr(gpu, "save", lambda path, facts, sections: kept.extend(sections))
    kept: list[Any] = []
    text = quick(batch=8, json=tmp_path / "raw.json")
    results = {(one.variant, one.batch): one for one in kept[-1].results}
    assert list(results) == [(case.label(name), size) for size in batches for name in variants]
    failed = results["naive SAM", 8]
    expected = "out of memory" if len(batches) == 2 else "failed: ValueError: something else"
    assert failed.problem == expected
    assert f"**{expected}**" in text
    for key, one in results.items():
        assert (one.problem is None) == (len(one.seconds) == 2) == (key != ("naive SAM", 8))
    assert len(results["ours: DISAM", 8].over_erm) == 2 and not results["ours: DISAM", 8].over_sam
    if len(batches) == 2:
        assert len(results["ours: DISAM", 4].over_sam) == 2


def test_a_case_that_cannot_be_built_takes_no_other_with_it(
    quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import gpu
    from bench.gpu_models import Case, cases, models

    def missing(folder: Path, device: torch.device) -> Any:
        raise OSError("no such file")

    tried: list[Path] = []
    write_clip = gpu.write_clip

    def full_at_first(folder: Path, config: Any) -> None:
        tried.append(folder)
        if len(tried) == 1:
            raise OSError("no space left")
        write_clip(folder, config)

    probe = cases(models()["tiny"])[-1]
    gone = Case("gone", missing, "peer", ("sam", "erm"))
    monkeypatch.setattr(gpu, "cases", lambda model: [gone, gone, probe])
    monkeypatch.setattr(gpu, "write_clip", full_at_first)
    text = quick()
    assert "OSError: no space left" in capsys.readouterr().err
    assert text.count("| gone | all | 6 |") == text.count("**failed: OSError: no such file**") == 1
    assert f"| {probe.name} | ours: ERM, stored | 6 |" in text


def test_what_cannot_be_counted_is_timed_all_the_same(
    quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench import gpu, gpu_case
    from bench.gpu_models import Case

    def forbidden(*_: Any) -> Any:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(gpu_case, "kernels_of", forbidden)
    monkeypatch.setattr(gpu_case, "count_flops", forbidden)
    monkeypatch.setattr(gpu_case, "SMALL_BATCH", 1)
    fits = Case("fake", lambda folder, device: _FakePair(ValueError(), limit=IMAGES), "peer", ("sam", "erm"))
    monkeypatch.setattr(gpu, "cases", lambda model: [fits])
    monkeypatch.setattr(gpu, "write_clip", lambda folder, config: None)
    text = quick(json=tmp_path / "raw.json")
    for one in json.loads((tmp_path / "raw.json").read_text())["sections"][0]["results"]:
        assert one["problem"] is None and len(one["seconds"]) == 2
        assert one["missing"] == ["failed: RuntimeError: not permitted"] * 2
    assert text.count("| not measured |") == 2


# -- compiled blocks -----------------------------------------------------------------------------------------


def test_blocks_are_compiled_only_while_switched_on(folder: Path) -> None:
    from bench.compiled import compile_blocks, compiled
    from bench.lora import lora_pair
    from bench.steps import difference

    pair, seen = lora_pair(folder, 1, CPU), []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    step = pair.steps(IMAGES)["erm"]
    eager = step.gradients()
    switched_on = compile_blocks(pair.peer, backend)
    assert difference(step.gradients(), eager) == 0
    assert not seen
    assert difference(compiled(step, switched_on).gradients(), eager) < 1e-6
    count = len(seen)
    assert count > 0
    step.run()
    assert len(seen) == count
    with pytest.raises(ValueError, match="no block"):
        compile_blocks(nn.Linear(1, 1))
