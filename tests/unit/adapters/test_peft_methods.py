"""peft's methods by name and options; precision, dropout and seeds of what peft attaches."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from disam_peft.adapters.peft.methods import METHODS
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import (
    ALL_LINEAR,
    CELLS,
    FAMILIES,
    PEFT_CELLS,
    PROMPTS,
    pixels,
    tiny_backbone,
    tiny_classifier,
)
from tests.helpers.timm_towers import tiny_timm
from tests.helpers.tuner_cells import TUNERS


@pytest.fixture
def backbone(twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, "open_clip", torch.float32)


def test_every_method_is_a_cell_of_the_contract() -> None:
    cells = [*CELLS.values(), *TUNERS.values()]
    tested = {config.method for config in cells if isinstance(config, PeftAdapterConfig)}
    assert tested | {"lora"} == METHODS.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "dorra"}, "unknown peft method 'dorra'; did you mean 'dora'"),
        ({"method": "adalora"}, "unknown peft method 'adalora'"),
        ({"method": "dora", "options": {"lora_alhpa": 4}}, "unknown option 'lora_alhpa'.*did you mean 'lora_alpha'"),
        ({"method": "oft", "options": {"oft_block_size": "wide"}}, "peft (refuses|cannot attach)"),
        ({"method": "ln_tuning", "options": {"r": 4}}, "'ln_tuning' takes: no options"),
    ],
)
def test_a_method_or_option_that_does_not_exist(
    backbone: ClipBackbone, config: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_adapter(PeftAdapterConfig(**config), backbone, PROMPTS)


@pytest.mark.parametrize(
    "option",
    ["target_modules", "modules_to_save", "layers_to_transform", "auto_mapping", "use_dora", "bias", "loftq_config",
     "init_lora_weights", "target_parameters", "megatron_core", "inference_mode"],
)  # fmt: skip
def test_row_42_options_that_reach_beyond_the_adapter(backbone: ClipBackbone, option: str) -> None:
    with pytest.raises(UserError, match=f"option '{option}' of peft method 'dora' cannot be set here"):
        build_adapter(PeftAdapterConfig(method="dora", options={option: "all"}), backbone, PROMPTS)


def test_options_change_what_is_built(backbone: ClipBackbone) -> None:
    adapter = build_adapter(PeftAdapterConfig(method="lora", options={"r": 3, "lora_alpha": 6}), backbone, PROMPTS)
    assert {p.shape[0] for name, p in adapter.trainable().items() if "lora_A" in name} == {3}
    assert isinstance(adapter, PeftAdapter)
    assert adapter.peft_json["lora_alpha"] == 6
    assert sorted({name.split(".")[-3] for name in adapter.trainable()}) == ["q_proj", "v_proj"]


def test_lora_settings_reach_peft(backbone: ClipBackbone) -> None:
    adapter = build_adapter(LoraAdapterConfig(rank=2, alpha=6, dropout=0.25, projections=["fc1"]), backbone, PROMPTS)
    _, layer = adapter._layers()[0]
    assert layer.r == {"default": 2} and layer.scaling == {"default": 3.0}
    assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"towers": []},
        {"blocks": [-1]},
        {"blocks": {"last": 0}},
        {"blocks": "last"},
        {"projections": []},
        {"rnk": 4},
    ],
)
def test_values_that_no_adapter_can_have(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoraAdapterConfig(**bad)


def test_ia3_scales_fc2_at_its_input_and_attention_at_its_output(backbone: ClipBackbone) -> None:
    adapter = build_adapter(CELLS["ia3"], backbone, PROMPTS)
    shapes = {name.split(".")[-2]: tuple(p.shape) for name, p in adapter.trainable().items()}
    assert shapes == {"k_proj": (32, 1), "v_proj": (32, 1), "c_proj": (1, 128)}


def test_oft_blocks_divide_every_width(backbone: ClipBackbone) -> None:
    adapter = build_adapter(PeftAdapterConfig(method="oft", projections=ALL_LINEAR), backbone, PROMPTS)
    blocks = {name.split(".")[-3]: p.shape[0] for name, p in adapter.trainable().items()}
    assert blocks["q_proj"] == 1 and blocks["c_proj"] == 4  # inputs of 32 and 128, in blocks of 32


def test_dropout_follows_the_mode_and_the_backbone_stays_in_eval(backbone: ClipBackbone) -> None:
    classifier = tiny_classifier(backbone, LoraAdapterConfig(dropout=0.5, seed=0), scramble=0.3)
    images = pixels(dtype=torch.float32)
    classifier.train()
    assert not torch.equal(classifier(images), classifier(images))
    training = {name for name, module in classifier.model.named_modules() if module.training}
    assert training and all("q_proj" in name or "v_proj" in name for name in training)
    assert not any("base_layer" in name for name in training)
    classifier.eval()
    assert torch.equal(classifier(images), classifier(images))


def test_a_seed_fixes_the_initial_weights_and_leaves_the_global_generator(backbone: ClipBackbone) -> None:
    def initial(seed: int | None) -> torch.Tensor:
        adapter = build_adapter(LoraAdapterConfig(seed=seed), backbone, PROMPTS)
        state = adapter.state()
        adapter.detach(backbone)
        return torch.cat([tensor.flatten() for tensor in state.values()])

    torch.manual_seed(5)
    first, after_first = initial(7), torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(initial(7), first)
    assert not torch.equal(initial(8), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), after_first)
    drawn = initial(None)  # unset: the run's seed decides
    torch.manual_seed(5)
    assert torch.equal(initial(None), drawn)
    torch.manual_seed(6)
    assert not torch.equal(initial(None), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", CELLS)
def test_trained_parameters_are_float32_in_a_half_precision_backbone(
    twins: tuple[str, str], family: str, cell: str
) -> None:
    backbone = tiny_backbone(twins, family, torch.bfloat16)
    before = backbone.current_hash()
    classifier = tiny_classifier(backbone, cell)
    assert {p.dtype for p in classifier.trainable().values()} == {torch.float32}
    logits = classifier.train()(pixels(dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 2, 1, 0])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in classifier.trainable().values())
    wide = tiny_classifier(tiny_backbone(twins, family, torch.float32), cell)
    wanted = wide(pixels(dtype=torch.bfloat16).float())
    assert (logits - wanted).abs().max() < 0.06 * wanted.abs().max()
    assert backbone.current_hash() == before


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", PEFT_CELLS)
def test_row_43_half_precision_is_merged_in_float32(twins: tuple[str, str], family: str, cell: str) -> None:
    backbone = tiny_backbone(twins, family, torch.bfloat16)
    classifier = tiny_classifier(backbone, cell, scramble=0.01)
    assert classifier.adapter is not None
    merged = classifier.adapter.merged(backbone).state_dict()
    # The same in float32 throughout, from the same rounded base: merging must add one rounding and no more.
    wide = tiny_backbone(twins, family, torch.bfloat16).to(dtype=torch.float32)
    reference = tiny_classifier(wide, cell, scramble=0.01)
    assert reference.adapter is not None
    reference.adapter.load_state(classifier.adapter.state())
    wanted = reference.adapter.merged(wide).state_dict()
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, wanted[name].bfloat16()), name


def test_row_43_nothing_is_saved_or_merged_while_merged(backbone: ClipBackbone) -> None:
    classifier = tiny_classifier(backbone, "lora-image")
    adapter = classifier.adapter
    assert isinstance(adapter, PeftAdapter)
    state = adapter.state()
    adapter.peft_model.merge_adapter()
    for act in (adapter.state, lambda: adapter.merged(backbone), lambda: adapter.load_state(state)):
        with pytest.raises(UserError, match="merged into the live model"):
            act()
    adapter.peft_model.unmerge_adapter()
    adapter.load_state(state)


def test_a_merge_that_gives_nan_is_refused(backbone: ClipBackbone) -> None:
    classifier = tiny_classifier(backbone, "lora-image")
    next(iter(classifier.trainable().values())).data.fill_(float("inf"))
    assert classifier.adapter is not None
    with pytest.raises(UserError, match="not finite"):
        classifier.adapter.merged(backbone)


@pytest.mark.slow
def test_a_norm_over_channels_is_not_trained_in_half_precision() -> None:
    backbone = tiny_timm("vitamin", torch.bfloat16)
    with pytest.raises(UserError, match=r"is a LayerNormAct2d, which ln_tuning cannot train inside a half-precision"):
        build_adapter(PeftAdapterConfig(method="ln_tuning", projections=["stem_pre_norm"]), backbone, PROMPTS)
    build_adapter(PeftAdapterConfig(method="ln_tuning"), backbone, PROMPTS)
