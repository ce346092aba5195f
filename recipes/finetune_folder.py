"""A folder of domains to an adapter, through the Python API: data, backbone, adapter, train, evaluate, export.

    python recipes/finetune_folder.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
    accelerate launch recipes/finetune_folder.py FOLDER sketch --backbone ViT-B-16 --pretrained openai

FOLDER/<domain>/<class>/*.jpg
"""

from pathlib import Path

import typer

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapters import LastBlocks, LoraAdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.data.splits import leave_out, split_train_validation
from disam_peft.evaluation.metrics import metrics_by_domain
from disam_peft.evaluation.predict import predict
from disam_peft.evaluation.protocols import validation_score
from disam_peft.export.peft import export_peft
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.trainer import fit


def main(
    folder: Path,
    held_out: str,
    backbone: str = "ViT-B-16",
    pretrained: str = "openai",
    steps: int = 500,
    output: Path = Path("adapter"),
) -> None:
    sources, target = leave_out(load(DataConfig(root=folder)), held_out)
    training, validation = split_train_validation(sources, fraction=0.2, seed=0)

    accelerator = start_accelerator()
    clip = load_backbone(BackboneConfig(name=backbone, pretrained=pretrained or None)).to(accelerator.device)
    prompts = ClassPrompts(sources.prompt_names, ("a photo of a {}.",))
    zero_shot = predict(ClipClassifier(clip, None, prompts), target)

    adapter = build_adapter(LoraAdapterConfig(blocks=LastBlocks(last=2), seed=0), clip, prompts)
    classifier = ClipClassifier(clip, adapter, prompts)
    fit(
        classifier,
        training,
        method=MethodConfig(name="disam", rho=0.05, variance_weight=0.1),
        config=TrainConfig(steps=steps, batch_size=36, learning_rate=5e-4),
        accelerator=accelerator,
        validate=lambda: validation_score(predict(classifier, validation)),
    )
    if accelerator.is_main_process:
        export_peft(output, classifier)
    for title, predictions in (("zero-shot", zero_shot), ("DISAM", predict(classifier, target))):
        accelerator.print(f"{title} on {held_out}: {metrics_by_domain(predictions)[held_out]['top1']:.1%}")


if __name__ == "__main__":
    typer.run(main)
