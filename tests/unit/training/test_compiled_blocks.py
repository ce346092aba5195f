"""Compiled blocks: the same step up to rounding, inside of training steps and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from disam_peft import DISAM
from disam_peft.backbones.recomputation import recomputed
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.training import TrainConfig
from disam_peft.errors import UserError
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training import trainer as loop
from disam_peft.training.compiled_blocks import CompiledBlocks
from tests.helpers import accumulated_runs
from tests.helpers.adapter_cells import FAMILIES, LABELS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.timm_towers import tiny_timm

DOMAINS = torch.tensor([0, 1, 2, 0, 1, 2])
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Counting:
    """A backend that compiles nothing and counts how often its graphs run."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    @property
    def backend(self) -> Callable[..., Any]:
        return aot_autograd(fw_compiler=self._compile)

    def _compile(self, graph: Any, _: Any) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch.compiler.reset()


def gradients(classifier: ClipClassifier, around: Any) -> dict[str, Tensor]:
    disam = DISAM(classifier.trainable().values(), rho=0.3, variance_weight=0.6)
    with around:
        logits = classifier.cached_logits(classifier.encode_frozen(pixels()))
        disam.backward(lambda: cross_entropy(logits(), LABELS), DOMAINS)
    return {name: p.grad.clone() for name, p in classifier.trainable().items()}


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lora-image", "lora-both", "coop-shared", "full-both", "full-last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_and_blocks_are_eager_outside(twins: tuple[str, str], family: str, cell: str) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family), cell).double().train()
    assert classifier.adapter is not None
    expected, counting = gradients(classifier, nullcontext()), Counting()
    text = classifier.backbone.blocks("text") * (classifier.adapter.text_split is not None)
    compiled = CompiledBlocks(classifier.backbone.blocks("image") + text, counting.backend)
    for _ in range(2):
        ran = counting.ran
        found = gradients(classifier, compiled)
        assert counting.ran > ran
        assert all((found[name] - expected[name]).abs().max() < 1e-12 for name in expected)
    ran, built = counting.ran, counting.compiled
    again = gradients(classifier, nullcontext())
    assert counting.ran == ran
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert built <= 12  # kinds of blocks, not blocks


@pytest.mark.slow
def test_compiled_blocks_can_be_recomputed(twins: tuple[str, str]) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), "lora-image").double().train()
    expected, counting = gradients(classifier, nullcontext()), Counting()
    blocks = classifier.backbone.blocks("image")
    with recomputed(blocks):
        found = gradients(classifier, CompiledBlocks(blocks, counting.backend))
    assert counting.ran > 0
    assert all((found[name] - expected[name]).abs().max() < 1e-12 for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_shot_reference_runs_through_compiled_blocks(twins: tuple[str, str], family: str) -> None:
    """Plain layers stand in the places of the adapted ones for one pass of each step, and nothing is compiled twice."""
    classifier = tiny_classifier(tiny_backbone(twins, family), "lora-both").double().train()
    wanted = classifier.zero_shot_outputs(classifier.encode_frozen(pixels())).logits_BC
    expected, counting = gradients(classifier, nullcontext()), Counting()
    blocks = classifier.backbone.blocks("image") + classifier.backbone.blocks("text")
    compiled, built = CompiledBlocks(blocks, counting.backend), []
    for _ in range(3):
        ran = counting.ran
        with compiled:
            found = classifier.zero_shot_outputs(classifier.encode_frozen(pixels())).logits_BC
        assert counting.ran > ran and (found - wanted).abs().max() < 1e-12
        assert all((g - expected[name]).abs().max() < 1e-12 for name, g in gradients(classifier, compiled).items())
        built.append(counting.compiled)
    assert built[0] == built[2] <= 14


@pytest.mark.slow
def test_blocks_of_the_text_tower_only_where_it_is_trained(twins: tuple[str, str]) -> None:
    for cell, count in (("lora-image", 3), ("lora-both", 6), ("lora-text", 6), ("coop-shared", 3)):
        classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), cell)
        assert len(CompiledBlocks.of(classifier)._blocks) == count


def test_a_tower_without_blocks_says_that_nothing_is_compiled() -> None:
    classifier = tiny_classifier(tiny_timm("swin"), "coop-shared")
    with pytest.warns(UserWarning, match=r"train.compile=true does nothing.*no transformer blocks"):
        compiled = CompiledBlocks.of(classifier)
    with compiled:
        assert classifier(pixels(2, torch.float32)).shape == (2, 3)


@pytest.fixture
def run(twins: tuple[str, str], domains_folder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def of(**options: Any) -> Any:
        monkeypatch.setattr(accumulated_runs, "TrainConfig", lambda **given: TrainConfig(**{**given, **options}))
        return accumulated_runs.run(twins, domains_folder, 1, steps=6)

    return of


@pytest.mark.slow
def test_training_comes_to_the_same_weights(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    expected, _ = run()

    class Counted(CompiledBlocks):
        def __init__(self, blocks: Any) -> None:
            super().__init__(blocks, counting.backend)

    monkeypatch.setattr(loop, "CompiledBlocks", Counted)
    again, _ = run()
    assert counting.ran == 0 and torch.equal(again, expected)
    found, _ = run(compile=True)
    assert counting.ran > 0
    assert 0 < (found - expected).abs().max() < 1e-9 or torch.equal(found, expected)


def test_where_nothing_can_be_compiled_the_error_says_what_to_do(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    class Failing(CompiledBlocks):
        def __init__(self, blocks: Any) -> None:
            super().__init__(blocks, no_compiler)

    monkeypatch.setattr(loop, "CompiledBlocks", Failing)
    with pytest.raises(UserError, match=r"no C\+\+ compiler found.*train.compile=false"):
        run(compile=True)


@pytest.mark.gpu
@cuda
def test_training_on_a_gpu_comes_to_the_same_weights(run: Callable[..., Any]) -> None:
    expected, _ = run()
    found, _ = run(compile=True)
    assert expected.is_cuda
    assert (found - expected).abs().max() < 1e-9  # float64: only the order of additions differs
