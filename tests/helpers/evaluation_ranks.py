"""Run as a program: evaluation on 1, 2 and 3 gloo processes, forked from one that has imported torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  # once for all forks, as torch
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from disam_peft.config.data import DataConfig
from disam_peft.config.evaluation import EvaluationConfig
from disam_peft.data.load import load
from disam_peft.evaluation.metrics import metrics_by_domain
from disam_peft.evaluation.predict import predict
from tests.helpers.ranks import fork_ranks, gloo_group

WORLDS = (1, 2, 3)
SIZES = (1, 2, 7, 25)
BATCHES = (1, 4)


class Counting(nn.Module):
    """Stands in for a classifier: logits are the mean colours of a picture, and every picture is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.class_names, self.seen = ("red", "green", "blue", "grey"), 0

    @property
    def model(self) -> nn.Module:
        return self

    @property
    def backbone(self) -> Any:
        return self

    @staticmethod
    def image_transform(image: Any) -> Tensor:
        return functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)

    def shared_class_features(self) -> Tensor:
        return torch.ones(4)

    def encode_frozen(self, pixels_BCHW: Tensor) -> Tensor:
        self.seen += len(pixels_BCHW)
        return pixels_BCHW

    def logits(self, frozen: Tensor, *, class_features_CE: Tensor) -> Tensor:
        colour_BC = frozen.mean(dim=(2, 3)) * class_features_CE[:3]
        return torch.cat([colour_BC, colour_BC.amin(dim=1, keepdim=True)], dim=1) * self.weight


def cases(root: str) -> dict[str, Any]:
    whole = load(DataConfig(root=Path(root), verify=False))
    found = {}
    for size in SIZES:
        # from the end: the last domain comes first, so that the shares of the ranks differ in their domains
        dataset = whole.select(range(len(whole) - 1, len(whole) - 1 - 3 * size, -3))
        for batch in BATCHES:
            model = Counting()
            predictions = predict(model, dataset, EvaluationConfig(batch_size=batch, workers=0))
            found[f"{size} by {batch}"] = {
                "logits": predictions.logits_NC,
                "labels": predictions.labels_N,
                "top1": torch.tensor(metrics_by_domain(predictions)["mean"]["top1"]),
                "seen": torch.tensor(model.seen),
            }
    return found


def fork(world_size: int, root: str, folder: Path) -> None:
    def work(rank: int) -> None:
        with gloo_group(folder, rank, world_size):
            torch.save(cases(root), folder / f"{world_size}-{rank}.pt")

    fork_ranks(world_size, work)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        fork(world, sys.argv[1], Path(sys.argv[2]))
