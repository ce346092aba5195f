"""What an adapter adds to the objective by itself: once in a step, in both passes, in micro-batches, in the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.base import Adapter
from disam_peft.adapters.linear_probe import text_cross_entropy
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.feature_adapters import ClapConfig, LinearProbeConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.objectives.anchors.adapter_term import AdapterTerm
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.fit import fit
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers.adapter_cells import LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier

RHO = 0.3
TERMS = {"clap": ClapConfig(penalty=0.7), "texts": LinearProbeConfig(text_weight=0.5)}


def parts(classifier: ClipClassifier) -> tuple[list[nn.Parameter], Adapter]:
    assert classifier.adapter is not None
    return list(classifier.trainable().values()), classifier.adapter


def by_hand(classifier: ClipClassifier, in_ascent: bool) -> list[Tensor]:
    """SAM's gradient of the mean cross entropy plus the term."""
    params, adapter = parts(classifier)

    def gradient(with_term: bool) -> list[Tensor]:
        loss = nn.functional.cross_entropy(classifier(pixels()), LABELS)
        term = adapter.own_term()
        assert term is not None
        return list(torch.autograd.grad(loss + term if with_term else loss, params))

    ascent = gradient(in_ascent)
    norm = torch.cat([g.flatten() for g in ascent]).norm()
    kept = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, ascent, strict=True):
            p += RHO * g / norm
    found = gradient(True)
    with torch.no_grad():
        for p, before in zip(params, kept, strict=True):
            p.copy_(before)
    return found


@pytest.mark.parametrize("in_ascent", [True, False])
@pytest.mark.parametrize("term", TERMS)
def test_it_counts_once_in_each_pass_however_the_batch_is_divided(
    twins: tuple[str, str], term: str, in_ascent: bool
) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), TERMS[term], scramble=0.3)
    params, adapter = parts(classifier)
    wanted = by_hand(classifier, in_ascent)
    domains = torch.tensor([0, 1, 0, 1, 1, 0])
    for micro_batches in (MicroBatches(1, 6, "whole"), MicroBatches(3, 2, "mean"), MicroBatches(2, 3, "two_phase")):
        of_adapter = AdapterTerm(adapter.kind, lambda: adapter.own_term(), in_ascent=in_ascent)  # type: ignore[return-value]
        objective = Objective(adapter_term=of_adapter)
        disam = DISAM(params, rho=RHO, variance_weight=0.0, num_domains=2)
        step = StepGradient(classifier, disam, micro_batches, start_accelerator("no"), objective)
        report = step({"pixels": pixels(), "labels": LABELS, "domains": domains})
        for p, expected in zip(params, wanted, strict=True):
            assert p.grad is not None and (p.grad - expected).abs().max() <= 1e-12
    own = adapter.own_term()
    assert own is not None and report.terms[adapter.kind].item() == pytest.approx(own.item())
    assert report.objective.item() == pytest.approx(report.loss.item() + own.item())


@torch.no_grad()
def test_texts_are_samples_of_their_classes(twins: tuple[str, str]) -> None:
    """As many texts as images: the mean over all of them is half of what is descended, with a weight of 1."""
    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, LinearProbeConfig(text_weight=1.0), scramble=0.3)
    _, adapter = parts(classifier)
    sentences = [template.replace("{}", name) for name in PROMPTS.class_names for template in PROMPTS.templates]
    texts_NE = backbone.encode_text(backbone.tokenize(sentences))
    both = torch.cat([backbone.encode_image(pixels()), texts_NE])
    of_texts = torch.tensor([0, 0, 1, 1, 2, 2])
    mean = nn.functional.cross_entropy(classifier.logits(both), torch.cat([LABELS, of_texts]))
    own = adapter.own_term()
    assert own is not None and own.item() == pytest.approx(text_cross_entropy(classifier.logits(texts_NE), 2).item())
    images = nn.functional.cross_entropy(classifier(pixels()), LABELS)
    assert (images + own).item() == pytest.approx(2 * mean.item())
    assert "texts" not in adapter.state(), "they follow from the backbone and the prompts"
    assert parts(tiny_classifier(backbone, LinearProbeConfig()))[1].own_term() is None


@pytest.mark.parametrize("term", TERMS)
def test_a_run_descends_and_records_it(twins: tuple[str, str], domains_folder: Path, term: str) -> None:
    dataset = load(DataConfig(root=domains_folder))
    events: list[tuple[str, dict[str, Any]]] = []
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), TERMS[term], scramble=0.3, prompts=prompts)
    config = TrainConfig(steps=1, batch_size=4, workers=0, log_every=1)
    fit(
        classifier,
        dataset,
        method=MethodConfig(name="sam"),
        config=config,
        augment=AugmentConfig(kind="none"),
        on_event=lambda name, **values: events.append((name, values)),
    )
    [step] = [values for name, values in events if name == "step"]
    _, adapter = parts(classifier)
    assert step["objective"] == pytest.approx(step["loss"] + step["terms"][adapter.kind])
    assert step["terms"][adapter.kind] > 0
    assert events[0][0] == ("start" if term == "clap" else "step")


def test_a_sweep_of_probes_does_not_know_texts() -> None:
    from disam_peft.config.recipe import Recipe
    from disam_peft.config.sweep import check_sweep

    values = {"backbone": {"name": "demo"}, "data": {"shapes": {}}, "protocol": {"held_out": "none"}}
    recipe = Recipe.model_validate({**values, "adapter": {"kind": "linear_probe", "text_weight": 1}})
    with pytest.raises(UserError, match=r"a sweep trains on images alone, and adapter\.text_weight is 1"):
        check_sweep(recipe, [0.1], [0.0], [0.0])
