"""Confusion and example errors, counted by hand."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.evaluation.mistakes import confident_errors, confusion
from disam_peft.evaluation.predict import Predictions
from disam_peft.report.maps import confusion_maps

CLASSES = ("blue", "green", "grey tone", "red")


def predicted(labels, domains, logits):
    return Predictions(torch.tensor(logits).log(), torch.tensor(labels), torch.tensor(domains), ("art", "photo"))


def test_counts_of_one_domain_only():
    a, b = [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]
    found = confusion(predicted([0, 0, 0, 1, 3], [1, 1, 1, 1, 0], [a, b, b, b, a]), "photo", CLASSES)
    assert found.counts == [[0, 0, 1], [0, 1, 2], [1, 1, 1]]
    assert (found.domain, found.classes) == ("photo", list(CLASSES))


def test_samples_without_finite_logits_were_predicted_as_nothing(domains_folder):
    a, undefined = [0.7, 0.1, 0.1, 0.1], [float("nan"), 0.1, 0.1, 0.1]
    predictions = predicted([0, 0, 1, 1], [1, 1, 1, 0], [a, undefined, undefined, undefined])
    found = confusion(predictions, "photo", CLASSES)
    assert (found.counts, found.not_finite) == ([[0, 0, 1]], 2)
    dataset = load(DataConfig(root=domains_folder)).select([0, 1, 2, 3])
    assert confident_errors(predictions, dataset, CLASSES, 9) == []
    [axes] = confusion_maps([("ERM", found)], 7.0).axes
    assert axes.get_title() == "ERM: 33 % right, 2 not finite"


def test_the_surest_errors_come_first_and_ties_go_by_key(domains_folder):
    dataset = load(DataConfig(root=domains_folder)).with_domains(["photo"]).select([3, 2, 1, 0])
    sure, unsure, right = [0.0, 0.0, 0.9, 0.1], [0.1, 0.2, 0.5, 0.2], [0.9, 0.1, 0.0, 0.0]
    predictions = predicted([0, 0, 0, 0], [1] * 4, [unsure, sure, right, sure])
    assert set(dataset.labels) == {0}
    found = confident_errors(predictions, dataset, CLASSES, 2)
    assert [error.key for error in found] == sorted([dataset.keys[1], dataset.keys[3]])
    assert [(e.true, e.predicted, round(e.confidence, 6)) for e in found] == [("blue", "grey tone", 0.9)] * 2
    thumbnail = Image.open(io.BytesIO(base64.b64decode(found[0].png)))
    assert np.array_equal(np.asarray(thumbnail), np.asarray(dataset.image(3))), "small images stay as they are"
    assert len(confident_errors(predictions, dataset, CLASSES, 9)) == 3
    assert confident_errors(predictions, dataset, CLASSES, 0) == []


def test_an_image_that_is_gone_costs_its_thumbnail_only(domains_folder, tmp_path):
    folder = tmp_path / "data"
    for domain in ("art", "photo"):
        (folder / domain / "red").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (300, 200), (200, i, 0)).save(folder / domain / "red" / f"{i}.png")
    dataset = load(DataConfig(root=folder)).with_domains(["photo"])
    (folder / "photo/red/1.png").unlink()
    predictions = predicted([0, 0], [1, 1], [[0.2, 0.8, 0.0, 0.0]] * 2)
    first, second = confident_errors(predictions, dataset, CLASSES, 5)
    assert Image.open(io.BytesIO(base64.b64decode(first.png))).size == (96, 64)
    assert second.png == ""
