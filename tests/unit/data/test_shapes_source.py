"""DomainShapes as a data source: counts, faults on purpose, and the same data from memory and from disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from disam_peft.config.data import DataConfig
from disam_peft.config.shapes import CLASSES, DOMAINS, OverlapConfig, ShapesConfig
from disam_peft.data.load import load
from disam_peft.data.sources.shapes.raster import HUES
from disam_peft.data.sources.shapes.source import list_shapes, object_hue, paint_shape, write_shapes
from disam_peft.data.splits import leave_out
from disam_peft.errors import UserError


def test_loads_like_any_other_source():
    data = load(DataConfig(shapes={"images_per_class": 2, "seed": 5}, domains=["sketch", "photo"]))
    assert data.classes == CLASSES
    assert data.domains == ("photo", "sketch")
    assert len(data) == 2 * 2 * 12
    config = ShapesConfig(images_per_class=2, seed=5)
    for i in (0, 17, 47):
        domain, name, index = data.keys[i].split("/")
        assert (data.domains[data.domain_ids[i]], data.classes[data.labels[i]]) == (domain, name)
        np.testing.assert_array_equal(np.asarray(data.image(i)), paint_shape(config, domain, name, int(index)))
    assert len(set(data.hashes)) == len(data)
    sources, target = leave_out(data, "photo")
    assert (len(sources), len(target)) == (24, 24)


@pytest.mark.slow
def test_folders_hold_what_the_source_gives(tmp_path: Path):
    config = ShapesConfig(images_per_class=1, seed=1, target="photo", wrong_labels=0.5, wrong_domains=0.3)
    assert write_shapes(config, tmp_path / "tree") == config.total == 72
    memory, disk = (
        load(DataConfig(shapes=config, classes="union")),
        load(DataConfig(root=tmp_path / "tree", classes="union")),
    )
    assert _content(memory) == _content(disk)
    with pytest.raises(UserError, match="not an empty folder"):
        write_shapes(config, tmp_path / "tree")


def _content(data) -> Counter:
    return Counter(
        (data.domains[data.domain_ids[i]], data.classes[data.labels[i]], data.image(i).tobytes())
        for i in range(len(data))
    )


@pytest.mark.slow
def test_the_fingerprint_knows_the_faults():
    plain, again, noisy = (
        load(DataConfig(shapes={"images_per_class": 1, **more}, classes="union", verify=False)).fingerprint
        for more in ({}, {}, {"target": "photo", "wrong_labels": 0.3})
    )
    assert plain == again != noisy


def test_images_per_domain():
    samples = list_shapes(ShapesConfig(images_per_class=2, per_domain={"photo": 5, "sketch": 1}))
    counts = Counter(sample.domain for sample in samples)
    assert counts == {"photo": 60, "sketch": 12, **dict.fromkeys(set(DOMAINS) - {"photo", "sketch"}, 24)}
    # the first images of a domain are the same, however many there are
    small, large = ({s.key for s in list_shapes(ShapesConfig(images_per_class=n))} for n in (1, 3))
    assert small < large


def test_wrong_domains_spare_the_target_and_its_name():
    config = ShapesConfig(images_per_class=20, target="sketch", wrong_domains=0.25)
    samples = list_shapes(config)
    outside = [s for s in samples if s.domain != "sketch"]
    moved = [s for s in outside if s.domain_label != s.domain]
    assert len(moved) / len(outside) == pytest.approx(0.25, abs=0.04)
    assert {s.domain_label for s in moved} == set(DOMAINS) - {"sketch"}
    assert all(s.domain_label == "sketch" and s.label == s.class_name for s in samples if s.domain == "sketch")
    assert all(s.label == s.class_name for s in samples)
    everyone = list_shapes(ShapesConfig(images_per_class=3, target="sketch", wrong_domains=1.0))
    assert all(s.domain_label != s.domain for s in everyone if s.domain != "sketch")


def test_wrong_labels_spare_the_target_and_grow_with_the_share():
    few, many = (
        {s.key: s.label for s in list_shapes(ShapesConfig(images_per_class=20, target="photo", wrong_labels=share))}
        for share in (0.1, 0.4)
    )
    wrong_few, wrong_many = ({k for k, label in run.items() if label != k.split("/")[1]} for run in (few, many))
    assert wrong_few < wrong_many
    assert len(wrong_many) / (5 * 12 * 20) == pytest.approx(0.4, abs=0.05)
    assert not any(key.startswith("photo/") for key in wrong_many)


def test_spurious_colour_tells_the_class_in_the_sources_only():
    config = ShapesConfig(target="painting", spurious_color=0.9)
    width = HUES // len(CLASSES)
    for domain, low, high in (("photo", 0.86, 0.96), ("painting", 0.03, 0.15)):
        told = [
            object_hue(config, domain, name, i) // width == CLASSES.index(name) for name in CLASSES for i in range(50)
        ]
        assert low < np.mean(told) < high
    assert object_hue(ShapesConfig(), "photo", "star", 0) is None
    grey, coloured = (
        np.mean([np.ptp(paint_shape(c, "sketch", name, 0), axis=2).max() for name in CLASSES])
        for c in (ShapesConfig(), config)
    )
    assert coloured > grey + 40


@pytest.mark.slow
def test_full_overlap_makes_one_style_of_two():
    def brightness(domain: str, share: float) -> float:
        overlap = OverlapConfig(first="sketch", second="silhouette", share=share) if share else None
        config = ShapesConfig(overlap=overlap)
        return float(np.mean([paint_shape(config, domain, name, i).mean() for name in CLASSES for i in range(3)]))

    apart = brightness("sketch", 0) - brightness("silhouette", 0)
    half = brightness("sketch", 0.5) - brightness("silhouette", 0.5)
    assert apart > 40
    assert 0.2 * apart < half < 0.8 * apart
    assert abs(brightness("sketch", 1.0) - brightness("silhouette", 1.0)) < 0.15 * apart
    untouched = ShapesConfig(overlap=OverlapConfig(first="sketch", second="silhouette", share=1.0))
    np.testing.assert_array_equal(
        paint_shape(untouched, "photo", "star", 0), paint_shape(ShapesConfig(), "photo", "star", 0)
    )


def test_negatives_are_domains_of_their_own_and_spare_the_target():
    config = ShapesConfig(images_per_class=3, target="sketch", negatives=True)
    samples = list_shapes(config)
    assert {sample.key for sample in samples} == {
        sample.key for sample in list_shapes(ShapesConfig(images_per_class=3))
    }
    assert Counter(sample.domain_label for sample in samples) == {
        domain: 36 if domain == "sketch" else 12 if domain.endswith("-negative") else 24 for domain in config.domains
    }
    assert len(config.domains) == 11
    plain = paint_shape(ShapesConfig(), "photo", "star", 1)
    np.testing.assert_array_equal(paint_shape(config, "photo", "star", 1), 255 - plain)
    for domain, index in (("photo", 0), ("sketch", 1)):
        np.testing.assert_array_equal(
            paint_shape(config, domain, "star", index), paint_shape(ShapesConfig(), domain, "star", index)
        )
    data = load(DataConfig(shapes=config, domains=["photo-negative", "sketch"], verify=False))
    assert data.domains == ("photo-negative", "sketch")


def test_noise_makes_one_domain_hard_and_is_as_strong_as_it_says():
    config = ShapesConfig(noise={"photo": 0.5})
    plain, noisy = (paint_shape(of, "photo", "star", 1).astype(int) for of in (ShapesConfig(), config))
    within = (plain > 130) & (plain < 200)  # not cut off at the ends of the range
    change = (noisy - plain)[within & (noisy > 0) & (noisy < 255)]
    assert np.abs(noisy - plain).max() <= 128
    assert change.min() < -100
    assert abs(change.mean()) < 40
    np.testing.assert_array_equal(paint_shape(config, "photo", "star", 1), noisy)
    np.testing.assert_array_equal(
        paint_shape(config, "cartoon", "star", 1), paint_shape(ShapesConfig(), "cartoon", "star", 1)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": {"photos": 0.3}}, "no domain 'photos'.*did you mean 'photo'"),
        ({"noise": {"photo": 2}}, "less than or equal to 1"),
        ({"negatives": True}, "negatives needs target"),
        ({"per_domain": {"photos": 3}}, "no domain 'photos'.*did you mean 'photo'"),
        ({"target": "sketches"}, "did you mean 'sketch'"),
        ({"wrong_domains": 0.1}, "wrong_domains needs target"),
        ({"spurious_color": 0.1, "wrong_labels": 0.2}, "wrong_labels, spurious_color needs target"),
        ({"overlap": {"first": "photo", "second": "photo", "share": 0.5}}, "with itself"),
        ({"images_per_class": 0}, "greater than or equal to 1"),
        ({"image_per_class": 3}, "Extra inputs"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        ShapesConfig(**settings)


def test_row_06_an_unknown_domain_of_shapes_names_the_close_ones():
    with pytest.raises(UserError, match=r"no domain 'foto'.*did you mean 'photo'"):
        load(DataConfig(shapes={}, domains=["foto"]))


def test_shapes_stand_alone_in_the_data_config():
    with pytest.raises(
        ValidationError, match="exactly one of root, table, json_lines, hub and shapes is needed, got root and shapes"
    ):
        DataConfig(root="x", shapes={})
    with pytest.raises(ValidationError, match=r"image_column has no meaning with data\.shapes"):
        DataConfig(shapes={}, image_column="x")
