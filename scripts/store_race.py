"""Two processes want one cold feature store at the same moment, again and again: every row of both must be right.

    python scripts/store_race.py 200

In version 0.1, 216 of the 280 rows of a finished store became zeros in such a race. The test that forces the order of
events is tests/unit/data/test_store_builders.py; this script leaves the order to chance: the second process begins at
any moment while the first one builds, or a little later. Needs POSIX.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from disam_peft.config.data import DataConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.stores.features import FeatureKey, open_or_build

KEY = FeatureKey("backbone", None, "float32/no", "transform", "data", views=1)
DOMAINS, CLASSES, IMAGES = 4, 7, 10  # 280 rows, five chunks
LATEST_SECONDS, LOOKS = 0.3, 10


def view(image: Image.Image, index: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)


def encode(pixels_BCHW: Tensor) -> Tensor:
    time.sleep(0.01)  # so that the other process may come in the middle of it
    return pixels_BCHW.flatten(1)[:, :16]


def wrong_rows(dataset: DomainDataset, folder: Path, expected: Tensor, start: float) -> int:
    """How many rows of the store are wrong in this process, which begins at ``start`` and looks several times."""
    time.sleep(max(0.0, start - time.time()))
    wrong = torch.zeros(len(dataset), dtype=torch.bool)
    for _ in range(LOOKS):
        store = open_or_build(KEY, dataset, view, encode, folder=folder, workers=0)
        wrong |= (store.rows(range(len(dataset))) != expected).any(1)
        time.sleep(0.02)
    return int(wrong.sum())


def main(rounds: int) -> int:
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="store_race."))
    os.environ["DISAM_PEFT_CACHE"] = str(work / "cache")
    random = np.random.default_rng(0)
    for domain in range(DOMAINS):
        for name in range(CLASSES):
            (work / f"data/d{domain}/c{name}").mkdir(parents=True)
            for i in range(IMAGES):
                pixels = random.integers(1, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(work / f"data/d{domain}/c{name}/{i}.png")
    dataset = load(DataConfig(root=work / "data"))
    expected = torch.stack([view(dataset.image(i), i, 0).flatten()[:16] for i in range(len(dataset))])
    faults = 0
    for number in range(rounds):
        folder, start, children = work / "stores", time.time() + 0.02, []
        for later in (0.0, float(random.uniform(0.0, LATEST_SECONDS))):
            child = os.fork()
            if child == 0:
                code = 99
                try:
                    code = min(98, wrong_rows(dataset, folder, expected, start + later))
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            faults += 1
            print(f"round {number}: {codes} (rows that are wrong in each process; 99: an error)")
        shutil.rmtree(folder)
    shutil.rmtree(work)
    print(f"{rounds} rounds of two processes on one cold store of {len(dataset)} rows: {faults} with a fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
