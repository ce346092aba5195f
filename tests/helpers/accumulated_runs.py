"""Runs of ``fit`` in pieces, in this process and on two. Imports no pytest: each process imports this file."""

import os
import sys
import warnings

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.config.anchors import (
    ClassFeaturesAnchorConfig,
    ImageFeaturesAnchorConfig,
    LogitsAnchorConfig,
    WeightsAnchorConfig,
)
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig, MixupConfig
from disam_peft.config.losses import ContrastiveConfig, CrossEntropyConfig, MarginSoftmaxConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.penalties import (
    CoralConfig,
    FishrConfig,
    GroupDROConfig,
    IRMConfig,
    MMDConfig,
    VRexConfig,
)
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.fit import fit
from tests.helpers.adapter_cells import CELLS, LAST_TWO, tiny_backbone, tiny_classifier
from tests.helpers.ranks import fork_ranks

METHODS = {
    "erm": MethodConfig(name="erm"),
    "sam": MethodConfig(name="sam", rho=0.3),
    "disam": MethodConfig(rho=0.3, variance_weight=0.6),
    "adaptive": MethodConfig(rho=1.0, variance_weight=0.6, adaptive=True),
    "disam_gsam": MethodConfig(name="disam_gsam", rho=0.3, variance_weight=0.6, variance_scale="relative"),
    "disam_sagm": MethodConfig(name="disam_sagm", rho=0.3, variance_weight=0.6, alpha=0.5, variance_form="entropic"),
    "second half": MethodConfig.model_validate({"rho": 0.3, "variance_weight": 0.6, "from": 0.5}),
    "follows": MethodConfig.model_validate({"rho": {"kind": "follow_lr", "max": 0.3, "min": 0.1}, "name": "gsam"}),
}
OBJECTIVES = {
    "vrex": ObjectiveConfig(penalties=[VRexConfig(weight=3.0, anneal=1)], loss=CrossEntropyConfig(label_smoothing=0.1)),
    "vrex not climbed": ObjectiveConfig(penalties=[VRexConfig(weight=3.0, anneal=1, in_ascent=False)]),
    "domains": ObjectiveConfig(mean_over="domains"),
    "penalties": ObjectiveConfig(
        penalties=[
            CoralConfig(weight=50.0),
            MMDConfig(weight=0.5, in_ascent=False),
            IRMConfig(weight=2.0, anneal=1),
            FishrConfig(weight=1e5, anneal=1, ema=0.5),
            GroupDROConfig(weight=0.6, eta=0.3, variant="sagawa", adjustment=2.0),
        ]
    ),
    "contrastive": ObjectiveConfig(loss=ContrastiveConfig()),
    "margin softmax": ObjectiveConfig(loss=MarginSoftmaxConfig(class_weights="balanced")),
    "anchors of lora": ObjectiveConfig(
        anchors=[
            LogitsAnchorConfig(weight=5.0),
            ImageFeaturesAnchorConfig(distance="squared"),
            WeightsAnchorConfig(weight=2.0, in_ascent=False),
        ]
    ),
    "anchors of coop": ObjectiveConfig(
        anchors=[LogitsAnchorConfig(weight=5.0), ClassFeaturesAnchorConfig(), WeightsAnchorConfig(weight=2.0)]
    ),
}
CAPTIONS = ("a photo of a {}.", "a drawing of a {}.", "a {} in the wild.")
ADAPTERS = {**CELLS, "lora-dropout": LoraAdapterConfig(blocks=LAST_TWO, rank=2, dropout=0.4, seed=1)}


def fresh_accelerator(precision="no"):
    """Accelerate keeps one state for a process, of whatever precision was first."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
    return start_accelerator(precision)


def run(
    twins,
    folder,
    pieces,
    *,
    cell="lora-image",
    family="open_clip",
    method="disam",
    objective=None,
    batch=12,
    steps=3,
    source="images",
    scale=None,
    mixup=None,
    templates=("a photo of a {}.",),
    **settings,
):
    """(trained weights, events) after a few steps of SGD with momentum in float64, ``pieces`` pieces a step."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
    dataset = load(DataConfig(root=folder, pixel_store=36 if source == "pixel store" else None))
    prompts = ClassPrompts(dataset.prompt_names, templates)
    classifier = tiny_classifier(tiny_backbone(twins, family), ADAPTERS[cell], prompts=prompts)
    accelerator = start_accelerator()
    if scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    events = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the domain weights were negative.*")
        fit(
            classifier,
            dataset,
            method=METHODS[method],
            objective=None if objective is None else OBJECTIVES[objective],
            config=TrainConfig(
                steps=steps,
                batch_size=batch,
                gradient_accumulation_steps=pieces,
                optimizer="sgd",
                learning_rate=0.05,
                workers=0,
                log_every=1,
                **settings,
            ),
            augment=AugmentConfig(kind="none", mixup=mixup),
            features=FeatureConfig(store=source == "feature store"),
            accelerator=accelerator,
            on_event=lambda name, **values: events.append((name, values)),
        )
    return torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()]), events


ON_TWO = {
    "two_phase": {"pieces": 2, "batch": 13},
    "per_domain": {"pieces": 3, "batch": 18},
    "mean": {"pieces": 3, "batch": 7, "method": "sam"},
    "whole": {"pieces": 4, "batch": 9, "cell": "coop-shared"},
    "whole tower": {"pieces": 2, "batch": 13, "cell": "full"},
    "probe first": {"pieces": 2, "batch": 13, "cell": "lp_ft-lora"},
    "cache": {"pieces": 2, "batch": 13, "cell": "tip_adapter-keys"},
    "prompts of both towers": {"pieces": 2, "batch": 13, "cell": "maple"},
    "prompts of images": {"pieces": 2, "batch": 13, "cell": "cocoop"},
    "held to zero-shot": {"pieces": 2, "batch": 9, "cell": "clap", "method": "sam"},
    "one piece": {"pieces": 1, "batch": 13},
    "penalty": {"pieces": 2, "batch": 13, "objective": "vrex"},
    "penalty, one piece": {"pieces": 1, "batch": 13, "objective": "vrex"},
    "penalties": {"pieces": 2, "batch": 13, "objective": "penalties"},
    "penalties, one piece": {"pieces": 1, "batch": 13, "objective": "penalties"},
    "penalties of a head": {"pieces": 2, "batch": 13, "objective": "penalties", "cell": "probe-zero_shot"},
    "gsam": {"pieces": 2, "batch": 13, "method": "disam_gsam"},
    "sagm": {"pieces": 3, "batch": 18, "method": "disam_sagm", "scale": 1024.0},
    "second half": {"pieces": 2, "batch": 13, "method": "second half"},
    "mixup": {"pieces": 2, "batch": 13, "objective": "vrex", "mixup": MixupConfig()},
    "mixup, balanced classes": {"pieces": 1, "batch": 7, "mixup": MixupConfig(), "class_sampling": "balanced"},
    "captions": {"pieces": 2, "batch": 13, "cell": "lora-both", "objective": "contrastive", "templates": CAPTIONS},
    "captions, whole": {"pieces": 2, "batch": 9, "cell": "coop-shared", "objective": "contrastive"},
    "margins": {"pieces": 2, "batch": 13, "cell": "lora-both", "objective": "margin softmax"},
    "anchors": {"pieces": 2, "batch": 13, "objective": "anchors of lora"},
    "anchors, whole": {"pieces": 2, "batch": 9, "cell": "coop-shared", "objective": "anchors of coop"},
}


def main(port, open_clip, transformers, folder, output):
    """Every case of ``ON_TWO`` on two ranks, forks of this process."""
    torch.set_num_threads(1)

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        results = {}
        for name, options in ON_TWO.items():
            results[name] = run((open_clip, transformers), folder, **options)[0]
        assert PartialState().num_processes == 2
        torch.save(results, f"{output}/{rank}.pt")

    fork_ranks(2, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
