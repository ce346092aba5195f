"""Augmentation is a function of (seed, epoch, index), and each of its settings does something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision import transforms as v1

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.data import AugmentConfig
from disam_peft.data.transforms.augment import TrainTransform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def transform(seed: int = 0, size: tuple[int, int] = (16, 16), **config) -> TrainTransform:
    return TrainTransform(Preprocessing(size, MEAN, STD, "bicubic"), AugmentConfig(**config), seed)


def still(**config) -> dict:
    """Everything off but what is given."""
    return {"scale": (1.0, 1.0), "flip": 0, "color_jitter": 0, "grayscale": 0, **config}


def test_one_key_one_tensor():
    apply = transform()
    first = apply(NOISE, 3, 1)
    assert type(first) is torch.Tensor and first.shape == (3, 16, 16) and first.dtype == torch.float32
    apply(NOISE, 7, 0)
    torch.rand(5)
    assert torch.equal(first, apply(NOISE, 3, 1))
    assert torch.equal(first, transform()(NOISE, 3, 1))
    for other in (apply(NOISE, 4, 1), apply(NOISE, 3, 2), transform(seed=1)(NOISE, 3, 1), apply(NOISE, 1, 3)):
        assert not torch.equal(first, other)


def test_global_random_state_is_left_alone():
    apply = transform()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    apply(NOISE, 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_global_random_state_survives_an_exception():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(Exception):  # noqa: B017 - whatever torchvision raises for it
        transform()("not an image", 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_scale_bounds_the_crop():
    """On a horizontal ramp the range of values seen is the width of the crop."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")

    def widths(low: float, high: float) -> list[float]:
        apply = transform(**still(scale=(low, high)))
        spans = [apply(ramp, i, 0)[0] for i in range(40)]
        return [float(x.max() - x.min()) * STD[0] * 255 / 200 for x in spans]

    assert max(widths(0.04, 0.09)) < 0.36  # sqrt(0.09 * 4/3) = 0.35
    assert min(widths(0.7, 1.0)) > 0.6  # sqrt(0.7 * 3/4) = 0.72, less the blur at the ends


def test_flip_probability():
    left = Image.new("RGB", (16, 16))
    left.paste("white", (0, 0, 8, 16))

    def flipped(p: float) -> int:
        apply = transform(**still(flip=p))
        return sum(float(apply(left, i, 0)[0, 8, 0]) < 0 for i in range(200))

    assert flipped(0) == 0 and flipped(1) == 200
    assert 70 < flipped(0.5) < 130


def test_color_jitter_and_grayscale():
    color = Image.new("RGB", (16, 16), (200, 60, 20))

    def colors(**config) -> torch.Tensor:
        apply = transform(**still(**config))
        return torch.stack([apply(color, i, 0)[:, 4, 4] for i in range(50)]) * torch.tensor(STD) + torch.tensor(MEAN)

    plain = torch.tensor([200, 60, 20]) / 255
    assert (colors() - plain).abs().max() < 1e-6
    small, large = ((colors(color_jitter=s) - plain).abs().mean() for s in (0.05, 0.5))
    assert 0 < 3 * small < large
    grey = colors(grayscale=0.5)
    is_grey = (grey.max(1).values - grey.min(1).values) < 1e-6
    assert 12 < int(is_grey.sum()) < 38 and bool((grey[~is_grey] - plain).abs().max() < 1e-6)


@pytest.mark.parametrize("image_size", [(50, 40), (40, 50), (37, 53), (16, 16), (9, 31)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_none_is_the_usual_clip_transform(image_size, interpolation):
    image = NOISE.resize(image_size)
    apply = TrainTransform(Preprocessing((16, 16), MEAN, STD, interpolation), AugmentConfig(kind="none"), seed=0)
    usual = v1.Compose(
        [
            v1.Resize(16, interpolation=v1.InterpolationMode(interpolation)),
            v1.CenterCrop(16),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    assert torch.equal(apply(image, 0, 0), usual(image))
    assert torch.equal(apply(image, 5, 7), apply(image, 0, 0))
    assert apply.deterministic and not transform().deterministic


@pytest.mark.parametrize("size", [(12, 20), (20, 12)])
def test_none_fills_sizes_that_are_not_square(size):
    white = Image.new("RGB", (33, 21), "white")
    pixels = transform(size=size, kind="none")(white, 0, 0)
    assert pixels.shape == (3, *size)
    assert torch.allclose(pixels.amin((1, 2)), (1 - torch.tensor(MEAN)) / torch.tensor(STD))  # no black border


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "none", "flip": 0.5}, "flip has no effect with kind 'none'"),
        ({"scale": (0.9, 0.5)}, "low <= high"),
        ({"scale": (0.0, 0.5)}, "0 < low"),
        ({"color_jitter": 0.6}, "0.5"),
        ({"flip": 1.5}, "less than or equal to 1"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        AugmentConfig(**fields)
