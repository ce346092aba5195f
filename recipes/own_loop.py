"""DISAM in a training loop of your own: replace ``loss.backward()`` by ``disam.backward(...)``, keep the rest.

    python recipes/own_loop.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
    accelerate launch recipes/own_loop.py FOLDER sketch --backbone ViT-B-16 --pretrained openai

FOLDER/<domain>/<class>/*.jpg; nothing here but the step is special: any model, optimizer and loader would do.
"""

from pathlib import Path

import torch
import typer
from accelerate import Accelerator

from disam_peft import DISAM
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapters import LoraAdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.data.load import load
from disam_peft.data.loading.loader import make_train_loader
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.splits import leave_out
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.evaluation.metrics import metrics_by_domain
from disam_peft.evaluation.predict import predict
from disam_peft.objectives.losses import cross_entropy


def main(folder: Path, held_out: str, backbone: str = "ViT-B-16", pretrained: str = "openai", steps: int = 200) -> None:
    accelerator = Accelerator()
    sources, target = leave_out(load(DataConfig(root=folder)), held_out)
    clip = load_backbone(BackboneConfig(name=backbone, pretrained=pretrained or None))
    prompts = ClassPrompts(sources.prompt_names, ("a photo of a {}.",))
    adapter = build_adapter(LoraAdapterConfig(seed=0), clip, prompts)
    model = ClipClassifier(clip, adapter, prompts).to(accelerator.device)

    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = DomainBatches(sources.domain_ids, 36, 0, steps, **ranks)
    transform = TrainTransform(clip.preprocessing, AugmentConfig(), seed=0)
    params = list(model.trainable().values())
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(params, lr=1e-3))
    disam = DISAM(params, rho=0.05, variance_weight=0.1, backward=accelerator.backward, reduce_gradients=True)

    model.train()
    for step, batch in enumerate(make_train_loader(sources, batches, transform), start=1):
        pixels, labels, domains = (batch[k].to(accelerator.device) for k in ("pixels", "labels", "domains"))
        with accelerator.autocast():
            frozen = model.encode_frozen(pixels)  # the same in both passes: once is enough

        def per_sample_loss(frozen: torch.Tensor = frozen, labels: torch.Tensor = labels) -> torch.Tensor:
            with accelerator.autocast():
                return cross_entropy(model.logits(frozen), labels)

        report = disam.backward(per_sample_loss, domains)
        optimizer.step()
        if step % 10 == 0 or step == steps:
            accelerator.print(f"step {step}: loss {report.loss:.4f}, at w + e {report.perturbed_loss:.4f}")
    top1 = metrics_by_domain(predict(model, target))["mean"]["top1"]
    accelerator.print(f"top-1 on {held_out}: {top1:.1%}")


if __name__ == "__main__":
    typer.run(main)
