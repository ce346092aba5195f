"""Where the time of a training step goes, as ratios measured side by side in one process.

    python scripts/benchmark.py bookkeeping

Variants run interleaved (A B A B ...), and the median of the per-round ratios is printed with its range: machines are
noisy, ratios are not. Weights are random at the real sizes, which changes no time. Prints a Markdown table.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from disam_peft import DISAM
from disam_peft.adapters import ClassPrompts, LastBlocks, LoraAdapterConfig, build_adapter
from disam_peft.backbones import BackboneConfig, load_backbone
from disam_peft.classifier import ClipClassifier
from disam_peft.objectives import cross_entropy

app = typer.Typer(help=__doc__)


def interleaved(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the first round is cold and not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], other: list[float]) -> str:
    """Median of the per-round ratios, with the smallest and the largest."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return f"{statistics.median(ratios):.4f} [{min(ratios):.4f} - {max(ratios):.4f}]"


def machine() -> str:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def lora_classifier(classes: int, blocks: int) -> ClipClassifier:
    """ViT-B/32 at its real size with random weights, LoRA on q and v of the last blocks of the image tower."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM weights.*")
        backbone = load_backbone(BackboneConfig(name="ViT-B-32", pretrained="none"))
    prompts = ClassPrompts(tuple(f"thing {i}" for i in range(classes)), ("a photo of a {}.",))
    config = LoraAdapterConfig(blocks=LastBlocks(last=blocks), rank=8, seed=0)
    return ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).train()


@app.command()
def bookkeeping(
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 7,
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 32,
    blocks: Annotated[int, typer.Option(help="Trained image blocks.")] = 12,
) -> None:
    """Everything in a step but the two forward-backward passes: domain sums, weights, norm, perturbation, restore."""
    torch.manual_seed(0)
    classifier = lora_classifier(7, blocks)
    params = list(classifier.trainable().values())
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % 7
    domains = torch.arange(batch) % 3
    frozen = classifier.encode_frozen(pixels)
    in_passes = 0.0

    def per_sample_loss() -> torch.Tensor:
        return cross_entropy(classifier.logits(frozen), labels)

    def timed_loss() -> torch.Tensor:
        nonlocal in_passes
        start = time.perf_counter()
        loss_B = per_sample_loss()
        in_passes += time.perf_counter() - start
        return loss_B

    def timed_backward(loss: torch.Tensor) -> None:
        nonlocal in_passes
        start = time.perf_counter()
        loss.backward(inputs=params)
        in_passes += time.perf_counter() - start

    disam = DISAM(params, rho=0.05, variance_weight=0.1, num_domains=3, backward=timed_backward)
    shares, bookkept = [], []
    for number in range(rounds + 1):
        in_passes = 0.0
        start = time.perf_counter()
        disam.backward(timed_loss, domains)
        whole = time.perf_counter() - start
        if number > 0:
            shares.append((whole - in_passes) / whole)
            bookkept.append(1e3 * (whole - in_passes))
    typer.echo(f"{machine()}\n")
    typer.echo("| what | median | smallest | largest |\n|---|---|---|---|")
    rows = (("bookkeeping / step, %", [100 * s for s in shares]), ("bookkeeping, ms", bookkept))
    for name, values in rows:
        typer.echo(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    elements = sum(p.numel() for p in params)
    typer.echo(f"\nViT-B/32, LoRA rank 8 on q and v of {blocks} blocks: {len(params)} tensors, {elements} parameters")
    typer.echo(f"batch {batch}, {rounds} rounds after a cold one")


if __name__ == "__main__":
    app()
