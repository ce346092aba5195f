"""Train the small CLIP that ships with the package, from scratch, on captioned pictures of DomainShapes.

    python scripts/pretrain_demo_clip.py

The result goes to disam_peft/backbones/demo: one set of weights (float16) in the layouts of open_clip and of
transformers, a tokenizer that both read, and the log and figures of the training. The pictures come from another seed
than any benchmark.

The model is to be useful, imperfect, and worth fine-tuning, which takes two rounds. In the first every picture has its
plainest caption, so that the loss is a choice among twelve sentences: shown everything from the start, a model this
small learns styles and colours and no shape for a long time, and features that know too little overfit when they are
fine-tuned. In the second the captions are as varied, silent and loose as captions are; see demo_captions. Some domains
have fewer pictures than others, so that domains differ in more than their looks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_captions import LOOSE, TEMPLATES, caption, make_tokenizer, plain_caption
from demo_checkpoint import CONTEXT_LENGTH, at_full_size, create_model, write_checkpoint, write_figures
from demo_pictures import PRETRAINING_SEED, evaluation_pictures, halved, moved, painted, scenes
from torch import Tensor, nn

from disam_peft.common.progress import track
from disam_peft.config.shapes import CLASSES

IMAGES = {"blueprint": 350, "cartoon": 600, "painting": 350, "photo": 450, "silhouette": 500, "sketch": 450}
"""Pictures of each class."""
CAPTIONS_PER_IMAGE = 4
CLASS_IN_CAPTION = 0.75
LOOSE_SHARE = 0.6
EVALUATION_IMAGES = 40
"""Per class and domain."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()

    images = {domain: max(1, round(options.share * count)) for domain, count in IMAGES.items()}
    plan = scenes("pretraining", images)
    pixels_NCHW = painted(plan)
    plain = [[plain_caption(scene)] for _, scene in plan]
    varied = [
        [caption(scene, d, k, naming=CLASS_IN_CAPTION, loose=LOOSE_SHARE) for k in range(CAPTIONS_PER_IMAGE)]
        for d, scene in plan
    ]
    tokenizer = make_tokenizer([*(text for texts in varied for text in texts), *_every_prompt()])
    print(f"{len(plan)} pictures, {len(tokenizer)} tokens, {time.monotonic() - started:.0f} s", flush=True)
    model = create_model(len(tokenizer), halved=True)
    tests = evaluation_pictures(max(1, round(options.share * EVALUATION_IMAGES)))
    rounds = [("plain", options.plain_epochs, plain), ("varied", options.varied_epochs, varied)]
    steps = (options.plain_epochs + options.varied_epochs) * (len(plan) // options.batch_size)
    advance = _optimizers(model, steps, options)
    generator = torch.Generator().manual_seed(options.seed)
    log: list[dict[str, Any]] = []
    for kind, epochs, texts in rounds:
        tokens_NKL = tokenize(tokenizer, texts)
        for _ in range(epochs):
            model.train()
            losses = []
            batches = torch.randperm(len(plan), generator=generator).split(options.batch_size)
            for batch_B in track(batches[: len(plan) // options.batch_size], f"{kind} captions, epoch {len(log) + 1}"):
                which_B = torch.randint(tokens_NKL.shape[1], (len(batch_B),), generator=generator)
                pixels_BCHW = halved(moved(pixels_NCHW[batch_B], generator))
                loss = contrastive_loss(model, pixels_BCHW, tokens_NKL[batch_B, which_B])
                advance(loss)
                losses.append(float(loss.detach()))
            log.append(
                {
                    "epoch": len(log) + 1,
                    "captions": kind,
                    "loss": round(sum(losses) / len(losses), 4),
                    "seconds": round(time.monotonic() - started),
                    "zero_shot": zero_shot(model, tokenizer, tests),
                }
            )
            print(json.dumps(log[-1]), flush=True)
    write_checkpoint(options.output, at_full_size(model), tokenizer)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    settings |= {"images_per_class": images, "pretraining_seed": PRETRAINING_SEED}
    settings |= {"class_in_caption": CLASS_IN_CAPTION, "loose_names": LOOSE, "loose_share": LOOSE_SHARE}
    write_figures(options.output, at_full_size(model), settings, log)


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


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Any, tests: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy per domain and their mean, in percent, with the prompt "a photo of a {}."."""
    model.eval()
    tokens = tokenize(tokenizer, [[f"a photo of a {name}." for name in CLASSES]])[0]
    texts_CE = model.encode_text(tokens, normalize=True)
    accuracy = {}
    for domain, (pixels, labels) in tests.items():
        features = torch.cat([model.encode_image(halved(part), normalize=True) for part in pixels.split(240)])
        right = (features @ texts_CE.T).argmax(dim=1) == labels
        accuracy[domain] = round(100 * float(right.double().mean()), 1)
    return {**accuracy, "mean": round(sum(accuracy.values()) / len(accuracy), 1)}


def _optimizers(model: Any, steps: int, options: argparse.Namespace) -> Callable[[Tensor], None]:
    """What takes a step down a loss: Muon for the matrices inside the blocks, where it needs far fewer pictures than
    AdamW, and AdamW for the rest."""
    matrices = {name for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2}
    rest = [(name, p) for name, p in model.named_parameters() if name not in matrices]
    groups = [
        {"params": [p for _, p in rest if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for _, p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    inside = [p for name, p in model.named_parameters() if name in matrices]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True),
        torch.optim.Muon(inside, lr=options.matrix_rate, momentum=0.95, weight_decay=0.05),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]

    def advance(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return advance


def _rate(step: int, steps: int) -> float:
    """Up, level, and down to nearly nothing over the last part."""
    warmup, fall = max(1, min(80, steps // 4)), 0.4 * steps
    return min(1.0, (step + 1) / warmup, max(0.02, (steps - step) / fall))


def _every_prompt() -> list[str]:
    return [template.replace("{}", name) for template in TEMPLATES for name in CLASSES]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "disam_peft/backbones/demo")
    parser.add_argument("--plain-epochs", type=int, default=4)
    parser.add_argument("--varied-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=0.01, help="of Muon")
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures; less for a trial")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the pictures")
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
