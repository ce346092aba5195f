"""The pictures that the demo CLIP learns from and is looked at with.

N pictures of C channels, H rows and W columns; B of them in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from demo_checkpoint import MEAN, STD
from torch import Tensor, nn

from disam_peft.common.progress import track
from disam_peft.config.shapes import CLASSES, DOMAINS
from disam_peft.data.sources.shapes.scene import Scene, draw_scene, paint

PRETRAINING_SEED = 20_001


def scenes(split: str, images: dict[str, int]) -> list[tuple[str, Scene]]:
    """Domain and content of every picture; ``images`` counts those of each domain and class."""
    plan = [(d, c, i) for d in DOMAINS for c in CLASSES for i in range(images[d])]
    return [(d, draw_scene(PRETRAINING_SEED, split, d, c, i)) for d, c, i in plan]


def painted(chosen: Sequence[tuple[str, Scene]]) -> Tensor:
    """(N, 3, 64, 64) uint8."""
    pictures = [paint(scene) for _, scene in track(chosen, "painting")]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def evaluation_pictures(images: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Domain -> pixels and labels, of a split that the training has not seen; ``images`` of each class."""
    labels_N = torch.arange(len(CLASSES)).repeat_interleave(images)
    return {d: (painted(scenes("evaluation", dict.fromkeys(DOMAINS, 0) | {d: images})), labels_N) for d in DOMAINS}


def moved(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to four pixels, its border repeated; every other one mirrored."""
    margin = 4
    count, _, height, width = pixels_BCHW.shape
    down_B, right_B = torch.randint(-margin, margin + 1, (2, count), generator=generator)
    mirrored_B = torch.randint(2, (count,), generator=generator) == 1
    rows_BH = (torch.arange(height) + down_B[:, None]).clamp(0, height - 1)
    columns_BW = (torch.arange(width) + right_B[:, None]).clamp(0, width - 1)
    columns_BW = torch.where(mirrored_B[:, None], columns_BW.flip(1), columns_BW)
    last = pixels_BCHW.permute(0, 2, 3, 1)
    return last[torch.arange(count)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def halved(pixels_BCHW: Tensor) -> Tensor:
    """Normalised means of two by two pixels, (B, 3, 32, 32) float32."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (nn.functional.avg_pool2d(pixels_BCHW.float(), 2) / 255 - mean) / std
