"""Losses, penalties and anchors beside DISAM in a training loop of your own.

python recipes/own_objective.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
accelerate launch recipes/own_objective.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator
from torch.nn.functional import normalize

import disam_peft as dp

BACKBONE = "A model of open_clip, or demo: the small CLIP that comes with the package, with --pretrained ''."
OBJECTIVE = dp.ObjectiveConfig(
    loss=dp.MarginSoftmaxConfig(class_weights="balanced"),
    penalties=[dp.CoralConfig(weight=10.0), dp.GroupDROConfig(weight=0.5)],
    anchors=[dp.LogitsAnchorConfig(weight=0.5), dp.WeightsAnchorConfig()],
)


def main(
    folder: Annotated[Path, typer.Argument(help="FOLDER/<domain>/<class>/*.jpg.")],
    held_out: Annotated[str, typer.Argument(help="The domain that training does not see.")],
    backbone: Annotated[str, typer.Option(help=BACKBONE)] = "ViT-B-16",
    pretrained: str = "openai",
    steps: int = 200,
) -> None:
    """Train a LoRA with an objective of several terms; own_loop.py is the same without them."""
    accelerator = Accelerator()
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    sources, target = dp.leave_out(dp.load_data(dp.DataConfig(root=folder)), held_out)
    clip = dp.load_backbone(dp.BackboneConfig(name=backbone, pretrained=pretrained or None))
    prompts = dp.ClassPrompts(sources.prompt_names, ("a photo of a {}.",))
    model = dp.ClipClassifier(clip, dp.build_adapter(dp.LoraAdapterConfig(seed=0), clip, prompts), prompts).to(device)

    batches = dp.DomainBatches(sources.domain_ids, 36, 0, steps, rank=rank, world_size=ranks)
    transform = dp.TrainTransform(clip.preprocessing, dp.AugmentConfig(), seed=0)
    params = list(model.trainable().values())
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(params, lr=1e-3))
    disam = dp.DISAM(params, rho=0.05, variance_weight=0.1, backward=accelerator.backward, reduce_gradients=True)

    weights = dp.class_weights(OBJECTIVE.loss, sources.labels, sources.classes)
    objective = dp.Objective(OBJECTIVE, class_weight_C=weights)
    objective.remember_start(params)  # for the anchor of the weights
    objective.prepare(torch.from_numpy(np.bincount(sources.domain_ids)))  # for GroupDRO's adjustment

    model.train()
    for step, batch in enumerate(dp.make_train_loader(sources, batches, transform), start=1):
        pixels, labels, domains = (batch[k].to(device) for k in ("pixels", "labels", "domains"))
        with accelerator.autocast():
            frozen = model.encode_frozen(pixels)  # the same in both passes: once is enough
            plain = model.zero_shot_outputs(frozen)  # what the anchors of logits and of features compare with
        reference = dp.Reference(plain.logits_BC, normalize(plain.features_BE.float(), dim=-1), plain.class_features_CE)

        def forward(
            frozen: torch.Tensor = frozen, labels: torch.Tensor = labels, reference: dp.Reference = reference
        ) -> dp.Forward:
            with accelerator.autocast():
                found = model.outputs(frozen)
            return objective.forward(
                found.logits_BC,
                labels,
                normalize(found.features_BE.float(), dim=-1),
                class_features_CE=found.class_features_CE,
                scale=found.scale,
                bias=found.bias,
                reference=reference,
            )

        report = disam.backward(forward, domains, objective=objective)
        optimizer.step()
        if step % 10 == 0 or step == steps:
            accelerator.print(f"step {step}: loss {report.loss:.4f}, objective {report.objective:.4f}")
    top1 = dp.metrics_by_domain(dp.predict(model, target))["mean"]["top1"]
    accelerator.print(f"top-1 on {held_out}: {top1:.1%}")


if __name__ == "__main__":
    typer.run(main)
