"""``export --to lora``: the nearest LoRA of a rank, its errors, and what no LoRA has."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.classification.saved_classifier import load_adapter
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.export import check_form
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import Notice, UserError
from disam_peft.export.lora import LORA_NOTE, export_lora, lora_of, truncated
from tests.helpers.adapter_cells import CELLS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.tuner_cells import TUNERS


def test_the_nearest_matrix_of_a_rank() -> None:
    """Its error is that of the singular values which are left out (Eckart and Young 1936)."""
    delta = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in (2, 5, 9):
        A, B, rest = truncated(delta, rank)
        assert A.shape == (rank, 7) and B.shape == (5, rank)
        values = torch.linalg.svdvals(delta)[rank:]
        assert torch.allclose(torch.linalg.matrix_norm(delta - B @ A), values.norm(), atol=1e-13)
        assert torch.allclose(rest, values)


@pytest.mark.parametrize(
    "config",
    [
        TUNERS["road"],
        pytest.param(TUNERS["gralora"], marks=pytest.mark.slow),
        pytest.param(TUNERS["lora-pattern"], marks=pytest.mark.slow),
        pytest.param(CELLS["dora"], marks=pytest.mark.slow),
        pytest.param(CELLS["lora-both"], marks=pytest.mark.slow),
        pytest.param(CELLS["lora-scale"], marks=pytest.mark.slow),
        pytest.param(CELLS["oft"], marks=pytest.mark.slow),
    ],
)
def test_enough_rank_is_exact_and_less_says_its_error(twins: tuple[str, str], config: AdapterConfig) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), config, scramble=0.1)
    wanted = classifier(pixels())
    made, found = lora_of(classifier, 32)  # the width
    assert found.relative_error <= 1e-7 and not found.left_out
    assert (made(pixels()) - wanted).abs().max() <= 1e-10 and found.logit_difference <= 1e-10
    assert torch.equal(classifier(pixels()), wanted)
    made, found = lora_of(classifier, 1)
    assert found.relative_error > 0.1 and found.logit_difference > 1e-4
    assert classifier.adapter is not None and made.adapter is not None
    end = classifier.adapter.merged_weights(classifier.backbone)
    base, near = classifier.backbone.base_parameters(), made.adapter.merged_weights(made.backbone)
    squares = torch.zeros(2, dtype=torch.float64)
    for layer, error in found.layers.items():
        name = f"{layer}.weight"
        off, change = (end[name] - near[name]).norm(), (end[name] - base[name]).norm()
        assert float(off / change) == pytest.approx(error, abs=1e-9)
        squares += torch.stack((off, change)).detach() ** 2
    assert float((squares[0] / squares[1]).sqrt()) == pytest.approx(found.relative_error, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_tower_and_what_no_lora_has(twins: tuple[str, str], dtype: torch.dtype, tmp_path: Path) -> None:
    backbone = tiny_backbone(twins, "transformers", dtype)
    classifier = tiny_classifier(backbone, FullConfig(blocks=[1, 2], projection=True), scramble=0.02)
    images = pixels(dtype=dtype)
    with pytest.warns(Notice, match=r"LoRA of rank 4 lacks \d+ % .* changed weights are left out, which no LoRA has"):
        found = export_lora(tmp_path / "lora", classifier, rank=4)
    assert 0.1 < found.relative_error < 1 and "visual_projection" in found.layers
    assert any("layer_norm1" in name for name in found.left_out)
    assert json.loads((tmp_path / "lora" / LORA_NOTE).read_text())["layers"] == found.layers
    if dtype != torch.float32:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_adapter(tmp_path / "lora")
        from peft import PeftModel
        from transformers import CLIPModel

        plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(twins[1]), str(tmp_path / "lora"))
    assert isinstance(again, ClipClassifier) and isinstance(again.adapter.config, LoraAdapterConfig)
    features = plain.get_image_features(pixel_values=images).pooler_output
    assert torch.allclose(again.backbone.encode_image(images), features, atol=1e-5)
    difference = (again(images) - classifier(images)).abs().max()
    assert 0.1 * found.logit_difference < difference < 10 * found.logit_difference


@pytest.mark.parametrize("cell", ["ln_tuning", "beft", "coop-shared"])
def test_what_changes_no_linear_layer_is_refused(twins: tuple[str, str], cell: str) -> None:
    config = PeftAdapterConfig(method="beft", blocks=[2]) if cell == "beft" else CELLS[cell]
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), config)
    with pytest.raises(UserError, match=r"changes no weights of linear layers|no weights of the backbone to merge"):
        lora_of(classifier, 4)


def test_a_rank_belongs_to_lora() -> None:
    check_form("lora", 4)
    with pytest.raises(UserError, match="--rank 4 is for --to lora"):
        check_form("merged", 4)
    with pytest.raises(UserError, match="--rank 0 is no rank; give a number from 1 to 4096"):
        check_form("lora", 0)
