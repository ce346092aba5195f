"""What terms of the objective cost by themselves: a DISAM step without a tower, with each of them and without.

A share of a real step is too small to be seen beside its noise. These are CPU times of this process, so that others do
not count. Shapes in this file: B samples, C classes, E embedding width.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from disam_peft import DISAM, Forward, Objective, ObjectiveConfig, Reference

from .measure import Row
from .objective_terms import LOSSES, PENALTIES
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT

WIDTH = 512
TERMS: dict[str, dict[str, object]] = {
    **LOSSES,
    **PENALTIES,
    **{
        f"anchor {kind}": {"anchors": [{"kind": kind}]}
        for kind in ("logits", "image_features", "class_features", "weights")
    },
}


def rows(batch_size: int, classes: int, rounds: int) -> list[Row]:
    """Milliseconds of a step that each term adds, on features of CLIP's width."""
    steps = {name: _step(settings, batch_size, classes) for name, settings in {"plain": {}, **TERMS}.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the domain weights were negative.*")
        for number in range(rounds + 5):
            for name, step in steps.items():
                start = time.process_time()
                step()
                if number >= 5:
                    seconds[name].append(time.process_time() - start)
    plain = seconds["plain"]
    return [
        Row(
            f"{name}, batch {batch_size}, {classes} classes: added to a step of DISAM",
            [1e3 * (a - b) for a, b in zip(seconds[name], plain, strict=True)],
            unit="ms",
        )
        for name in TERMS
    ]


def _step(settings: dict[str, object], batch_size: int, classes: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x_BE = torch.randn(batch_size, WIDTH, generator=generator)
    text_CE = normalize(torch.randn(classes, WIDTH, generator=generator), dim=-1)
    labels_B = torch.randint(0, classes, (batch_size,), generator=generator)
    shift_E, turn_E = torch.zeros(WIDTH, requires_grad=True), torch.ones(WIDTH, requires_grad=True)
    scale, place_B = torch.tensor(100.0), torch.arange(batch_size)
    zero_shot = Reference(scale * normalize(x_BE, dim=-1) @ text_CE.T, normalize(x_BE, dim=-1), text_CE)
    objective = Objective(ObjectiveConfig.model_validate(settings))
    objective.remember_start([shift_E, turn_E])
    disam = DISAM([shift_E, turn_E], RHO, VARIANCE_WEIGHT, num_domains=DOMAINS)

    def forward() -> Forward:
        features_BE, class_features_CE = normalize(x_BE + shift_E, dim=-1), normalize(text_CE * turn_E, dim=-1)
        return objective.forward(
            scale * features_BE @ class_features_CE.T,
            labels_B,
            features_BE if objective.needs_features else None,
            class_features_CE=class_features_CE,
            scale=scale,
            place_B=place_B,
            num_places=batch_size,
            caption_features_NE=class_features_CE,
            reference=zero_shot,
        )

    def step() -> None:
        if objective.needs_captions:
            objective.begin_batch(labels_B, num_classes=classes)
        disam.backward(forward, place_B % DOMAINS, objective=objective)

    return step
