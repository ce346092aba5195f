"""DISAM in a training loop of your own: replace ``loss.backward()`` by ``disam.backward(...)``, keep the rest.

python recipes/own_loop.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
accelerate launch recipes/own_loop.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator

import disam_peft as dp

BACKBONE = "A model of open_clip, or demo: the small CLIP that comes with the package, with --pretrained ''."


def main(
    folder: Annotated[Path, typer.Argument(help="FOLDER/<domain>/<class>/*.jpg.")],
    held_out: Annotated[str, typer.Argument(help="The domain that training does not see.")],
    backbone: Annotated[str, typer.Option(help=BACKBONE)] = "ViT-B-16",
    pretrained: str = "openai",
    steps: int = 200,
) -> None:
    """Train a LoRA with DISAM. Only the step is special: any model, optimizer and loader would do."""
    accelerator = Accelerator()
    sources, target = dp.leave_out(dp.load_data(dp.DataConfig(root=folder)), held_out)
    clip = dp.load_backbone(dp.BackboneConfig(name=backbone, pretrained=pretrained or None))
    prompts = dp.ClassPrompts(sources.prompt_names, ("a photo of a {}.",))
    adapter = dp.build_adapter(dp.LoraAdapterConfig(seed=0), clip, prompts)
    model = dp.ClipClassifier(clip, adapter, prompts).to(accelerator.device)

    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = dp.DomainBatches(sources.domain_ids, 36, 0, steps, **ranks)
    transform = dp.TrainTransform(clip.preprocessing, dp.AugmentConfig(), seed=0)
    params = list(model.trainable().values())
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(params, lr=1e-3))
    disam = dp.DISAM(params, rho=0.05, variance_weight=0.1, backward=accelerator.backward, reduce_gradients=True)

    model.train()
    for step, batch in enumerate(dp.make_train_loader(sources, batches, transform), start=1):
        pixels, labels, domains = (batch[k].to(accelerator.device) for k in ("pixels", "labels", "domains"))
        with accelerator.autocast():
            frozen = model.encode_frozen(pixels)  # the same in both passes: once is enough

        def per_sample_loss(frozen: torch.Tensor = frozen, labels: torch.Tensor = labels) -> torch.Tensor:
            with accelerator.autocast():
                return torch.nn.functional.cross_entropy(model.logits(frozen), labels, reduction="none")

        report = disam.backward(per_sample_loss, domains)
        optimizer.step()
        if step % 10 == 0 or step == steps:
            accelerator.print(f"step {step}: loss {report.loss:.4f}, at w + e {report.perturbed_loss:.4f}")
    top1 = dp.metrics_by_domain(dp.predict(model, target))["mean"]["top1"]
    accelerator.print(f"top-1 on {held_out}: {top1:.1%}")


if __name__ == "__main__":
    typer.run(main)
