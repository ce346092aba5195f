"""The mean of adapters as one adapter: LoRA exactly, whatever is linear by its tensors, and what is refused."""

import pytest
import torch

from disam_peft.adapters.peft.lora_soup import mean_of_products
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import ADAPTERS, build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig, LinearProbeConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.errors import UserError

PROMPTS = ClassPrompts(("red", "blue"), ("a photo of a {}.",))


def filled(config, backbone, seed):
    """The state of an adapter with other numbers everywhere, and its merged weights where it has such."""
    adapter = build_adapter(config, backbone, PROMPTS)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        for name, tensor in adapter.state().items()
    }
    return state, weights(config, state, backbone, adapter)


def weights(config, state, backbone, adapter=None):
    adapter = adapter or build_adapter(config, backbone, PROMPTS)
    adapter.load_state(dict(state))
    try:
        merged = adapter.merged(backbone)
    except UserError:
        merged = None
    adapter.detach(backbone)
    return None if merged is None else {name: p.detach().double() for name, p in merged.named_parameters()}


def souped(configs, backbone):
    """(config, state) of the mean, its merged weights, and those of each ingredient."""
    pairs = [filled(config, backbone, seed) for seed, config in enumerate(configs)]
    config, state = ADAPTERS[type(configs[0])].soup(configs, [state for state, _ in pairs])
    return config, state, weights(config, state, backbone), [of for _, of in pairs]


def furthest_from_the_mean(found, each):
    means = {name: torch.stack([of[name] for of in each]).mean(dim=0) for name in found}
    return max(float((found[name] - means[name]).abs().max()) for name in found)


BLOCK = {"blocks": {"last": 1}}
LORA = [
    LoraAdapterConfig(**BLOCK, rank=2, alpha=3.0, dropout=0.2),
    LoraAdapterConfig(**BLOCK, rank=3, alpha=16.0, seed=7),
    LoraAdapterConfig(**BLOCK, rank=1, alpha=0.5),
]
PEFT_LORA = [
    PeftAdapterConfig(method="lora", options={"r": 4, "lora_alpha": 2, "use_rslora": True}),
    PeftAdapterConfig(method="lora"),
]


@pytest.mark.slow
@pytest.mark.parametrize("configs", [LORA, PEFT_LORA], ids=["lora", "peft lora"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_the_product_of_concatenated_factors_is_the_mean_of_the_products(openclip_name, configs, dtype, bound):
    backbone = load_backbone(BackboneConfig(name=openclip_name)).to("cpu", dtype)
    config, state, found, each = souped(configs, backbone)
    assert furthest_from_the_mean(found, each) <= bound
    assert furthest_from_the_mean(each[0], each) > 1e-3, "they differ"
    if configs is LORA:
        assert (config.rank, config.alpha, config.dropout) == (6, 6.0, 0.0)
        naive = {name: tensor.clone() for name, tensor in state.items()}
        assert next(tensor for name, tensor in naive.items() if "lora_A" in name).shape[0] == 6


def test_of_one_rank_and_scale_the_mean_of_the_factors_would_be_another_matrix():
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator), 2.0) for _ in range(3)]
    down, up = mean_of_products(factors)
    expected = sum(scale * b @ a for a, b, scale in factors) / 3
    assert (up @ down - expected).abs().max() < 1e-5
    of_factors = 2.0 * sum(b for _, b, _ in factors) / 3 @ (sum(a for a, _, _ in factors) / 3)
    assert (of_factors - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        PeftAdapterConfig(method="ia3"),
        PeftAdapterConfig(method="ln_tuning"),
        FullConfig(blocks={"last": 1}),
    ],
    ids=["ia3", "ln_tuning", "full"],
)
def test_the_mean_of_tensors_is_the_mean_of_the_weights(openclip_name, config):
    backbone = load_backbone(BackboneConfig(name=openclip_name)).to("cpu", torch.float64)
    _, _, found, each = souped([config, config], backbone)
    assert furthest_from_the_mean(found, each) <= 1e-12
    assert furthest_from_the_mean(each[0], each) > 1e-3


@pytest.mark.parametrize("config", [LinearProbeConfig(), CoOpConfig(context_tokens=2), ClipAdapterConfig()], ids=str)
def test_others_average_their_tensors_and_keep_their_settings(openclip_name, config):
    backbone = load_backbone(BackboneConfig(name=openclip_name))
    states = [filled(config, backbone, seed)[0] for seed in range(3)]
    seeded = [config.model_copy(update={"seed": seed}) for seed in range(3)]
    found, state = ADAPTERS[type(config)].soup(seeded, states)
    assert found == seeded[0]
    for name, tensor in state.items():
        expected = sum(of[name].double() for of in states) / 3
        assert (tensor - expected).abs().max() < 1e-6 and tensor.dtype == states[0][name].dtype


@pytest.mark.parametrize("method", ["dora", "oft", "loha", "vera"])
def test_methods_whose_weights_are_not_linear_in_their_tensors_are_refused(method):
    config = PeftAdapterConfig(method=method)
    with pytest.raises(UserError, match=f"'{method}' adapters cannot be averaged: the weights .* are not linear"):
        ADAPTERS[PeftAdapterConfig].soup([config, config], [{}, {}])


@pytest.mark.parametrize(
    ("configs", "told"),
    [
        ([ClipAdapterConfig(), ClipAdapterConfig(ratio=0.3)], "differ in ratio: 0.2 and 0.3; only adapters of equal"),
        ([LoraAdapterConfig(), LoraAdapterConfig(projections=["k"])], r"differ in projections: \['q', 'v'\] and"),
        ([LoraAdapterConfig(rank=4000), LoraAdapterConfig(rank=97)], "has rank 4097, beyond 4096; average fewer"),
    ],
    ids=["ratio", "projections", "rank"],
)
def test_what_does_not_fit_together_is_named(configs, told):
    with pytest.raises(UserError, match=told):
        ADAPTERS[type(configs[0])].soup(configs, [{}, {}])
    with pytest.raises(UserError, match=r"w has the shapes \[\(2,\), \(3,\)\].* Nothing|of equal shapes"):
        ADAPTERS[ClipAdapterConfig].soup([ClipAdapterConfig()] * 2, [{"w": torch.ones(2)}, {"w": torch.ones(3)}])
    with pytest.raises(UserError, match=r"do not have the same tensors \(v\)"):
        ADAPTERS[ClipAdapterConfig].soup([ClipAdapterConfig()] * 2, [{}, {"v": torch.ones(3)}])


@pytest.mark.parametrize("fault", ["narrow", "without B", "ranks", "one number"])
def test_factors_that_are_of_no_layer_are_refused(fault, openclip_name):
    """Files that training did not write: concatenating them would end in an error of torch."""
    config, backbone = LoraAdapterConfig(**BLOCK, rank=2), load_backbone(BackboneConfig(name=openclip_name))
    (good, _), (other, _) = (filled(config, backbone, seed) for seed in (0, 1))
    down = next(name for name in other if name.endswith("lora_A.weight"))
    up = down.replace("lora_A", "lora_B")
    changed = {
        "narrow": {down: other[down][:, 1:]},
        "without B": {name: tensor for name, tensor in other.items() if name != up},
        "ranks": {down: other[down][:1]},
        "one number": {down: other[down][0, 0]},
    }[fault]
    bad = changed if fault == "without B" else {**other, **changed}
    with pytest.raises(UserError, match=r"only adapters of equal (shapes|settings) can be averaged"):
        ADAPTERS[LoraAdapterConfig].soup([config, config], [good, bad])
    if fault == "without B":
        with pytest.raises(UserError, match="which are no factors of one layer"):
            ADAPTERS[LoraAdapterConfig].soup([config, config], [bad, bad])
