"""What every adapter promises, asked of the adapters of peft that the matrix of all tests has no room for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from disam_peft.adapters.adapter_folder import read_adapter, write_adapter
from disam_peft.adapters.peft.methods import find_method
from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.anchors import WeightsAnchorConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import FAMILIES, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.terms import Case, Workplace
from tests.helpers.tuner_cells import TUNERS
from tests.matrix.test_adapter_contract import largest_gradient_error
from tests.matrix.test_terms import difference, same_bits

every_tuner = pytest.mark.parametrize("name", TUNERS)
# Layers are the same in both families; the folder of one is what plain peft reads.
FAMILY_OF = {name: FAMILIES[number % 2] for number, name in enumerate(TUNERS)}
SAMPLE = ("lora-pattern", "shira", "tinylora-tied", "boft")
"""Those that keep more than what they train: starts, places, shared vectors, permutations."""
AT_START = {"lora-orthogonal": 1e-6}
"""peft orthogonalises in float32."""


@every_tuner
def test_gradient_start_merge_and_line(
    twins: tuple[str, str], name: str, record_property: Callable[[str, object], None]
) -> None:
    family, images = FAMILY_OF[name], pixels()
    zero_shot = ClipClassifier(tiny_backbone(twins, family), None, PROMPTS)(images)
    backbone = tiny_backbone(twins, family)
    before = backbone.current_hash()
    adapter = build_adapter(TUNERS[name], backbone, PROMPTS)
    assert (ClipClassifier(backbone, adapter, PROMPTS)(images) - zero_shot).abs().max() <= AT_START.get(name, 1e-12)

    classifier = tiny_classifier(tiny_backbone(twins, family), TUNERS[name], scramble=0.1)
    error = largest_gradient_error(classifier)
    record_property("gradient_error", f"{error:.1e}")
    assert error <= 1e-5

    trained = classifier(images)
    assert (trained - zero_shot).abs().max() > 1e-3
    assert classifier.adapter is not None
    merged = tiny_backbone(twins, family)
    start = {key: tensor.clone() for key, tensor in merged.model.state_dict().items()}
    merged.model.load_state_dict(classifier.adapter.merged(classifier.backbone).state_dict())
    end = {key: tensor.clone() for key, tensor in merged.model.state_dict().items()}
    tolerance = 1e-11 * trained.abs().max()
    assert (ClipClassifier(merged, None, PROMPTS)(images) - trained).abs().max() <= tolerance
    with torch.no_grad(), classifier.interpolation() as move_to:
        for alpha in (0.0, 0.6):
            merged.model.load_state_dict({key: start[key] + alpha * (end[key] - start[key]) for key in end})
            move_to(alpha)
            by_hand = ClipClassifier(merged, None, PROMPTS)(images)
            assert (classifier(images) - by_hand).abs().max() <= tolerance, alpha
    assert torch.equal(classifier(images), trained)
    assert torch.equal(classifier.zero_shot_outputs(classifier.encode_frozen(images)).logits_BC, zero_shot)

    classifier.adapter.detach(classifier.backbone)
    assert classifier.backbone.current_hash() == before
    assert torch.equal(ClipClassifier(classifier.backbone, None, PROMPTS)(images), zero_shot)


@every_tuner
def test_training_files_and_plain_peft(twins: tuple[str, str], name: str, tmp_path: Path) -> None:
    backbone, images = tiny_backbone(twins, "transformers", torch.float32), pixels(dtype=torch.float32)
    classifier = tiny_classifier(backbone, TUNERS[name], scramble=0.0)
    trained = classifier.trainable()
    assert {id(p) for p in trained.values()} == {id(p) for p in classifier.parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):  # the first moves what the others depend on, where a factor starts at zero
        nn.functional.cross_entropy(classifier(images), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert backbone.current_hash() == backbone.base_hash
    assert all(not torch.equal(before[key], p) for key, p in classifier.trainable().items())

    adapter, wanted = classifier.adapter, classifier(images)
    assert isinstance(adapter, PeftAdapter)
    write_adapter(tmp_path, adapter, backbone, PROMPTS, trained_with={})
    again = ClipClassifier(*read_adapter(tmp_path, tiny_backbone(twins, "transformers", torch.float32)))
    assert torch.equal(again(images), wanted)
    assert torch.allclose(_features_of_plain_peft(twins[1], tmp_path, images), backbone.encode_image(images), atol=1e-5)

    if _has_mean(adapter):
        other = tiny_classifier(tiny_backbone(twins, "transformers", torch.float32), TUNERS[name])
        assert other.adapter is not None
        config, state = type(adapter).soup([TUNERS[name]] * 2, [adapter.state(), other.adapter.state()])
        mean = build_adapter(config, tiny_backbone(twins, "transformers", torch.float32), PROMPTS)
        mean.load_state(state)
        ends = [one.merged(backbone).state_dict() for one in (adapter, other.adapter)]
        for key, tensor in mean.merged(backbone).state_dict().items():
            assert torch.allclose(tensor.float(), (ends[0][key].float() + ends[1][key].float()) / 2, atol=1e-6), key
    else:
        with pytest.raises(UserError, match=r"cannot be averaged.*lora, ia3, ln_tuning, miss, waveft, beft"):
            type(adapter).soup([TUNERS[name]] * 2, [adapter.state()] * 2)


@every_tuner
def test_a_half_precision_backbone(twins: tuple[str, str], name: str) -> None:
    backbone = tiny_backbone(twins, FAMILY_OF[name], torch.bfloat16)
    before = backbone.current_hash()
    classifier = tiny_classifier(backbone, TUNERS[name], scramble=0.01)
    assert {p.dtype for p in classifier.trainable().values()} == {torch.float32}
    logits = classifier(pixels(dtype=torch.bfloat16))
    nn.functional.cross_entropy(logits, LABELS).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in classifier.trainable().values())
    assert backbone.current_hash() == before
    assert classifier.adapter is not None
    wide = tiny_backbone(twins, FAMILY_OF[name], torch.bfloat16).to(dtype=torch.float32)
    reference = tiny_classifier(wide, TUNERS[name], scramble=0.01)
    assert reference.adapter is not None
    reference.adapter.load_state(classifier.adapter.state())
    wanted = reference.adapter.merged(wide).state_dict()
    for key, tensor in classifier.adapter.merged(backbone).state_dict().items():
        assert torch.equal(tensor, wanted[key].to(tensor.dtype)), key


@pytest.mark.parametrize("name", SAMPLE)
def test_steps_in_micro_batches_from_a_store_and_after_a_resume(
    name: str, twins: tuple[str, str], domains_folder: Path
) -> None:
    """Under DISAM, which perturbs and restores; the anchor asks for where the weights started."""
    place = Workplace(twins, domains_folder)
    case = Case(ObjectiveConfig(anchors=[WeightsAnchorConfig(weight=2.0)]), TUNERS[name])
    whole = place.train(case, "disam")
    assert difference(place.train(case, "disam", 3), whole) <= 1e-12
    assert difference(place.train(case, "disam", source="feature store"), whole) <= 1e-12
    assert same_bits(place.resumed(case, "disam"), whole)


def _has_mean(adapter: PeftAdapter) -> bool:
    config = adapter.config
    return isinstance(config, LoraAdapterConfig) or (
        isinstance(config, PeftAdapterConfig) and find_method(config.method).averages
    )


def _features_of_plain_peft(folder: str, adapter: Path, images: torch.Tensor) -> torch.Tensor:
    import warnings

    from peft import PeftModel
    from transformers import CLIPModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), str(adapter))
        features: torch.Tensor = plain.get_image_features(pixel_values=images).pooler_output
    return features
