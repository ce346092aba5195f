"""What every adapter promises on every backbone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.anchors import LogitsAnchorConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers.adapter_cells import (
    CELLS,
    FAMILIES,
    LABELS,
    MERGED_CELLS,
    PROMPTS,
    UNMERGED_CELLS,
    pixels,
    tiny_backbone,
    tiny_classifier,
)

matrix = pytest.mark.parametrize("family", FAMILIES)
every_cell = pytest.mark.parametrize("cell", CELLS)


def hold_dora_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first call on, DoRA's weight norms keep their value: its gradient is defined that way."""
    from peft.tuners.lora.dora import DoraLinearLayer

    computed, original = {}, DoraLinearLayer.get_weight_norm

    def held(self: nn.Module, **arguments: object) -> Tensor:
        if id(self) not in computed:
            computed[id(self)] = original(self, **arguments).detach()
        return computed[id(self)]

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", held)


def largest_gradient_error(classifier: ClipClassifier) -> float:
    """Relative error of autograd against central differences, per parameter along its gradient plus a random step."""
    frozen = classifier.encode_frozen(pixels())

    def loss() -> Tensor:
        return nn.functional.cross_entropy(classifier.logits(frozen), LABELS)

    parameters = classifier.trainable()
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    generator, step, errors = torch.Generator().manual_seed(3), 1e-5, []
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.norm() > 1e-7, name  # a zero gradient would agree with anything
        random = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        direction = gradient / gradient.norm() + 0.5 * random / random.norm()
        values = []
        with torch.no_grad():
            kept = parameter.clone()
            for sign in (1, -1):
                parameter.copy_(kept + sign * step * direction)
                values.append(loss().item())
            parameter.copy_(kept)
        difference = (values[0] - values[1]) / (2 * step)
        analytic = (gradient * direction).sum().item()
        errors.append(abs(difference - analytic) / abs(difference))
    return max(errors)


@matrix
@every_cell
def test_gradients_are_derivatives(
    twins: tuple[str, str],
    family: str,
    cell: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family), cell)
    if cell == "dora":
        hold_dora_norms(monkeypatch)
    error = largest_gradient_error(classifier)
    record_property("gradient_error", f"{error:.1e}")
    assert error <= 1e-5


@matrix
@every_cell
def test_only_the_adapter_moves(twins: tuple[str, str], family: str, cell: str) -> None:
    backbone = tiny_backbone(twins, family, torch.float32)
    classifier = tiny_classifier(backbone, cell)
    trained = classifier.trainable()
    assert {id(p) for p in trained.values()} == {id(p) for p in classifier.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    classifier.train()
    for step in range(20):
        loss = nn.functional.cross_entropy(classifier(pixels(dtype=torch.float32, seed=step)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert backbone.current_hash() == backbone.base_hash
    assert all(not torch.equal(before[name], p) for name, p in classifier.trainable().items())


@matrix
@every_cell
def test_the_split_changes_no_bit(twins: tuple[str, str], family: str, cell: str) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family), cell)
    split = classifier.logits(classifier.encode_frozen(pixels()))
    assert torch.equal(classifier(pixels()), split)
    adapter = classifier.adapter
    assert adapter is not None
    adapter.image_split = 0
    if adapter.text_split is not None:
        adapter.text_split = 0
    classifier._text = None
    assert torch.equal(classifier(pixels()), split)


@matrix
@pytest.mark.parametrize(
    ("cell", "splits"),
    [
        ("lora-image", (1, None)),
        ("lora-text", (None, 1)),
        ("lora-both", (0, 0)),
        ("coop-shared", (None, None)),
        ("full", (-1, None)),
        ("full-both", (-1, -1)),
        ("full-last", (1, 1)),
        ("full-norms", (-1, None)),
        ("full-biases", (1, 1)),
    ],
)
def test_the_frozen_part_ends_at_the_first_adapted_block(
    twins: tuple[str, str], family: str, cell: str, splits: tuple[int | None, int | None]
) -> None:
    adapter = tiny_classifier(tiny_backbone(twins, family), cell).adapter
    assert adapter is not None
    assert (adapter.image_split, adapter.text_split) == splits


@matrix
@every_cell
def test_state_round_trip(twins: tuple[str, str], family: str, cell: str) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family), cell)
    other = tiny_classifier(tiny_backbone(twins, family), cell, scramble=0.3)
    assert classifier.adapter is not None and other.adapter is not None
    wanted = classifier(pixels())
    assert not torch.equal(other(pixels()), wanted)
    other.adapter.load_state(classifier.adapter.state())
    assert torch.equal(other(pixels()), wanted)


@matrix
@pytest.mark.parametrize("cell", MERGED_CELLS)
def test_merged_gives_the_same_logits_and_leaves_the_live_model(twins: tuple[str, str], family: str, cell: str) -> None:
    backbone = tiny_backbone(twins, family)
    classifier = tiny_classifier(backbone, cell)
    assert classifier.adapter is not None
    wanted = classifier(pixels())
    first, second = classifier.adapter.merged(backbone), classifier.adapter.merged(backbone)
    assert torch.equal(classifier(pixels()), wanted)
    assert not any(p.requires_grad for p in first.parameters())
    plain = tiny_backbone(twins, family)
    assert first.state_dict().keys() == plain.model.state_dict().keys()
    zero_shot = ClipClassifier(plain, None, classifier.prompts)
    assert (zero_shot(pixels()) - wanted).abs().max() > 1e-3
    for merged in (first, second):
        plain.model.load_state_dict(merged.state_dict())
        zero_shot._text = None
        assert (zero_shot(pixels()) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@matrix
@pytest.mark.parametrize("cell", UNMERGED_CELLS)
def test_what_cannot_be_merged_says_what_to_do(twins: tuple[str, str], family: str, cell: str) -> None:
    backbone = tiny_backbone(twins, family)
    adapter = tiny_classifier(backbone, cell).adapter
    assert adapter is not None
    with pytest.raises(UserError, match="--to peft"):
        adapter.merged(backbone)


@matrix
@every_cell
def test_the_zero_shot_reference_is_zero_shot_to_the_bit(twins: tuple[str, str], family: str, cell: str) -> None:
    """In train mode, with trained weights, from the output of the frozen part; and nothing has changed afterwards."""
    zero_shot = ClipClassifier(tiny_backbone(twins, family), None, PROMPTS)
    classifier = tiny_classifier(tiny_backbone(twins, family), cell)
    adapted, modules = classifier(pixels()), dict(classifier.model.named_modules())
    trained = {name: p.detach().clone() for name, p in classifier.trainable().items()}
    classifier.train()
    for bf16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            found = classifier.zero_shot_outputs(classifier.encode_frozen(pixels()))
            with torch.no_grad():
                wanted = zero_shot.outputs(zero_shot.encode_frozen(pixels()))
        assert torch.equal(found.logits_BC, wanted.logits_BC), bf16
        assert torch.equal(found.features_BE, wanted.features_BE)
        assert torch.equal(found.class_features_CE, wanted.class_features_CE)
        assert not any(tensor.requires_grad for tensor in vars(found).values() if tensor is not None)
    assert (found.logits_BC - adapted).abs().max() > 1e-4, "the adapter does something"
    classifier.eval()
    assert torch.equal(classifier(pixels()), adapted)
    assert dict(classifier.model.named_modules()) == modules
    assert all(p.requires_grad and torch.equal(p, trained[name]) for name, p in classifier.trainable().items())


@matrix
@every_cell
def test_an_anchor_of_logits_is_its_definition_in_a_step(twins: tuple[str, str], family: str, cell: str) -> None:
    """Against the logits of a zero-shot classifier of its own; at once and in micro-batches."""
    zero_shot = ClipClassifier(tiny_backbone(twins, family), None, PROMPTS)
    classifier = tiny_classifier(tiny_backbone(twins, family), cell)
    params, domains = list(classifier.trainable().values()), torch.tensor([0, 1, 0, 1, 1, 0])
    logits, reference = classifier(pixels()), zero_shot(pixels())
    divergence_B = nn.functional.kl_div(logits.log_softmax(1), reference.softmax(1), reduction="none").sum(1)
    loss = nn.functional.cross_entropy(logits, LABELS) + 50.0 * divergence_B.mean()
    wanted = torch.autograd.grad(loss, params)
    for micro_batches in (MicroBatches(1, 6, "whole"), MicroBatches(2, 3, "mean"), MicroBatches(2, 2, "per_domain")):
        objective = Objective(ObjectiveConfig(anchors=[LogitsAnchorConfig(weight=50.0)]))
        disam = DISAM(params, rho=0.0, num_domains=2)
        gradient = StepGradient(classifier, disam, micro_batches, start_accelerator("no"), objective)
        report = gradient({"pixels": pixels(), "labels": LABELS, "domains": domains})
        assert report.objective.item() == pytest.approx(loss.item(), abs=1e-12)
        for p, expected in zip(params, wanted, strict=True):
            assert p.grad is not None and (p.grad - expected).abs().max() <= 1e-12
    assert divergence_B.max() > 1e-6


@matrix
@every_cell
def test_detach_gives_the_backbone_back(twins: tuple[str, str], family: str, cell: str) -> None:
    backbone = tiny_backbone(twins, family)
    before = {name: type(module) for name, module in backbone.model.named_modules()}
    features = backbone.encode_image(pixels())
    classifier = tiny_classifier(backbone, cell)
    assert classifier.adapter is not None
    classifier.adapter.detach(backbone)
    assert {name: type(module) for name, module in backbone.model.named_modules()} == before
    assert torch.equal(backbone.encode_image(pixels()), features)
    tiny_classifier(backbone, cell)  # and it takes the next adapter


@matrix
@every_cell
def test_row_40_tensors_that_do_not_fit_load_nothing(twins: tuple[str, str], family: str, cell: str) -> None:
    adapter = tiny_classifier(tiny_backbone(twins, family, torch.float32), cell).adapter
    assert adapter is not None
    before = adapter.state()
    changed = {name: tensor + 1 for name, tensor in before.items()}
    name = sorted(changed)[0]
    broken = changed[name].clone()
    broken.view(-1)[0] = float("nan")
    faults: dict[str, dict[str, Tensor]] = {
        "missing": {key: tensor for key, tensor in changed.items() if key != name},
        "unexpected stranger.weight": {**changed, "stranger.weight": torch.zeros(2)},
        r"found \(7, 7, 7\)": {**changed, name: torch.zeros(7, 7, 7)},
        "NaN or infinity": {**changed, name: broken},
        "expected dtype": {**changed, name: torch.zeros(before[name].shape, dtype=torch.int64)},
    }
    for message, state in faults.items():
        with pytest.raises(UserError, match=message):
            adapter.load_state(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state().items())
