"""The place of each sample in the whole batch, as a step of training hands it to the objective."""

from types import SimpleNamespace

import pytest
import torch

from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.disam.disam import DISAM
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient
from tests.helpers.adapter_cells import pixels, tiny_backbone, tiny_classifier

DOMAINS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])
MODES = [
    MicroBatches(1, 8, "whole"),
    MicroBatches(2, 4, "mean"),
    MicroBatches(2, 4, "two_phase"),
    MicroBatches(2, 2, "per_domain"),
]


class Recorder(Objective):
    """Remembers where each sample of a step stood: place -> (label, domain), of all forward passes of a process."""

    def __init__(self):
        super().__init__()
        self.labels, self.counts = {}, set()

    def forward(self, logits_BC, labels_B, *arguments, place_B=None, num_places=None, **others):
        for place, label in zip(place_B.tolist(), labels_B.tolist(), strict=True):
            assert self.labels.setdefault(place, label) == label, "both passes see the same places"
        self.counts.add(num_places)
        return super().forward(logits_BC, labels_B, *arguments, **others)


def places(classifier, rows, rank, processes, micro_batches):
    """What the objective of one process is told, whose rows of the batch are these."""
    real, recorder = start_accelerator("no"), Recorder()
    accelerator = SimpleNamespace(
        device=real.device,
        autocast=real.autocast,
        gradient_accumulation_steps=1,
        process_index=rank,
        num_processes=processes,
    )
    disam = DISAM(list(classifier.trainable().values()), rho=0.05, num_domains=3)
    gradient = StepGradient(classifier, disam, micro_batches, accelerator, recorder, len(DOMAINS))
    gradient({"pixels": pixels(8)[rows], "labels": LABELS[rows], "domains": DOMAINS[rows]})
    return recorder


@pytest.fixture(scope="module")
def classifier(twins):
    return tiny_classifier(tiny_backbone(twins, "open_clip"), "lora-image").double().train()


@pytest.mark.parametrize("micro_batches", MODES, ids=lambda of: of.mode)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_places_are_those_of_the_whole_batch(classifier, processes, micro_batches):
    """Each sample has the same place for any number of processes and in every mode, and no two have the same."""
    found = {}
    for rank in range(processes):
        rows = torch.arange(len(DOMAINS))[rank::processes]  # as ``DomainBatches`` deals them out
        recorder = places(classifier, rows, rank, processes, micro_batches)
        assert recorder.counts == {len(DOMAINS)}
        assert not found.keys() & recorder.labels.keys()
        found |= recorder.labels
    assert found == dict(enumerate(LABELS.tolist()))


@pytest.mark.parametrize("processes", [2, 3])
def test_the_sampler_deals_out_a_batch_in_this_order(processes):
    ids = torch.arange(40).numpy() % 3

    def batch(rank, size):
        return next(iter(DomainBatches(ids, 8, 0, 1, sampling="balanced", rank=rank, world_size=size)))

    for rank in range(processes):
        assert batch(rank, processes) == batch(0, 1)[rank::processes]
