"""One image transform: training without augmentation sees what evaluation sees, for every rule of both families."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import CLIPImageProcessor

from disam_peft.backbones.open_clip.weights import preprocessing as of_open_clip
from disam_peft.backbones.transformers.processor import preprocessing as of_processor
from disam_peft.config.data import AugmentConfig
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.batch_augment import BatchAugment
from disam_peft.errors import UserError

OPEN_CLIP = [
    {"size": 24, "resize_mode": mode, "interpolation": interpolation, "fill_color": fill, "mean": mean, "std": std}
    for mode in ("shortest", "longest", "squash")
    for interpolation in ("bicubic", "bilinear")
    for fill, mean, std in ((0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), (127, (0, 0, 0), (1, 1, 1)))
] + [{"size": (24, 32), "resize_mode": mode} for mode in ("shortest", "longest", "squash")]

CUT = {"crop_size": {"height": 24, "width": 24}}
TRANSFORMERS = {
    "as CLIP": {"size": {"shortest_edge": 24}, **CUT},
    "crop of more": {"size": {"shortest_edge": 31}, **CUT},
    "crop of less": {"size": {"shortest_edge": 20}, **CUT},
    "crop of another aspect": {"size": {"shortest_edge": 30}, "crop_size": {"height": 20, "width": 28}},
    "squash": {"size": {"height": 24, "width": 24}, "do_center_crop": False},
    "squash, then crop": {"size": {"height": 30, "width": 26}, **CUT},
    "longest": {"size": {"max_height": 24, "max_width": 24}, **CUT},
    "no resize": {"do_resize": False, **CUT},
    "not normalised": {"size": {"shortest_edge": 24}, **CUT, "do_normalize": False},
    "not rescaled": {"size": {"shortest_edge": 24}, **CUT, "do_rescale": False},
    "neither": {"size": {"shortest_edge": 24}, **CUT, "do_rescale": False, "do_normalize": False},
    "another factor": {"size": {"shortest_edge": 24}, **CUT, "rescale_factor": 1 / 127.5},
    "factor without mean": {"size": {"shortest_edge": 24}, **CUT, "rescale_factor": 1 / 100, "do_normalize": False},
    **{f"filter {number}": {"size": {"shortest_edge": 24}, **CUT, "resample": number} for number in range(4)},
}


def pictures(count: int = 12) -> list[Image.Image]:
    """Noise of random sizes, and the sizes where libraries round differently."""
    draw = np.random.default_rng(7)
    sizes = [(50, 41), (41, 50), (24, 24), (25, 24), (9, 31), *draw.integers(5, 90, (count, 2)).tolist()]
    return [Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def without_augmentation(found) -> TrainTransform:
    return pickle.loads(pickle.dumps(TrainTransform(found, AugmentConfig(kind="none"), seed=3)))  # as a worker gets it


@pytest.mark.parametrize("settings", OPEN_CLIP, ids=str)
def test_row_55_open_clip(settings) -> None:
    config = PreprocessCfg(**settings)
    library, apply = image_transform_v2(config, is_train=False), without_augmentation(of_open_clip(config))
    for image in pictures():
        assert torch.equal(apply(image, 4, 2), library(image)), image.size


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=list(TRANSFORMERS))
def test_row_55_transformers(settings) -> None:
    processor = CLIPImageProcessor(**settings)
    found = of_processor(processor)
    apply = without_augmentation(found)
    for image in pictures():
        pixels = apply(image, 4, 2)
        assert torch.equal(pixels, processor(images=image, return_tensors="pt")["pixel_values"][0].float()), image.size
        assert pixels.dtype == torch.float32 and pixels.shape == (3, *found.size)


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=list(TRANSFORMERS))
def test_augmented_pixels_are_scaled_and_normalised_as_evaluation_does_it(settings) -> None:
    """A plain picture has one colour under every crop and filter, so all ways must give the same numbers."""
    plain = Image.new("RGB", (24, 24), (30, 140, 250))
    found = of_processor(CLIPImageProcessor(**settings))
    assert found.own is not None
    height, width = found.size
    expected = found.own(plain)[:, height // 2, width // 2]
    still = AugmentConfig(color_jitter=0, grayscale=0)
    middle = TrainTransform(found, still, 0)(plain, 0, 0)[:, height // 2, width // 2]
    torch.testing.assert_close(middle, expected, atol=1e-5, rtol=1e-5)
    if found.resize in ("shortest", "squash") and found.interpolation in ("bicubic", "bilinear"):
        stored = torch.from_numpy(np.asarray(plain).copy()).permute(2, 0, 1)[None]
        for config in (still, AugmentConfig(kind="none")):
            batch = BatchAugment(found, config, 0)(stored, [0], [0])
            torch.testing.assert_close(batch[0, :, height // 2, width // 2], expected, atol=1e-5, rtol=1e-5)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom; blue is full."""
    red, green = np.linspace(0, 255, width), np.linspace(0, 255, height)
    levels = np.stack(np.broadcast_arrays(red[None], green[:, None], np.full((1, 1), 255)), axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def of_mode(mode: str):
    return of_open_clip(PreprocessCfg(size=24, resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1)))


WHOLE = AugmentConfig(scale=(1, 1), flip=0, color_jitter=0, grayscale=0)


@pytest.mark.parametrize("size", [(96, 24), (20, 90), (41, 40)])
@pytest.mark.parametrize("mode", ["squash", "longest"])
def test_augmentation_of_the_whole_begins_from_evaluations_resize(mode: str, size: tuple[int, int]) -> None:
    """The largest crop of a picture that is squashed shows all of it, and of one that is padded its padding too."""
    found = of_mode(mode)
    assert found.own is not None
    image = ramp(*size)
    seen, wanted = TrainTransform(found, WHOLE, 0)(image, 0, 0), found.own(image)
    # The border of padding may lie one of 24 columns further.
    assert float((seen - wanted).abs().mean()) < (0.02 if mode == "squash" else 0.05)
    wrong = TrainTransform(of_mode("shortest"), WHOLE, 0)(image, 0, 0)
    if max(size) > 2 * min(size):
        assert float((wrong - wanted).abs().mean()) > (0.05 if mode == "squash" else 0.3)


def test_augmentation_of_models_that_keep_the_aspect_is_what_it_was() -> None:
    """For CLIP's own rule, and for one that crops a part of what it resized, boxes are drawn in the picture itself."""
    plain = of_mode("shortest")
    part = of_processor(
        CLIPImageProcessor(size={"shortest_edge": 31}, **CUT, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    )
    for place, image in enumerate(pictures()):
        first = TrainTransform(replace(plain, own=None), AugmentConfig(), 5)(image, place, 1)
        assert torch.equal(first, TrainTransform(plain, AugmentConfig(), 5)(image, place, 1))
        assert torch.equal(first, TrainTransform(part, AugmentConfig(), 5)(image, place, 1))


def test_squashed_and_padded_square_pictures_are_augmented_as_others() -> None:
    image = pictures()[2]
    assert image.width == image.height
    shortest, squash = (TrainTransform(of_mode(mode), AugmentConfig(), 5) for mode in ("shortest", "squash"))
    assert torch.equal(shortest(image, 1, 1), squash(image, 1, 1))


def test_a_padded_strip_is_augmented_in_no_time() -> None:
    for size in ((60000, 1), (1, 60000)):
        for epoch in range(4):
            pixels = TrainTransform(of_mode("longest"), AugmentConfig(), 5)(Image.new("RGB", size, "white"), 0, epoch)
            assert pixels.shape == (3, 24, 24)


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (60, 60)])
@pytest.mark.parametrize("name", ["as CLIP", "crop of more", "squash", "squash, then crop"])
def test_row_55_stored_pixels_show_the_part_of_the_picture_that_evaluation_shows(name: str, size) -> None:
    """Within the sharpness that squeezing costs."""
    found = of_processor(CLIPImageProcessor(**TRANSFORMERS[name], image_mean=[0, 0, 0], image_std=[1, 1, 1]))
    assert found.own is not None
    image = ramp(*size)
    squeezed = torch.from_numpy(np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    batch = BatchAugment(found, AugmentConfig(kind="none"), 0)(squeezed[None], [0], [0], np.array([size[::-1]]))
    assert float((batch[0] - found.own(image)).abs().max()) < 0.06


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"max_height": 24, "max_width": 24}, **CUT},
        {"do_resize": False, **CUT},
        {"size": {"shortest_edge": 24}, **CUT, "resample": 1},
    ],
    ids=["padded", "not resized", "lanczos"],
)
def test_what_a_pixel_store_cannot_begin_from_is_refused(settings) -> None:
    with pytest.raises(UserError, match=r"data\.pixel_store keeps resized images"):
        BatchAugment(of_processor(CLIPImageProcessor(**settings)), AugmentConfig(), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 24}, "do_center_crop": False}, "images of different sizes"),
        ({"do_resize": False, "do_center_crop": False}, "images of different sizes"),
        ({"size": {"shortest_edge": 24}, **CUT, "resample": 4}, "fails on a blank picture"),
        ({"size": {"shortest_edge": 24}, **CUT, "image_mean": [0.5, 0.5]}, "not one number for each"),
        ({"size": {"shortest_edge": 24}, **CUT, "image_std": [0.0, 1.0, 1.0]}, "blank picture"),
        ({"size": {"longest_edge": 24}, **CUT}, "which is not understood"),
        ({"size": {"shortest_edge": 24}, **CUT, "do_pad": True, "pad_size": {"height": 40, "width": 40}}, "40, 40"),
    ],
)
def test_processors_that_are_not_understood_are_refused_at_load(settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_processor(CLIPImageProcessor(**settings))
