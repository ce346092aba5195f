"""Prompts in the towers: MaPLe's values, what blocks are handed, towers that take none, and PromptSRC's objective."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter, planned_image_split
from disam_peft.adapters.tower_prompts.maple import from_published
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.anchors import ClassFeaturesAnchorConfig, ImageFeaturesAnchorConfig, LogitsAnchorConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.prompt_adapters import CoOpConfig, IvlpConfig, MapleConfig, VisualPromptsConfig
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers.adapter_cells import LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.own_backbone import own_backbone
from tests.helpers.paths import REFERENCE
from tests.helpers.timm_towers import tiny_timm
from tests.helpers.tiny import tiny_openclip

VALUES = np.load(REFERENCE / "maple.npz")
CASES: dict[str, Any] = json.loads(str(VALUES["meta"]))["cases"]
START, END = 38, 39  # of the tokens of the cases


def values(case: str, prefix: str = "") -> dict[str, Tensor]:
    start = f"{case}/{prefix}"
    return {name[len(start) :]: torch.from_numpy(VALUES[name]) for name in VALUES if name.startswith(start)}


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> ClipBackbone:
    """Of the sizes of MaPLe's cases."""
    vision = {"image_size": 8, "layers": 3, "width": 24, "head_width": 8, "patch_size": 4}
    text = {"width": 16, "heads": 2, "layers": 3}
    name = tiny_openclip(
        tmp_path_factory.mktemp("maple"), embed_dim=8, quick_gelu=True, vision_cfg=vision, text_cfg=text
    )
    return load_backbone(BackboneConfig(name=name))


@torch.no_grad()
def with_weights(small_clip: ClipBackbone, clip: dict[str, Tensor]) -> ClipBackbone:
    """Those of a case, whose vocabulary and context are the first rows of the tables here."""
    backbone = own_backbone(small_clip, torch.float64)
    ours = dict(backbone.model.named_parameters())
    for name, tensor in clip.items():
        place = name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}"
        if ".in_proj_" in place:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                ours[place.replace("in_proj_", f"{letter}_proj.")].copy_(part)
        else:
            ours[place][: len(tensor)].copy_(tensor) if tensor.ndim else ours[place].copy_(tensor)
    return backbone


def texts_of(tokens_CL: Tensor, learned: int, words: str | None) -> tuple[ClassPrompts, Any]:
    """Class prompts, and a tokenizer that makes the tokens of a case of them."""
    kept = 4 if words else learned  # tokens in front of a name
    known = {f"c{row}.": tokens_CL[row, 1 + kept :].tolist() for row in range(len(tokens_CL))}
    known |= {f"{words} {name}": [*tokens_CL[0, 1 : 1 + kept].tolist(), *ids] for name, ids in known.items()}
    known |= {"": [END], "a": [7, END], words or "-": [*tokens_CL[0, 1 : 1 + kept].tolist(), END]}

    def tokenize(texts: list[str]) -> Tensor:
        rows = [[START, *known.get(text, [9, END])] for text in texts]
        return torch.tensor([(row + [0] * 20)[:20] for row in rows])

    return ClassPrompts(tuple(f"c{row}" for row in range(len(tokens_CL))), ("{}",)), tokenize


@pytest.mark.parametrize("case", CASES)
def test_maple_has_the_logits_and_gradients_of_its_authors(
    small_clip: ClipBackbone, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, settings = values(case), CASES[case]
    words, learned = settings["ctx_init"] or None, settings["n_ctx"]
    backbone = with_weights(small_clip, values(case, "clip."))
    prompts, tokenize = texts_of(of["tokens"], learned, words)
    monkeypatch.setattr(type(backbone), "tokenize", lambda self, texts: tokenize(texts))
    monkeypatch.setattr(type(backbone), "require_different", lambda *_: None)
    config = MapleConfig(context_tokens=learned, init=words, depth=settings["prompt_depth"])
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts)
    if words:
        start = backbone.embed_tokens(of["tokens"])[0, 1 : 1 + learned]
        assert torch.equal(classifier.trainable()["text.coop.context"], start)
    classifier.adapter.load_state(from_published(values(case, "p.")))
    logits = classifier.logits(classifier.encode_frozen(of["pixels"]))
    assert (logits - of["logits"]).abs().max() <= 1e-10 * of["logits"].abs().max()
    loss = nn.functional.cross_entropy(logits, of["labels"])
    assert abs(loss - of["loss"]) <= 1e-10
    loss.backward()
    wanted = from_published(values(case, "grad."))
    assert wanted.keys() == classifier.trainable().keys()
    for name, parameter in classifier.trainable().items():
        assert (parameter.grad - wanted[name]).abs().max() <= 1e-10 * wanted[name].abs().max(), name


def of_own_vit(visual: Any, images: Tensor) -> tuple[Tensor, Any, Any]:
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    token = visual.class_embedding.expand(len(images), 1, -1)
    hidden = torch.cat([token, patches], dim=1) + visual.positional_embedding
    return hidden, visual.transformer.resblocks, lambda tokens: visual.ln_post(tokens[:, 0]) @ visual.proj


def of_timm(visual: Any, images: Tensor) -> tuple[Tensor, Any, Any]:
    trunk = visual.trunk
    hidden = trunk._pos_embed(trunk.patch_embed(images))
    return hidden, trunk.blocks, lambda tokens: visual.head(trunk.forward_head(trunk.norm(tokens)))


@pytest.mark.parametrize("tower", ["own", pytest.param("siglip", marks=pytest.mark.slow), "gap"])
@torch.no_grad()
def test_visual_prompts_are_what_the_paper_writes(twins: tuple[str, str], tower: str) -> None:
    """Block by block with the library's own blocks; block 1 carries on what block 0 got, and the pooling sees none."""
    backbone = tiny_backbone(twins, "open_clip") if tower == "own" else tiny_timm(tower).to(dtype=torch.float64)
    own = tower == "own"
    classifier = tiny_classifier(backbone, VisualPromptsConfig(tokens=2, blocks=[0, 2], seed=3), scramble=0.5)
    found = classifier.features(classifier.encode_frozen(pixels()))
    adapter = classifier.adapter
    first, last = (adapter.trainable()[f"prompts.{block}"].expand(6, -1, -1) for block in (0, 2))
    adapter.detach(backbone)
    visual = backbone.model.visual
    hidden, blocks, pooled = (of_own_vit if own else of_timm)(visual, pixels())
    norm = visual.ln_pre if own else visual.trunk.norm_pre
    hidden = blocks[1](blocks[0](norm(torch.cat([hidden, first], dim=1))))
    hidden = blocks[2](torch.cat([hidden[:, :-2], last], dim=1))
    wanted = pooled(hidden[:, :-2])
    assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert (backbone.encode_image(pixels()) - wanted).abs().max() > 1e-3 * wanted.abs().max(), "they do something"


@pytest.mark.parametrize("config", [MapleConfig(seed=1), IvlpConfig(context_tokens=2, init=None, seed=1)])
def test_prompts_of_later_blocks_are_the_same_packed_padded_and_in_chunks(
    twins: tuple[str, str], config: AdapterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**settings: Any) -> list[Tensor]:
        changed = config.model_copy(update=settings)
        classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), changed)
        text = {name: p for name, p in classifier.trainable().items() if name.startswith("text.")}
        logits = classifier(pixels())
        return [logits, *torch.autograd.grad(logits.square().sum(), list(text.values()))]

    wanted, chunked = found(), found(memory_budget_gb=1e-9)
    monkeypatch.setattr(ClipBackbone, "pack_prompts", lambda *_: None)
    for other in (chunked, found(), found(memory_budget_gb=1e-9)):
        assert all((a - b).abs().max() <= 1e-11 * b.abs().max() for a, b in zip(other, wanted, strict=True))


@pytest.mark.parametrize(
    ("tower", "why"), [("eva02-b", "has rotary positions"), ("convnext", "is no plain stack of transformer blocks")]
)
def test_row_81_a_tower_that_takes_no_more_tokens_says_what_to_train_instead(tower: str, why: str) -> None:
    backbone = tiny_timm(tower)
    for config in (VisualPromptsConfig(), IvlpConfig(), MapleConfig()):
        with pytest.raises(UserError, match=rf"{why}.*kind: coop.*kind: lora"):
            planned_image_split(config, backbone)
        with pytest.raises(UserError, match=why):
            build_adapter(config, backbone, PROMPTS)


def test_settings_that_a_tower_does_not_have(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    assert planned_image_split(VisualPromptsConfig(), backbone) == 0, "fewer blocks than the published depth"
    for config, message in (
        (MapleConfig(depth=4), "depth=4, but the text tower .* has 3 blocks"),
        (IvlpConfig(visual_blocks=[1, 7]), r"blocks \[7\] do not all exist"),
        (MapleConfig(context_tokens=5), "context_tokens is 5, but init 'a photo of a' has 4 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            build_adapter(config, backbone, PROMPTS)
    with pytest.raises(ValueError, match="maple trains prompts, and with a head of its own"):
        LpFtConfig.model_validate({"adapter": {"kind": "maple"}})
    with pytest.raises(UserError, match="'ctx2' is no tensor of MaPLe"):
        from_published({"ctx2": torch.zeros(1)})


def test_the_default_start_is_the_zero_shot_prompt_but_for_the_prompts_of_later_blocks(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    prompts = ClassPrompts(PROMPTS.class_names, ("a photo of a {}.",))
    wanted = ClipClassifier(backbone, None, prompts).class_features()
    for config in (IvlpConfig(depth=1), MapleConfig(depth=1)):
        adapter = build_adapter(config, backbone, prompts)
        assert (ClipClassifier(backbone, adapter, prompts).class_features() - wanted).abs().max() <= 1e-12
        assert len(adapter.trainable()["text.coop.context"]) == (4 if config.kind == "ivlp" else 2)
        adapter.detach(backbone)


KGCOOP = [ClassFeaturesAnchorConfig()]
PROMPTSRC = [ImageFeaturesAnchorConfig(), ClassFeaturesAnchorConfig(weight=25, distance="l1"), LogitsAnchorConfig()]


@pytest.mark.parametrize(
    ("config", "anchors"),
    [(CoOpConfig(context_tokens=2, seed=1), KGCOOP), (IvlpConfig(seed=1), PROMPTSRC)],
    ids=["KgCoOp", "PromptSRC"],
)
def test_published_anchors_on_prompts_are_their_formula(twins: tuple[str, str], config: Any, anchors: Any) -> None:
    zero_shot = ClipClassifier(tiny_backbone(twins, "open_clip"), None, PROMPTS)
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), config)
    params, logits, reference = list(classifier.trainable().values()), classifier(pixels()), zero_shot(pixels())
    unit = nn.functional.normalize
    text_CE = classifier.class_features() - zero_shot.class_features()
    loss = nn.functional.cross_entropy(logits, LABELS)
    if anchors is KGCOOP:
        loss = loss + 8 * text_CE.square().sum(1).mean()
    else:
        image_BE = unit(classifier.features(classifier.encode_frozen(pixels()))) - unit(
            zero_shot.encode_frozen(pixels())
        )
        divergence = nn.functional.kl_div(logits.log_softmax(1), reference.softmax(1), reduction="batchmean")
        loss = loss + 10 * image_BE.abs().mean() + 25 * text_CE.abs().mean() + divergence
    wanted = torch.autograd.grad(loss, params)
    for pieces in (MicroBatches(1, 6, "whole"), MicroBatches(2, 3, "mean")):
        objective = Objective(ObjectiveConfig(anchors=anchors))
        gradient = StepGradient(
            classifier, DISAM(params, rho=0, num_domains=2), pieces, start_accelerator("no"), objective
        )
        report = gradient({"pixels": pixels(), "labels": LABELS, "domains": torch.tensor([0, 1, 0, 1, 1, 0])})
        assert report.objective.item() == pytest.approx(loss.item(), abs=1e-11)
        for p, expected in zip(params, wanted, strict=True):
            assert (p.grad - expected).abs().max() <= 1e-11
