"""The augmentation of whole batches: the same choices and the same pictures as image by image, and as torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.common.random import keyed_uniforms
from disam_peft.config.data import AugmentConfig
from disam_peft.data.transforms import color as colors
from disam_peft.data.transforms import resize as resample
from disam_peft.data.transforms.augment_params import draw_params, middle_boxes
from disam_peft.data.transforms.batch_augment import BatchAugment

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 40, 50), dtype=np.uint8))
INDICES, EPOCHS = [5, 3, 11, 0, 7, 3], [0, 1, 0, 2, 0, 0]


def augment(size: tuple[int, int] = (16, 16), seed: int = 0, **config) -> BatchAugment:
    return BatchAugment(Preprocessing(size, MEAN, STD, "bicubic"), AugmentConfig(**config), seed)


def whole(apply: BatchAugment) -> torch.Tensor:
    """As on a device other than a CPU: all images in one go."""
    draws = draw_params(apply.config, apply.seed, INDICES, EPOCHS)
    return apply._augment_part(IMAGES, draws.boxes((40, 50), np.tile((40, 50), (6, 1))), draws, slice(None))


def test_uniform_numbers_hang_on_their_key_alone():
    numbers = keyed_uniforms(2000, 3, "x", 1)
    assert np.array_equal(numbers[:7], keyed_uniforms(7, 3, "x", 1))
    assert not np.isin(numbers, keyed_uniforms(2000, 3, "x", 2)).any()
    assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == 2000
    assert abs(numbers.mean() - 0.5) < 0.03 and abs(numbers.std() - 12**-0.5) < 0.02
    assert keyed_uniforms(2, 0, 0, 0) == pytest.approx([0.93861807, 0.50173009], abs=1e-8)  # on any machine, for ever


def test_an_image_does_not_see_its_batch():
    apply = augment(grayscale=0.5)
    together = apply(IMAGES, INDICES, EPOCHS)
    order = [4, 0, 5, 2]
    part = apply(IMAGES[order], [INDICES[i] for i in order], [EPOCHS[i] for i in order])
    assert together.shape == (6, 3, 16, 16) and together.dtype == torch.float32
    assert torch.equal(together[order], part)
    assert torch.equal(together[2:3], augment(grayscale=0.5)(IMAGES[2:3], [11], [0]))
    for other in (
        apply(IMAGES[2:3], [12], [0]),
        apply(IMAGES[2:3], [11], [1]),
        augment(seed=1)(IMAGES[2:3], [11], [0]),
    ):
        assert (other - together[2]).abs().max() > 0.5


def test_all_at_once_is_one_by_one():
    apply = augment(grayscale=0.5)
    assert (whole(apply) - apply(IMAGES, INDICES, EPOCHS)).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colors_are_torchvisions(name):
    pixels = IMAGES / 255
    pixels[0, :, :9] = 0.25  # grey, where the hue is not defined
    pixels[1, 0, :9], pixels[1, 1, :9] = 0.75, 0.75  # two channels on top
    strengths = torch.tensor([0.5, 1.0, 1.5, 0.7, 1.2, 0.9]) - float(name == "hue")
    expected = [getattr(functional, f"adjust_{name}")(x, float(s)) for x, s in zip(pixels, strengths, strict=True)]
    assert (getattr(colors, name)(pixels, strengths) - torch.stack(expected)).abs().max() < 1e-3  # its luma: 3 digits


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(16, 16), (12, 45), (60, 30)])
def test_resizing_is_pillows(interpolation, size):
    boxes = np.array([[0, 0, 40, 50], [3, 4, 30, 20], [10, 0, 7, 33], [39, 49, 1, 1], [5, 5, 16, 16], [0, 25, 40, 25]])
    flips = np.array([False, True, False, True, True, False])
    calm = IMAGES // 3 + 85  # where the filters overshoot and are clamped, Pillow's order of the axes would matter
    expected = []
    for image, box, flip in zip(calm, boxes.tolist(), flips, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        mode = InterpolationMode(interpolation)
        resized = functional.pil_to_tensor(functional.resized_crop(picture, *box, size, interpolation=mode))
        expected.append(resized.flip(-1) if flip else resized)
    kernel = resample.crop_resize(calm, boxes, flips, size, interpolation)
    assert (kernel - torch.stack(expected)).abs().max() <= 1
    for images in (calm, IMAGES):
        kernel = resample.crop_resize(images, boxes, flips, size, interpolation)
        product = resample._by_product(images, boxes, flips, size, interpolation)
        # the kernel rounds to whole levels twice
        assert (product - kernel).abs().max() <= 2 and (product - kernel).abs().mean() < 0.4


def test_boxes_are_random_resized_crops():
    n = 4000
    boxes = draw_params(AugmentConfig(scale=(0.1, 0.5)), 0, range(n), [0] * n).boxes(
        (300, 400), np.tile((300, 400), (n, 1))
    )
    top, left, height, width = boxes.T
    area, aspect = height * width / 120_000, width / height
    assert area.min() > 0.098 and area.max() < 0.51 and abs(area.mean() - 0.29) < 0.02
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and abs(np.log(aspect).mean()) < 0.03
    assert top.min() == left.min() == 0 and (top + height).max() == 300 and (left + width).max() == 400
    assert abs((top / np.maximum(1, 300 - height)).mean() - 0.5) < 0.03


def test_squeezed_images_get_the_same_boxes():
    """A box is a part of the picture, wherever the picture has been squeezed to."""
    sizes = np.tile((300, 400), (50, 1))
    draws = draw_params(AugmentConfig(), 0, range(50), [0] * 50)
    plain, squeezed = draws.boxes((300, 400), sizes), draws.boxes((100, 100), sizes)
    assert np.abs(plain / [300, 400, 300, 400] - squeezed / 100).max() <= 0.011
    assert np.abs(plain / [300, 400, 300, 400] - draws.boxes((100, 100), sizes[:, ::-1]) / 100).max() > 0.1


def test_where_no_box_fits_the_middle_is_taken():
    draws = draw_params(AugmentConfig(scale=(1.0, 1.0)), 0, [0, 1], [0, 0])
    assert draws.boxes((90, 300), np.array([(90, 300)] * 2)).tolist() == [[0, 90, 90, 120]] * 2
    assert draws.boxes((300, 90), np.array([(300, 90)] * 2)).tolist() == [[90, 0, 120, 90]] * 2


def test_none_takes_the_middle():
    assert middle_boxes((100, 100), np.array([(300, 400), (400, 300), (80, 80)]), (32, 32)).tolist() == [
        [0, 12, 100, 75],
        [12, 0, 75, 100],
        [0, 0, 100, 100],
    ]
    assert middle_boxes((100, 100), np.array([(300, 400)]), (64, 32)).tolist() == [[0, 31, 100, 38]]
    apply = augment((40, 40), kind="none")
    expected = (IMAGES[..., 5:45] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(apply(IMAGES, INDICES, EPOCHS), expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_nearly_the_same():
    apply = augment(grayscale=0.5, color_jitter=0)
    on_gpu = apply(IMAGES.cuda(), INDICES, EPOCHS)
    assert on_gpu.device.type == "cuda"
    assert (on_gpu.cpu() - apply(IMAGES, INDICES, EPOCHS)).abs().max() < 3 / 255 / min(STD)
    assert (apply(IMAGES[1:2].cuda(), [3], [1]) - on_gpu[1:2]).abs().max() <= 1e-5


def test_flips_and_greys_are_as_frequent_as_asked_for():
    indices, epochs = list(range(2000)), [0] * 2000
    for share in (0.0, 0.2, 1.0):
        drawn = draw_params(AugmentConfig(flip=share, grayscale=share), 3, indices, epochs)
        assert drawn.flip_B.mean() == pytest.approx(share, abs=0.04 if share == 0.2 else 0)
        assert drawn.grey_B.mean() == pytest.approx(share, abs=0.04 if share == 0.2 else 0)
