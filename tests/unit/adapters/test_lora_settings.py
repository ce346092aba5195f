"""LoRA's settings beyond rank and alpha: patterns, starts, biases, and the scaling of CLIP-LoRA; and what peft's tuners
cannot have."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import peft
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.peft.plan import plan, resolved
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.open_clip.attention import SplitAttention
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.recipe import load_recipe
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import PROMPTS, tiny_backbone
from tests.helpers.paths import RECIPES, REFERENCE
from tests.helpers.tuner_cells import TUNERS

VALUES = np.load(REFERENCE / "clip_lora.npz")
CASES = json.loads(str(VALUES["meta"]))["cases"]
NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "proj"}


@pytest.fixture
def backbone(twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, "open_clip", torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_attention_under_lora_is_that_of_clip_lora(backbone: ClipBackbone, case: str) -> None:
    """Output and gradients of the authors' code; its scaling is ``alpha_over: sqrt_rank``."""

    def value(key: str) -> Tensor:
        return torch.from_numpy(VALUES[f"{case}/{key}"])

    settings = CASES[case]
    config = LoraAdapterConfig(
        projections=["out" if name == "o" else name for name in settings["enable"]],
        rank=settings["r"],
        alpha=settings["alpha"],
        alpha_over="sqrt_rank",
        dropout=settings["dropout"],
    )
    names = [name for name in NAMES if f"{case}/{NAMES[name]}.w_lora_A" in VALUES]
    fused = nn.MultiheadAttention(16, settings["heads"], batch_first=True, dtype=torch.float64)
    fused.load_state_dict({name: value(f"mha.{name}") for name in fused.state_dict()})
    peft_config = dataclasses.replace(plan(config, backbone)[1], target_modules=names)
    attention = peft.inject_adapter_in_model(peft_config, SplitAttention(fused)).eval()
    factors: dict[str, nn.Parameter] = {}
    for name in names:
        for letter in "AB":
            factor = attention.get_submodule(f"{name}.lora_{letter}.default").get_parameter("weight")
            with torch.no_grad():
                factor.copy_(value(f"{NAMES[name]}.w_lora_{letter}"))
            factors[f"{NAMES[name]}.w_lora_{letter}"] = factor
    x_BLW = value("x").transpose(0, 1)
    mask_LL = torch.full((x_BLW.shape[1],) * 2, float("-inf"), dtype=torch.float64).triu(1)
    out_BLW, _ = attention(x_BLW, x_BLW, x_BLW, attn_mask=mask_LL)
    assert (out_BLW.transpose(0, 1) - value("out")).abs().max() <= 1e-12
    gradients = torch.autograd.grad(out_BLW.square().sum(), list(factors.values()))
    for name, gradient in zip(factors, gradients, strict=True):
        if f"{case}/grad_{name}" in VALUES:
            assert (gradient - value(f"grad_{name}")).abs().max() <= 1e-10 * gradient.abs().max(), name


def test_the_recipe_of_clip_lora_is_the_paper() -> None:
    adapter = load_recipe(RECIPES / "pacs" / "clip_lora.yaml").adapter
    assert isinstance(adapter, LoraAdapterConfig)
    assert (adapter.rank, adapter.alpha, adapter.alpha_over, adapter.dropout) == (2, 1, "sqrt_rank", 0.25)
    assert (adapter.towers, adapter.blocks, adapter.projections) == (["image", "text"], "all", ["q", "k", "v"])


def test_the_key_with_most_parts_counts(backbone: ClipBackbone) -> None:
    config = LoraAdapterConfig(towers=["image", "text"], projections=["q", "fc1"], rank_pattern={"2": 3, "text.fc1": 5})
    targets, peft_config = plan(config, backbone)
    ranks = {(target.tower, target.block, target.projection): 8 for target in targets}
    for target in targets:
        if target.block == 2:
            ranks[target.tower, 2, target.projection] = 3
        if (target.tower, target.projection) == ("text", "fc1"):
            ranks["text", target.block, "fc1"] = 5
    found = {target.name: peft_config.rank_pattern.get(target.name, 8) for target in targets}
    assert found == {target.name: ranks[target.tower, target.block, target.projection] for target in targets}
    with pytest.raises(UserError, match=r"rank_pattern: 'fc2' names nothing that is adapted.* projection \(q fc1"):
        resolved("rank_pattern", {"fc2": 2}, backbone, targets)
    with pytest.raises(UserError, match=r"'fc1' and '2' both name .*2.mlp.c_fc; add a key that has both parts"):
        resolved("rank_pattern", {"fc1": 2, "2": 3}, backbone, targets)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_is_peft_s_and_leaves_them(backbone: ClipBackbone, init: str) -> None:
    """peft takes the part out of the layer; here the layer stays, and the file has both."""
    weight = backbone.base_parameters()["visual.transformer.resblocks.2.attn.v_proj.weight"].clone()
    adapter = build_adapter(
        LoraAdapterConfig(init=init, rank=4, blocks=[2], projections=["v"]),
        backbone,
        PROMPTS,
    )
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["v"], init_lora_weights=init),
        nn.ModuleDict({"v": _linear(weight)}),
    )
    layer = theirs.get_submodule("v")
    a, b = (layer.get_submodule(f"lora_{letter}.default").get_parameter("weight") for letter in "AB")
    state = {name.split(".")[-2]: tensor for name, tensor in adapter.state().items()}
    assert torch.equal(state["lora_A"], torch.cat([a, a])) and torch.equal(state["lora_B"], torch.cat([b, -b], dim=1))
    assert not torch.equal(layer.get_submodule("base_layer").get_parameter("weight"), weight)
    assert backbone.current_hash() == backbone.base_hash
    assert isinstance(adapter, PeftAdapter)
    assert (adapter.peft_json["r"], adapter.peft_json["lora_alpha"]) == (8, 32)
    assert adapter.peft_json["init_lora_weights"] is True


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.clone())
    return layer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "eva"}, "EVA would start from what goes through each layer on training images"),
        ({"init": "corda"}, "CorDA would start from what goes through"),
        ({"init": "pissa_niter_4"}, "use init: pissa"),
        ({"init": "pissa", "dropout": 0.1}, "dropout would take it out of the model"),
        ({"init": "olora", "bias": True}, "peft has no bias with init: olora"),
        ({"init": "orthogonal", "rank_pattern": {"q": 3}}, "halves the rank, and 3 is odd"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q": 0}}, "alpha_pattern"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraAdapterConfig(**settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraAdapterConfig(init="pissa", rank=33), r"init: pissa takes a part of the weights.*at most 32"),
        (LoraAdapterConfig(bias=True, projections=["q", "k"]), "that of keys .* cannot change any output"),
        (PeftAdapterConfig(method="beft", projections=["k"]), "that of keys .* cannot change any output"),
        (PeftAdapterConfig(method="tinylora", options={"r": 4096, "u": 4096}), "ask for u \\* r \\* r = 68719476736"),
        (PeftAdapterConfig(method="boft", options={"boft_n_butterfly_factor": 2}), "cannot be set here"),
        (PeftAdapterConfig(method="waveft", options={"n_frequency": 10**6}), "peft cannot attach"),
        (PeftAdapterConfig(method="road", options={"group_size": 3}), "peft refuses the options"),
    ],
)
def test_what_a_layer_cannot_have(backbone: ClipBackbone, config: AdapterConfig, message: str) -> None:
    before = dict(backbone.model.named_modules())
    with pytest.raises(UserError, match=message):
        build_adapter(config, backbone, PROMPTS)
    assert dict(backbone.model.named_modules()) == before


def test_a_bias_for_a_layer_without_one_could_not_be_merged(backbone: ClipBackbone) -> None:
    name = "visual.transformer.resblocks.0.attn.q_proj"
    backbone.model.get_submodule(name).register_parameter("bias", None)
    del backbone._base[f"{name}.bias"]
    with pytest.raises(UserError, match=r"trains a bias for each layer, and .*0.attn.q_proj of .* has none"):
        build_adapter(LoraAdapterConfig(bias=True), backbone, PROMPTS)


@pytest.mark.parametrize("place", [-1, 32])
def test_places_outside_of_the_weights_load_nothing(backbone: ClipBackbone, place: int) -> None:
    adapter = build_adapter(TUNERS["shira"], backbone, PROMPTS)
    before = adapter.state()
    name = next(name for name in before if name.endswith("q_proj.shira_indices"))
    indices = before[name].clone()
    indices[0, 0] = place
    with pytest.raises(UserError, match=r"shira_indices has places up to .* Nothing was loaded"):
        adapter.load_state({**before, name: indices})
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state().items())
