"""Adapters of the peft library beyond those of ``adapter_cells``: each is in one test that asks for all promises."""

from __future__ import annotations

from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig

BLOCKS, PROJECTIONS = [2], ["q", "v", "fc2"]


def _peft(method: str, **options: bool | int | float | str | None) -> PeftAdapterConfig:
    return PeftAdapterConfig(method=method, blocks=BLOCKS, projections=PROJECTIONS, options=options, seed=1)


TUNERS: dict[str, AdapterConfig] = {
    "road": _peft("road"),
    "road-4": _peft("road", variant="road_4", group_size=8),
    "miss": _peft("miss", r=4),
    "miss-uneven": _peft("miss", r=5),
    "shira": _peft("shira", r=4),
    "waveft": _peft("waveft", n_frequency=300, scaling=1.0),
    "waveft-none": _peft("waveft", n_frequency=300, scaling=1.0, use_idwt=False),
    "beft": _peft("beft"),
    "gralora": _peft("gralora", r=4, alpha=4),
    "gralora-hybrid": _peft("gralora", r=4, alpha=4, hybrid_r=2),
    "glora": _peft("glora", r=2),
    "tinylora": _peft("tinylora", u=8),
    "tinylora-tied": _peft("tinylora", u=8, weight_tying=0.6),
    "boft": _peft("boft"),
    "boft-number": _peft("boft", boft_block_num=4),
    "lora-orthogonal": LoraAdapterConfig(blocks=BLOCKS, projections=PROJECTIONS, init="orthogonal", rank=2, seed=1),
    "lora-pissa": LoraAdapterConfig(blocks=BLOCKS, projections=PROJECTIONS, init="pissa", rank=2),
    "lora-olora": LoraAdapterConfig(blocks=BLOCKS, projections=PROJECTIONS, init="olora", rank=2),
    "lora-bias": LoraAdapterConfig(blocks=BLOCKS, projections=PROJECTIONS, bias=True, rank=2, seed=1),
    "lora-pattern": LoraAdapterConfig(
        blocks=BLOCKS,
        projections=PROJECTIONS,
        rank=2,
        alpha_over="sqrt_rank",
        init="pissa",
        rank_pattern={"fc2": 4, "2": 3, "2.fc2": 5},
        alpha_pattern={"image.q": 3.0},
    ),
}
