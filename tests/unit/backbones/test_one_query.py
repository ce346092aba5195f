"""The last block for one position, its products in another order: value and gradient of the family's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.blocks import AFFINE
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from tests.helpers.adapter_cells import FAMILIES, PROMPTS, tiny_backbone
from tests.helpers.towers import assert_same, pixels, whole_image, whole_text

CONFIGS = {
    "k and v plain": LoraAdapterConfig(towers=["image", "text"], blocks=[1], projections=["q", "fc1"], rank=2, seed=1),
    "v adapted": LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1),
    "k adapted": LoraAdapterConfig(towers=["image", "text"], projections=["k"], rank=2, seed=1),
    "k and v adapted": LoraAdapterConfig(towers=["image", "text"], projections=["k", "v", "out"], rank=2, seed=1),
    "dora": PeftAdapterConfig(method="dora", towers=["image", "text"], options={"r": 2}, seed=1),
    "dropout": LoraAdapterConfig(towers=["image", "text"], rank=2, dropout=0.5, seed=1),
    "not known to be affine": PeftAdapterConfig(method="loha", towers=["image", "text"], options={"r": 2}, seed=1),
}


def adapted(twins: tuple[str, str], family: str, config: Any) -> tuple[ClipBackbone, list[Tensor]]:
    backbone = tiny_backbone(twins, family)
    trained: list[Tensor] = list(build_adapter(config, backbone, PROMPTS).double().eval().trainable().values())
    with torch.no_grad():
        for number, p in enumerate(trained):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number), dtype=p.dtype)
    return backbone, trained


def last_projections(backbone: ClipBackbone) -> list[nn.Module]:
    return [
        backbone.model.get_submodule(target.name)
        for target in backbone.targets()
        if target.block == 2 and target.projection in ("k", "v")
    ]


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_towers_in_value_and_gradient(twins: tuple[str, str], family: str, case: str) -> None:
    backbone, trained = adapted(twins, family, CONFIGS[case])
    images, tokens = pixels(4), backbone.tokenize(["a dog", "a sketch of an elephant, isn't it?", "x"])

    def ours() -> Tensor:
        return backbone.encode_image(images) @ backbone.encode_text(tokens).T

    assert_same(ours, lambda: whole_image(backbone, images) @ whole_text(backbone, tokens).T, trained, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case, seen", [("k and v plain", [0, 0]), ("v adapted", [0, 2]), ("dropout", [0, 5])])
def test_no_more_rows_than_needed_go_through_keys_and_values(
    twins: tuple[str, str], family: str, case: str, seen: list[int]
) -> None:
    backbone, _ = adapted(twins, family, CONFIGS[case])
    rows = {"k": 0, "v": 0}
    for target in backbone.targets():
        if target.tower == "image" and target.block == 2 and target.projection in rows:
            module: Any = backbone.model.get_submodule(target.name)
            inner = getattr(module, "base_layer", module)

            def counting(x: Tensor, name: str = target.projection, compute: Any = inner.forward) -> Tensor:
                rows[name] += x.shape[1]
                return compute(x)

            # Beneath an adapted layer; a plain one that somebody watches would be run as it stands.
            if inner is not module:
                inner.forward = counting
    backbone.encode_image(pixels(3))
    assert [rows["k"], rows["v"]] == seen  # two heads, five tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_that_is_watched_is_called(twins: tuple[str, str], family: str) -> None:
    backbone, _ = adapted(twins, family, CONFIGS["v adapted"])
    expected = backbone.encode_image(pixels(3))
    shapes = []
    for module in last_projections(backbone)[:2]:
        module.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape)))
    again = backbone.encode_image(pixels(3))
    assert shapes == [(3, 5, 32), (3, 5, 32)]
    assert (again - expected).abs().max() < 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_are_marked_are_affine_and_so_is_no_other(twins: tuple[str, str], family: str) -> None:
    marked = {}
    for case, config in CONFIGS.items():
        backbone, _ = adapted(twins, family, config)
        value = last_projections(backbone)[1]
        marked[case] = getattr(value, AFFINE, False)
        if marked[case]:
            x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            weights = torch.tensor([0.2, 0.5, 0.1, 0.3, -0.1], dtype=torch.float64)
            assert torch.allclose(value(weights @ x), weights @ value(x), rtol=1e-12, atol=1e-12)
    assert marked == {
        "k and v plain": False,
        "v adapted": True,
        "k adapted": False,
        "k and v adapted": True,
        "dora": True,
        "dropout": False,
        "not known to be affine": False,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_not_rounded_under_autocast(twins: tuple[str, str], family: str) -> None:
    backbone, _ = adapted(twins, family, CONFIGS["v adapted"])
    backbone.to(dtype=torch.float32)
    expected, hidden = (
        backbone.encode_image(pixels(4, torch.float32)),
        backbone.image_trunk(pixels(4, torch.float32), 2),
    )
    with torch.autocast("cpu", torch.bfloat16):
        near = backbone.image_head(hidden, 2)
    assert near.dtype == torch.bfloat16
    assert 1e-5 < (near - expected).norm() / expected.norm() < 0.02
