"""CoOp's prompts as CUDA graphs: the same bits in every pass, and nothing left behind."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from disam_peft import DISAM
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.objectives.cross_entropy import cross_entropy
from tests.helpers.adapter_cells import FAMILIES, LABELS, pixels, tiny_backbone, tiny_classifier

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DOMAINS = torch.tensor([0, 1, 2, 0, 1, 2])
BF16 = partial(torch.autocast, "cuda", torch.bfloat16)


def steps(classifier: ClipClassifier, autocast: Any, count: int = 3) -> list[Tensor]:
    """Weights after each step, and the norms of the ascent."""
    (context,) = classifier.trainable().values()
    with torch.no_grad():
        context.copy_(torch.linspace(-0.1, 0.1, context.numel()).view_as(context).sin())
    device = context.device
    images, labels = pixels(dtype=classifier.backbone.dtype).to(device), LABELS.to(device)
    disam = DISAM([context], rho=0.3, variance_weight=0.6, num_domains=3)
    optimizer, found = torch.optim.SGD([context], lr=0.5), []

    def losses() -> Tensor:
        with autocast():
            logits = classifier.logits(frozen)
        return cross_entropy(logits, labels)

    for _ in range(count):
        with autocast():
            frozen = classifier.encode_frozen(images)
        report = disam.backward(losses, DOMAINS.to(device))
        optimizer.step()
        found += [context.detach().clone(), report.ascent_norm]
    return found


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("autocast", [nullcontext, BF16], ids=["float32", "bf16"])
@pytest.mark.parametrize("cell", ["coop-shared", "coop-class"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_have_the_bits_of_launched_ones(
    twins: tuple[str, str], family: str, cell: str, autocast: Any
) -> None:
    classifier: Any = tiny_classifier(tiny_backbone(twins, family, torch.float32), cell).to("cuda").train()
    expected = steps(classifier, autocast)
    warnings.simplefilter("error")  # of streams that do not match, for one
    with classifier.captured(autocast):
        assert classifier.adapter._replay is not None
        found = steps(classifier, autocast)
        with torch.no_grad():
            launched = classifier.class_features()
        assert torch.equal(classifier.class_features(), launched) or autocast is BF16
    assert classifier.adapter._replay is None
    assert len(found) == 6 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[2])


@pytest.mark.gpu
@cuda
def test_a_second_backward_is_refused_and_not_wrong(twins: tuple[str, str]) -> None:
    classifier: Any = (
        tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), "coop-shared").to("cuda").train()
    )
    (context,) = classifier.trainable().values()
    with classifier.captured():
        loss = classifier.class_features()[0].sum()
        torch.autograd.grad(loss, context, retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward for each forward"):
            torch.autograd.grad(loss, context)


@pytest.mark.gpu
@cuda
def test_what_computes_again_is_not_captured(twins: tuple[str, str]) -> None:
    config = CoOpConfig(context_tokens=4, memory_budget_gb=1e-6)
    classifier: Any = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), config).to("cuda")
    with classifier.captured():
        assert classifier.adapter._replay is None


def test_what_cannot_be_recorded_is_launched_as_ever(twins: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    classifier: Any = tiny_classifier(tiny_backbone(twins, "open_clip"), "coop-shared").train()
    expected = classifier(pixels())
    monkeypatch.setattr("disam_peft.adapters.coop.coop_adapter._recorded", impossible)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setitem(vars(classifier.adapter), "context", SimpleNamespace(is_cuda=True))
        with pytest.warns(UserWarning, match="launched one by one, with the same result.*stream is capturing$"):
            captured = classifier.captured()
    with captured:
        assert torch.equal(classifier(pixels()), expected)


@pytest.mark.parametrize("cell", ["coop-shared", "lora-image", "probe-zero_shot"])
def test_on_a_cpu_there_is_nothing_to_capture(twins: tuple[str, str], cell: str) -> None:
    classifier: Any = tiny_classifier(tiny_backbone(twins, "open_clip"), cell).train()
    expected = classifier(pixels())
    with classifier.captured():
        assert getattr(classifier.adapter, "_replay", None) is None
        assert torch.equal(classifier(pixels()), expected)
