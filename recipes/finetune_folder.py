"""A folder of domains to an adapter, through the Python API: data, backbone, adapter, train, evaluate, export.

python recipes/finetune_folder.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
accelerate launch recipes/finetune_folder.py FOLDER sketch --backbone ViT-B-16 --pretrained openai
"""

from pathlib import Path
from typing import Annotated

import typer

import disam_peft as dp

BACKBONE = "A model of open_clip, or demo: the small CLIP that comes with the package, with --pretrained ''."
PRETRAINED = "Its weights. Empty ('') for a model that has its own: demo, or local-dir:FOLDER."


def main(
    folder: Annotated[Path, typer.Argument(help="FOLDER/<domain>/<class>/*.jpg.")],
    held_out: Annotated[str, typer.Argument(help="The domain that training does not see.")],
    backbone: Annotated[str, typer.Option(help=BACKBONE)] = "ViT-B-16",
    pretrained: Annotated[str, typer.Option(help=PRETRAINED)] = "openai",
    steps: int = 500,
    output: Path = Path("adapter"),
) -> None:
    """Train a LoRA with DISAM on every domain but one, and judge it there beside zero-shot CLIP."""
    sources, target = dp.leave_out(dp.load_data(dp.DataConfig(root=folder)), held_out)
    training, validation = dp.split_train_validation(sources, fraction=0.2, seed=0)

    accelerator = dp.start_accelerator()
    clip = dp.load_backbone(dp.BackboneConfig(name=backbone, pretrained=pretrained or None)).to(accelerator.device)
    prompts = dp.ClassPrompts(sources.prompt_names, ("a photo of a {}.",))
    zero_shot = dp.predict(dp.ClipClassifier(clip, None, prompts), target)

    adapter = dp.build_adapter(dp.LoraAdapterConfig(blocks=dp.LastBlocks(last=2), seed=0), clip, prompts)
    classifier = dp.ClipClassifier(clip, adapter, prompts)
    dp.fit(
        classifier,
        training,
        method=dp.MethodConfig(name="disam", rho=0.05, variance_weight=0.1),
        config=dp.TrainConfig(steps=steps, batch_size=36, learning_rate=5e-4),
        accelerator=accelerator,
        validate=lambda: dp.validation_score(dp.predict(classifier, validation)),
    )
    if accelerator.is_main_process:
        dp.export_peft(output, classifier)
    for title, predictions in (("zero-shot", zero_shot), ("DISAM", dp.predict(classifier, target))):
        accelerator.print(f"{title} on {held_out}: {dp.metrics_by_domain(predictions)[held_out]['top1']:.1%}")


if __name__ == "__main__":
    typer.run(main)
