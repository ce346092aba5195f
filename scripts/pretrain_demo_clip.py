"""Train the small CLIP that ships with the package, from scratch, on captioned pictures of DomainShapes.

    python scripts/pretrain_demo_clip.py

The result goes to disam_peft/backbones/demo: one set of weights (float16) in the layouts of open_clip and of
transformers, a tokenizer that both read, and the log and figures of the training. The pictures come from another seed
than any benchmark (PRETRAINING_SEED). They are few, and fewest in the domains that are hardest, and only some of the
captions name the object: the model is meant to be useful and far from perfect.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_captions import TEMPLATES, caption, make_tokenizer
from demo_checkpoint import CONTEXT_LENGTH, MEAN, STD, create_model, write_checkpoint, write_figures
from torch import Tensor, nn

from disam_peft.data.shapes import CLASSES, DOMAINS, draw_scene, paint
from disam_peft.progress import track

PRETRAINING_SEED = 20_001
IMAGES = {"blueprint": 1800, "cartoon": 2400, "painting": 1500, "photo": 1800, "silhouette": 2100, "sketch": 1800}
"""Pictures per domain; a multiple of the number of classes."""
CAPTIONS_PER_IMAGE = 4
CLASS_IN_CAPTION = 0.75
EASY_DOMAINS = ("cartoon", "silhouette")
EASY_EPOCHS = 9
"""At first the model sees the domains with the clearest shapes alone, each with its plainest caption: shown everything
from the start, it learns styles and colours and no shape for a long time."""
EVALUATION_IMAGES = 40
"""Per class and domain."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "disam_peft/backbones/demo")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the pictures")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.monotonic()

    pixels_NCHW, captions = captioned_pictures()
    tokenizer = make_tokenizer([*(text for texts in captions for text in texts), *_every_prompt()])
    tokens_NKL = tokenize(tokenizer, captions)
    print(f"{len(pixels_NCHW)} pictures, {len(tokenizer)} tokens, {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(options.seed)
    model = create_model(len(tokenizer))
    tests = evaluation_pictures()
    log: list[dict[str, Any]] = []
    everything_N = torch.arange(len(pixels_NCHW))
    easy_M = everything_N[torch.tensor([domain in EASY_DOMAINS for domain, _, _ in _plan()])]
    rounds = [(EASY_EPOCHS, easy_M), (options.epochs, everything_N)]
    steps = sum(epochs * (len(chosen) // options.batch_size) for epochs, chosen in rounds)
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(options.seed)
    for epoch in range(1, EASY_EPOCHS + options.epochs + 1):
        model.train()
        losses = []
        chosen_M = easy_M if epoch <= EASY_EPOCHS else everything_N
        kinds = 1 if epoch <= EASY_EPOCHS else CAPTIONS_PER_IMAGE
        order_M = chosen_M[torch.randperm(len(chosen_M), generator=generator)]
        batches = order_M[: len(order_M) // options.batch_size * options.batch_size].split(options.batch_size)
        for batch_B in track(batches, f"epoch {epoch}", total=len(batches)):
            which_B = torch.randint(kinds, (len(batch_B),), generator=generator)
            pixels = normalised(moved(pixels_NCHW[batch_B], generator))
            loss = contrastive_loss(model, pixels, tokens_NKL[batch_B, which_B])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            losses.append(float(loss.detach()))
        accuracy = zero_shot(model, tokenizer, tests)
        entry = {
            "epoch": epoch,
            "loss": round(sum(losses) / len(losses), 4),
            "seconds": round(time.monotonic() - started),
        }
        log.append({**entry, "zero_shot": accuracy})
        print(json.dumps(log[-1]), flush=True)
    write_checkpoint(options.output, model, tokenizer)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    settings |= {"images": IMAGES, "pretraining_seed": PRETRAINING_SEED, "class_in_caption": CLASS_IN_CAPTION}
    settings |= {"easy_domains": EASY_DOMAINS, "easy_epochs": EASY_EPOCHS}
    write_figures(options.output, model, settings, log)


def captioned_pictures() -> tuple[Tensor, list[list[str]]]:
    """(N, 3, 64, 64) uint8 and CAPTIONS_PER_IMAGE sentences for each."""
    pixels, captions = [], []
    for domain, class_name, index in track(_plan(), "painting"):
        scene = draw_scene(PRETRAINING_SEED, "pretraining", domain, class_name, index)
        pixels.append(paint(scene))
        captions.append([caption(scene, domain, CLASS_IN_CAPTION, k) for k in range(CAPTIONS_PER_IMAGE)])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), captions


def evaluation_pictures() -> dict[str, tuple[Tensor, Tensor]]:
    """Domain -> pixels and labels, of a split that the training has not seen."""
    tests = {}
    for domain in DOMAINS:
        pictures = [
            paint(draw_scene(PRETRAINING_SEED, "evaluation", domain, name, index))
            for name in CLASSES
            for index in range(EVALUATION_IMAGES)
        ]
        labels = torch.arange(len(CLASSES)).repeat_interleave(EVALUATION_IMAGES)
        tests[domain] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), labels
    return tests


def tokenize(tokenizer: Any, captions: Sequence[Sequence[str]]) -> Tensor:
    """(N, K, L) int64, padded."""
    flat = tokenizer(
        [text for texts in captions for text in texts],
        padding="max_length",
        max_length=CONTEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    return flat.reshape(len(captions), -1, CONTEXT_LENGTH)


def contrastive_loss(model: Any, pixels_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
    """CLIP's loss over images and texts, with every equal caption of the batch a match."""
    # The text tower is causal: what comes after the last end of a sentence changes nothing.
    longest = int(tokens_BL.argmax(dim=1).max()) + 1
    unique_UL, which_B = tokens_BL[:, :longest].unique(dim=0, return_inverse=True)
    images_BE = model.encode_image(pixels_BCHW, normalize=True)
    texts_BE = encode_text(model, unique_UL)[which_B]
    logits_BB = model.logit_scale.exp() * images_BE @ texts_BE.T
    same_BB = (which_B[:, None] == which_B[None, :]).float()
    targets_BB = same_BB / same_BB.sum(dim=1, keepdim=True)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits_BB, targets_BB) + cross_entropy(logits_BB.T, targets_BB)) / 2


def encode_text(model: Any, tokens_UL: Tensor) -> Tensor:
    """(U, E) unit vectors of texts cut to the longest, which open_clip's own method would not take."""
    length = tokens_UL.shape[1]
    hidden = model.token_embedding(tokens_UL) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    pooled = hidden[torch.arange(len(hidden)), tokens_UL.argmax(dim=1)] @ model.text_projection
    return nn.functional.normalize(pooled, dim=-1)


def moved(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to four pixels, its border repeated."""
    margin = 4
    count, _, height, width = pixels_BCHW.shape
    down_B, right_B = torch.randint(-margin, margin + 1, (2, count), generator=generator)
    rows_BH = (torch.arange(height) + down_B[:, None]).clamp(0, height - 1)
    columns_BW = (torch.arange(width) + right_B[:, None]).clamp(0, width - 1)
    last = pixels_BCHW.permute(0, 2, 3, 1)
    return last[torch.arange(count)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def normalised(pixels_BCHW: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels_BCHW.float() / 255 - mean) / std


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Any, tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy per domain and their mean, in percent, with the prompt "a photo of a {}."."""
    model.eval()
    tokens = tokenize(tokenizer, [[f"a photo of a {name}." for name in CLASSES]])[0]
    texts_CE = model.encode_text(tokens, normalize=True)
    accuracy = {}
    for domain, (pixels, labels) in tests.items():
        features = torch.cat([model.encode_image(normalised(part), normalize=True) for part in pixels.split(240)])
        right = (features @ texts_CE.T).argmax(dim=1) == labels
        accuracy[domain] = round(100 * float(right.double().mean()), 1)
    return {**accuracy, "mean": round(sum(accuracy.values()) / len(accuracy), 1)}


def _plan() -> list[tuple[str, str, int]]:
    """Domain, class and index of every picture to learn from."""
    return [(d, c, i) for d in DOMAINS for c in CLASSES for i in range(IMAGES[d] // len(CLASSES))]


def _every_prompt() -> list[str]:
    return [template.replace("{}", name) for template in TEMPLATES for name in CLASSES]


def _rate(step: int, steps: int) -> float:
    warmup = steps // 20
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]


if __name__ == "__main__":
    main()
