"""A classifier is loaded from wherever it lies, and classifies pictures as evaluation does."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.composed_adapters import CombinedConfig
from disam_peft.config.data import DataConfig
from disam_peft.config.feature_adapters import ClapConfig, LinearProbeConfig, TaskResConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoCoOpConfig, CoOpConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.evaluation.predict import predict
from disam_peft.export.merged import export_merged
from disam_peft.export.peft import export_peft
from disam_peft.inference.image_batches import batches
from disam_peft.inference.loaded_classifier import load_classifier
from disam_peft.inference.prediction import UNKNOWN
from tests.helpers.adapter_cells import PROMPTS, tiny_backbone, tiny_classifier

LORA = LoraAdapterConfig(towers=["image", "text"], rank=2, seed=1)


@pytest.fixture
def classifier(twins: tuple[str, str]) -> ClipClassifier:
    return tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), LORA, scramble=0.5)


@pytest.fixture
def exported(classifier: ClipClassifier, tmp_path: Path) -> Path:
    export_peft(tmp_path / "adapter", classifier)
    return tmp_path / "adapter"


def test_it_says_what_evaluation_says(exported: Path, classifier: ClipClassifier, domains_folder: Path) -> None:
    dataset = load(DataConfig(root=domains_folder, verify=False))
    few = dataset.select(range(0, len(dataset), 9))
    paths = [domains_folder / few.keys[i] for i in range(len(few))]
    loaded = load_classifier(exported)
    rows = loaded.predict(paths, top=3, batch_size=4)
    evaluated = predict(ClipClassifier(classifier.backbone, classifier.adapter, PROMPTS), _of_three(few)).logits_NC
    wanted = evaluated.softmax(-1)
    for row, path, probabilities in zip(rows, paths, wanted, strict=True):
        assert row.path == str(path) and row.error is None
        assert row.label == row.top[0][0] == PROMPTS.class_names[int(probabilities.argmax())]
        of_all = dict(zip(PROMPTS.class_names, probabilities.tolist(), strict=True))
        assert dict(row.top) == pytest.approx(of_all, abs=1e-6)
        assert row.probability == row.top[0][1]
    assert wanted.std(0).min() > 1e-3, "the images differ"


def _of_three(dataset):
    """The first three of its four classes are as many as the classifier has."""
    from dataclasses import replace

    return replace(dataset, labels=np.minimum(dataset.labels, 2))


def test_pictures_come_as_paths_bytes_arrays_and_images(exported: Path, domains_folder: Path, tmp_path: Path) -> None:
    path = next(domains_folder.rglob("*.png"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    picture = Image.open(path)
    ways = [path, path.read_bytes(), picture, np.asarray(picture), broken, tmp_path / "none.jpg", object()]
    loaded = load_classifier(exported)
    rows = loaded.predict(ways, batch_size=4)
    assert all(dict(row.top) == pytest.approx(dict(rows[0].top), abs=1e-6) for row in rows[:4])
    assert [row.path for row in rows[:4]] == [str(path), None, None, None]
    assert [row.label for row in rows[4:]] == [None] * 3
    errors = [row.error or "" for row in rows[4:]]
    assert "not an image" in errors[0] and "No such file" in errors[1] and "of the type object; expected" in errors[2]
    features = loaded.features([path, picture])
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-6)
    assert features.shape == (2, loaded.classifier.backbone.embed_dim)
    assert features.norm(dim=-1).tolist() == pytest.approx([1, 1])
    with pytest.raises(UserError, match=r"broken\.jpg: not an image"):
        loaded.features([broken])
    unsure = loaded.predict([path], threshold=0.9999)[0]
    assert unsure.label == UNKNOWN and unsure.probability == pytest.approx(rows[0].probability, abs=1e-6)


def test_other_classes_are_read_by_the_adapted_text_tower(exported: Path, classifier: ClipClassifier) -> None:
    other = load_classifier(exported, classes=["tree", "house"])
    assert other.class_names == ("tree", "house")
    same = load_classifier(exported, classes=[*reversed(PROMPTS.class_names)]).classifier.class_features()
    torch.testing.assert_close(same.flip(0), classifier.class_features(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LinearProbeConfig(),
        TaskResConfig(),
        ClapConfig(),
        CoOpConfig(class_specific=True, context_tokens=4),
        CombinedConfig(parts=[LoraAdapterConfig(), TaskResConfig()]),
    ],
    ids=lambda config: config.kind,
)
def test_weights_of_classes_are_of_these_classes_alone(twins: tuple[str, str], tmp_path: Path, config) -> None:
    export_peft(tmp_path / "out", tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), config))
    assert load_classifier(tmp_path / "out", classes=PROMPTS.class_names).class_names == PROMPTS.class_names
    with pytest.raises(UserError, match="has weights for each class that it was trained on"):
        load_classifier(tmp_path / "out", classes=["tree"])


def test_prompts_of_each_image_classify_too(twins: tuple[str, str], tmp_path: Path, domains_folder: Path) -> None:
    trained = tiny_classifier(
        tiny_backbone(twins, "open_clip", torch.float32), CoCoOpConfig(context_tokens=2, seed=1), scramble=0.5
    )
    export_peft(tmp_path / "out", trained)
    path = next(domains_folder.rglob("*.png"))
    wanted = trained(trained.backbone.image_transform(Image.open(path).convert("RGB"))[None]).detach().softmax(-1)
    row = load_classifier(tmp_path / "out").predict([path])[0]
    assert row.probability == pytest.approx(float(wanted.max()), abs=1e-6)


def test_a_learned_context_takes_other_classes(twins: tuple[str, str], tmp_path: Path) -> None:
    coop = CoOpConfig(context_tokens=4, seed=1)
    trained = tiny_classifier(tiny_backbone(twins, "open_clip", torch.float32), coop)
    export_peft(tmp_path / "out", trained)
    found = load_classifier(tmp_path / "out", classes=["tree", PROMPTS.class_names[0]]).classifier.class_features()
    torch.testing.assert_close(found[1], trained.class_features()[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_merged_checkpoints_say_their_classes(classifier: ClipClassifier, tmp_path: Path, domains_folder: Path) -> None:
    export_merged(tmp_path / "merged", classifier)
    path = next(domains_folder.rglob("*.png"))
    loaded = load_classifier(tmp_path / "merged")
    pixels = classifier.backbone.image_transform(Image.open(path).convert("RGB"))[None]
    wanted = classifier(pixels).softmax(-1).detach()
    row = loaded.predict([path], top=1)[0]
    assert row.label == PROMPTS.class_names[int(wanted.argmax())]
    assert row.probability == pytest.approx(float(wanted.max()), abs=1e-4)
    (tmp_path / "merged/disam_peft_export.json").unlink()
    with pytest.raises(UserError, match="does not say which classes"):
        load_classifier(tmp_path / "merged")
    with pytest.raises(UserError, match="nothing between it and zero-shot"):
        load_classifier(tmp_path / "merged", classes=["a", "b"], alpha=0.5)


@pytest.mark.slow
def test_between_zero_shot_and_trained(twins: tuple[str, str], tmp_path: Path, domains_folder: Path) -> None:
    backbone = tiny_backbone(twins, "open_clip", torch.float32)
    export_peft(tmp_path / "out", tiny_classifier(backbone, LORA, scramble=0.5))
    path = next(domains_folder.rglob("*.png"))
    zero = load_classifier(tmp_path / "out", alpha=0.0).predict([path])
    plain = ClipClassifier(tiny_backbone(twins, "open_clip", torch.float32), None, PROMPTS)
    pixels = plain.backbone.image_transform(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))[None]
    assert zero[0].probability == pytest.approx(float(plain(pixels).detach().softmax(-1).max()), abs=1e-6)
    assert load_classifier(tmp_path / "out").predict([path])[0].top != zero[0].top
    with pytest.raises(UserError, match="is no place on the line"):
        load_classifier(tmp_path / "out", alpha=7)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_batch_has_the_same_images_whatever_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    images = [np.full((4, 4, 3), number, np.uint8) for number in range(11)]
    found: list[list[list[int]]] = []
    for rank in range(world):
        monkeypatch.setattr("disam_peft.common.processes.rank", lambda rank=rank: rank)
        monkeypatch.setattr("disam_peft.common.processes.world_size", lambda: world)
        own = batches(images, lambda picture: torch.tensor(np.asarray(picture)[0, 0, 0]), 2, first=2)
        found.append([[] if batch is None else batch.pixels_RCHW.tolist() for batch in own])
    assert len({len(own) for own in found}) == 1
    together = [part for round_ in zip(*found, strict=True) for part in round_ if part]
    assert together == [[2, 3], [4, 5], [6, 7], [8, 9], [10]]
