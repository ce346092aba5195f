"""Which CLIP to load."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from disam_peft.config.base import Config

DEMO = "demo"
"""The name of the small CLIP that comes with the package."""
RANDOM_WEIGHTS = "none"
"""The value of ``pretrained`` that asks for random weights; ``random`` is read as this word."""

Channels = tuple[float, float, float]

Precision = Literal["float32", "bfloat16", "int8", "nf4"]
"""Of the frozen weights."""


def _one_word(value: Any) -> Any:
    return RANDOM_WEIGHTS if value == "random" else value


class FilePreprocessing(Config):
    """How the images of a bare weights file were made; what is unset is taken from the known weights of its model."""

    mean: Channels | None = None
    """Of each channel, where levels are from 0 to 1."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = (
        None
    )
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize: Literal["shortest", "longest", "squash"] | None = None
    """``shortest``: the shorter side fits and the rest is cut off. ``longest``: the longer side fits and the rest is
    filled. ``squash``: both sides fit."""


class BackboneConfig(Config):
    """Which CLIP to load."""

    family: Literal["open_clip", "transformers"] = "open_clip"
    name: str
    """open_clip: a model name (``ViT-B-16``), ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
    transformers: a hub id (``openai/clip-vit-base-patch32``) or a local folder, of a CLIPModel, SiglipModel,
    MetaClip2Model, AltCLIPModel or ChineseCLIPModel.
    Both: ``demo``, the small CLIP that comes with the package."""
    pretrained: Annotated[str | None, BeforeValidator(_one_word)] = None
    """open_clip: a pretrained tag (``openai``) or a safetensors file. Both: ``random`` (or ``none``) for random weights
    of any model, for tests only. Unset: what the folder or hub repository holds."""
    revision: str | None = None
    """A branch, tag or commit of a hub repository (``hf-hub:...``, or a transformers hub id)."""
    seed: int = 0
    """Seed of the weights of ``pretrained: random``. It has no meaning otherwise."""
    precision: Precision = "float32"
    """Of the frozen weights; trained ones are float32. ``bfloat16``: all of them, in half the memory. ``int8`` and
    ``nf4``: the Linear layers in the blocks in 8 or 4 bits, by bitsandbytes (``pip install 'disam_peft[quantised]'``);
    the rest stays float32. An adapter belongs to the precision that it was trained on."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """Of a model whose weights are a safetensors file, which cannot say it. Unset: as the model's known weights."""
    preprocessing: FilePreprocessing | None = None
    """Of a model whose weights are a safetensors file. Unset: as the model's known weights."""
