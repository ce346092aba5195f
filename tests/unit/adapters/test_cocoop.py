"""CoCoOp: the authors' values, each image's prompts against CoOp with that context, memory, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from disam_peft.adapters.base import cosine_logits
from disam_peft.adapters.coop.class_chunks import plan_image_chunks
from disam_peft.adapters.coop.cocoop_adapter import CoCoOpAdapter, meta_token
from disam_peft.adapters.coop.context_start import ContextStart
from disam_peft.adapters.prompts import ClassPrompts, FrozenText
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.config.anchors import ClassFeaturesAnchorConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.losses import ContrastiveConfig, MarginSoftmaxConfig, SigmoidConfig
from disam_peft.config.objective import ObjectiveConfig, adapter_conflict
from disam_peft.config.prompt_adapters import CoCoOpConfig, CoOpConfig
from disam_peft.disam.disam import DISAM
from disam_peft.errors import UserError
from disam_peft.objectives.base import Outputs
from tests.helpers.adapter_cells import FAMILIES, LABELS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.tiny import tiny_openclip

VALUES = np.load(Path(__file__).parents[2] / "reference" / "cocoop.npz")
META_NET = {"linear1.weight": "meta_down", "linear1.bias": "meta_down_bias"} | {
    "linear2.weight": "meta_up",
    "linear2.bias": "meta_up_bias",
}
NAMES = ("cat", "a very long name of many words", "fire truck", "{}")


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, request.param)


def cocoop(backbone: ClipBackbone, names: tuple[str, ...] = NAMES, **settings: Any) -> ClipClassifier:
    prompts = ClassPrompts(names, ("{}",))
    return tiny_classifier(backbone, CoCoOpConfig(context_tokens=4, reduction=2, seed=1, **settings), prompts=prompts)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# -- the authors' values -------------------------------------------------------------------------------------


def value(case: str, key: str) -> Tensor:
    return torch.from_numpy(VALUES[f"{case}/{key}"])


@pytest.fixture(scope="module")
def authors_tower(tmp_path_factory: pytest.TempPathFactory) -> ClipBackbone:
    """The text tower of their file behind an image tower of ours."""
    text = {"context_length": 14, "width": 16, "heads": 2, "layers": 2}
    name = tiny_openclip(tmp_path_factory.mktemp("clip"), embed_dim=32, quick_gelu=True, text_cfg=text)
    backbone = load_backbone(BackboneConfig(name=name)).to(dtype=torch.float64)
    ours: dict[str, nn.Parameter] = dict(backbone.model.text.named_parameters())
    with torch.no_grad():
        for key in VALUES.files:
            case, _, theirs = key.partition("/")
            if case != "cocoop_text" or theirs in ("logit_scale", "token_embedding.weight"):
                continue
            tensor = value(case, theirs)
            if ".in_proj_" in theirs:
                for name, part in zip("qkv", tensor.chunk(3), strict=True):
                    ours[theirs.replace("in_proj_", f"{name}_proj.")].copy_(part)
            else:
                ours[theirs].copy_(tensor)
    return backbone


@pytest.mark.parametrize("case", ["cocoop_random_ctx", "cocoop_init_words"])
def test_the_authors_logits_and_gradients(authors_tower: ClipBackbone, case: str) -> None:
    tokens_CL, context, features_BE = value(case, "tokens"), value(case, "ctx"), value(case, "image_features")
    embeddings_CLW = value("cocoop_text", "token_embedding.weight")[tokens_CL]
    start = ContextStart(tokens_CL, embeddings_CLW, context.clone(), first=1, length=len(context))
    layers = tuple(value(case, f"meta_net.{theirs}") for theirs in META_NET)
    adapter = CoCoOpAdapter(CoCoOpConfig(), authors_tower, start, layers)
    text = FrozenText(tokens_CL, 1, None, None)
    class_features_BCE = adapter.class_features_of_images(authors_tower, text, features_BE)
    logits_BC = cosine_logits(features_BE, class_features_BCE, value(case, "logit_scale").exp(), None)
    assert (logits_BC - value(case, "logits")).abs().max() <= 1e-10
    loss = nn.functional.cross_entropy(logits_BC, value(case, "labels"))
    assert abs(loss.item() - value(case, "loss").item()) <= 1e-10
    loss.backward()
    gradients = {"context": "ctx", **{ours: f"meta_net.{theirs}" for theirs, ours in META_NET.items()}}
    for name, theirs in gradients.items():
        found = adapter.get_parameter(name).grad
        assert found is not None and (found - value(case, f"grad_{theirs}")).abs().max() <= 1e-10
    assert json.loads(str(VALUES["meta"]))["cases"][case]["n_ctx"] == len(context)


# -- each image's prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_specific", [False, True])
def test_each_image_has_the_features_of_coop_with_its_own_context(backbone: ClipBackbone, class_specific: bool) -> None:
    classifier = cocoop(backbone, class_specific=class_specific)
    adapter, features_BE = classifier.adapter, classifier.encode_frozen(pixels())
    assert isinstance(adapter, CoCoOpAdapter) and classifier.image_split is None
    found = classifier.outputs(features_BE)
    layers = adapter.meta_down, adapter.meta_down_bias, adapter.meta_up, adapter.meta_up_bias
    shift_BW = meta_token(features_BE, *layers)
    prompts = ClassPrompts(NAMES, ("{}",))
    coop = build_adapter(CoOpConfig(context_tokens=4, class_specific=class_specific), backbone, prompts)
    for image, shift_W in enumerate(shift_BW):
        coop.load_state({"context": (adapter.context + shift_W).detach()})
        wanted = ClipClassifier(backbone, coop, prompts)
        assert relative(found.class_features_CE[image], wanted.class_features()) <= 1e-12
        assert relative(found.logits_BC[image], wanted.logits(features_BE[image : image + 1])[0]) <= 1e-12
    assert relative(found.class_features_CE[0], found.class_features_CE[1]) > 1e-3, "images differ"


def test_words_and_a_silent_network_are_zero_shot_with_that_template(backbone: ClipBackbone) -> None:
    adapter = build_adapter(CoCoOpConfig(init="a photo of a", seed=0), backbone, PROMPTS)
    state = adapter.state()
    assert tuple(state["context"].shape) == (4, 32) and tuple(state["meta_down"].shape) == (1, 16)
    assert state["meta_up"].abs().max() <= 1 and state["meta_up"].std() > 0.4, "as nn.Linear draws it"
    adapter.load_state({**state, "meta_up": torch.zeros(32, 1), "meta_up_bias": torch.zeros(32)})
    found = ClipClassifier(backbone, adapter, PROMPTS)(pixels())
    wanted = zero_shot(backbone, PROMPTS.class_names, ["a photo of a {}."])(pixels())
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("class_specific", [False, True])
def test_a_budget_changes_the_chunks_and_not_the_step(twins: tuple[str, str], class_specific: bool) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    free = cocoop(backbone, class_specific=class_specific, memory_budget_gb=None)
    frozen = free.encode_frozen(pixels())
    calls: list[int] = []
    first = next(t.name for t in backbone.targets() if t.tower == "text" and t.projection == "fc1" and t.block == 0)
    backbone.model.get_submodule(first).register_forward_hook(lambda *_: calls.append(1))
    prompts = next(iter(free.adapter._prompts))
    assert prompts.packed is not None
    one_image = 3 * prompts.packed.kept_widths() * 32 * 8 / 1e9  # three blocks of width 32 in float64
    gradients, forwards = [], []
    for budget in (None, 10 * one_image, 2.1 * one_image, 0.51 * one_image, 1e-12):
        classifier = cocoop(backbone, class_specific=class_specific, memory_budget_gb=budget)
        step = DISAM(list(classifier.trainable().values()), rho=0.05, variance_weight=0.5, num_domains=2)

        def losses(classifier: ClipClassifier = classifier) -> Tensor:
            return nn.functional.cross_entropy(classifier.logits(frozen), LABELS, reduction="none")

        calls.clear()
        step.backward(losses, torch.tensor([0, 0, 0, 1, 1, 1]))
        forwards.append(len(calls))
        gradients.append(torch.cat([p.grad.flatten() for p in classifier.trainable().values() if p.grad is not None]))
        with torch.no_grad():
            assert relative(classifier.logits(frozen), free.logits(frozen)) <= 1e-13
    # two passes; of chunks, which are computed once more in backward, three of two images, six halves, and each alone
    assert forwards == [2, 2, 2 * 2 * 3, 2 * 2 * 6 * 2, 2 * 2 * 6 * 4]
    assert all(relative(one, gradients[0]) <= 1e-11 for one in gradients[1:]) and gradients[0].norm() > 1e-4


def test_without_a_backward_pass_more_images_go_at_once(twins: tuple[str, str]) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    tokens_CL = backbone.cut_prompts(backbone.tokenize([f"a photo of a {name}." for name in NAMES]))
    plan = plan_image_chunks(backbone, tokens_CL, 5, 1e-3)
    assert plan.training is not None and plan.judging is not None and len(plan.classes) == 1
    assert plan.judging // plan.training == backbone.text_blocks
    assert plan.images(10**9, for_backward=True) == plan.training and plan.images(2, for_backward=True) == 2


# -- what is refused -----------------------------------------------------------------------------------------


def test_what_needs_class_features_of_all_images_is_refused(twins: tuple[str, str]) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), CoCoOpConfig(context_tokens=2, seed=1))
    assert classifier.shared_class_features() is None
    with pytest.raises(UserError, match="makes class features for each image, and has none for all images"):
        classifier.class_features()
    with pytest.raises(UserError, match="changes class features, not those of each prompt"):
        classifier.text_features()
    config = classifier.adapter.config
    for loss in (ContrastiveConfig(), MarginSoftmaxConfig()):
        message = adapter_conflict(ObjectiveConfig(loss=loss), config) or ""
        assert f"kind={loss.kind} compares images with class features that are the same for all" in message
    anchored = ObjectiveConfig(anchors=[ClassFeaturesAnchorConfig()])
    assert "makes class features for each image; take the anchor logits" in (adapter_conflict(anchored, config) or "")
    assert adapter_conflict(ObjectiveConfig(loss=SigmoidConfig()), config) is None
    assert adapter_conflict(anchored, CoOpConfig()) is None
    with pytest.raises(ValueError, match="needs the class features of all images"):
        Outputs(torch.zeros(2, 3), LABELS[:2], class_features_CE=torch.zeros(2, 3, 4)).class_features  # noqa: B018
    with pytest.raises(ValueError, match="cocoop trains prompts, and with a head of its own"):
        LpFtConfig.model_validate({"adapter": {"kind": "cocoop"}})
