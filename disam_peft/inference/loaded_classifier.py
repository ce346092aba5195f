"""A trained classifier, read from wherever it lies, that takes pictures as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from disam_peft.adapters.adapter_folder import read_adapter
from disam_peft.adapters.interpolation import require_alpha
from disam_peft.adapters.manifest import MANIFEST_NAME
from disam_peft.adapters.prompts import ClassPrompts, prompt_templates
from disam_peft.backbones.families import folder_config, load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.common.device import to_device
from disam_peft.common.strict_json import read_json
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.prompts import PromptConfig
from disam_peft.errors import UserError
from disam_peft.experiments.run_folder import ADAPTER, find_run
from disam_peft.export.merged import EXPORT_NOTE, MAX_NOTE_BYTES
from disam_peft.inference.image_batches import ImageBatch, ImageLike, batches
from disam_peft.inference.prediction import Prediction, predictions

_FOLDERS: dict[str, Literal["open_clip", "transformers"]] = {
    "open_clip_config.json": "open_clip",
    "config.json": "transformers",
}
"""What says of a folder that it is a checkpoint -> of which library."""
_NO_CLASSES = "name them: --classes cat,dog on the command line, classes=[...] in Python"


class LoadedClassifier:
    """Pictures to classes.

    Attributes:
        classifier: the model behind it, in eval mode.
        name: what was loaded.
    """

    def __init__(self, classifier: ClipClassifier, name: str, *, alpha: float | None = None) -> None:
        self.classifier, self.name = classifier.eval(), name
        self._moved: AbstractContextManager[Callable[[float], None]] = nullcontext(lambda alpha: None)
        if alpha is not None:
            require_alpha(alpha)
            self._moved = classifier.interpolation()
            self._moved.__enter__()(alpha)
        self._class_features: Tensor | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """As they stand in the prompts."""
        return self.classifier.class_names

    def predict(
        self,
        images: Sequence[ImageLike],
        *,
        top: int = 5,
        threshold: float = 0.0,
        batch_size: int = 32,
        workers: int | Literal["auto"] = 0,
    ) -> list[Prediction]:
        """The classes of images, one prediction for each, in their order. One that cannot be read says so in ``error``.

        Args:
            images: paths, the bytes of image files, PIL images, or arrays (H, W, 3) of uint8.
            top: how many classes of each are told.
            threshold: below this probability of the most likely class, ``label`` is ``unknown``.

        Raises:
            UserError: ``top`` or ``batch_size`` below 1.
        """
        given = batches(images, self.classifier.backbone.image_transform, batch_size, workers=workers)
        return [one for batch in self.classified(given, top=top, threshold=threshold) for one in batch]

    @torch.inference_mode()
    def classified(
        self,
        given: Iterator[ImageBatch | None],
        *,
        top: int,
        threshold: float = 0.0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Iterator[list[Prediction]]:
        """The predictions of each batch; none for a batch that is None."""
        if top < 1:
            raise UserError(f"top={top} must be at least 1")
        for batch in given:
            if batch is None:
                yield []
                continue
            readable = [path for path, error in zip(batch.paths, batch.errors, strict=True) if error is None]
            found: Iterator[Prediction] = iter(())
            if readable:
                with autocast():
                    logits_BC = self.logits(batch.pixels_RCHW)
                found = iter(predictions(logits_BC, self.class_names, readable, top=top, threshold=threshold))
            yield [
                next(found) if error is None else Prediction(None, None, path=path, error=error)
                for path, error in zip(batch.paths, batch.errors, strict=True)
            ]

    @torch.inference_mode()
    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of pixels (B, 3, H, W) as ``classifier.backbone.image_transform`` makes them."""
        like = next(self.classifier.model.parameters())
        if self._class_features is None:
            self._class_features = self.classifier.shared_class_features()
        frozen = self.classifier.encode_frozen(to_device(pixels_BCHW, like.device).to(like.dtype))
        return self.classifier.logits(frozen, class_features_CE=self._class_features)

    @torch.inference_mode()
    def features(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> Tensor:
        """Normalised image features (N, E), float32 on the CPU, as the adapter changes them.

        Raises:
            BadImage: an image that cannot be read.
        """
        like, found = next(self.classifier.model.parameters()), list[Tensor]()
        for batch in batches(images, self.classifier.backbone.image_transform, batch_size):
            assert batch is not None
            for number, error in enumerate(batch.errors):
                if error is not None:
                    raise UserError(f"image {batch.paths[number] or len(found) * batch_size + number}: {error}")
            pixels_BCHW = to_device(batch.pixels_RCHW, like.device).to(like.dtype)
            features_BE = self.classifier.features(self.classifier.encode_frozen(pixels_BCHW))
            found.append(torch.nn.functional.normalize(features_BE.float(), dim=-1).cpu())
        return torch.cat(found) if found else torch.empty(0, self.classifier.backbone.embed_dim)


def load_classifier(
    place: str | Path,
    *,
    held_out: str | None = None,
    device: torch.device | str | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    alpha: float | None = None,
) -> LoadedClassifier:
    """A classifier from what training or an export has left, or zero-shot CLIP.

    Args:
        place: the folder of a run, or one with several; an adapter folder (``--to peft``); a merged checkpoint; or the
            name of a CLIP, ``ViT-B-32:openai`` or ``hf-hub:OWNER/NAME``, for zero-shot classification.
        held_out: which run, where a folder holds several.
        classes: other classes than those it was trained on, by name; needed for a CLIP, and for a checkpoint that does
            not say its own.
        templates: sentences about the classes with ``{}``; unset: those it was trained with.
        alpha: weights between zero-shot (0) and trained (1), see ``ClipClassifier.interpolation``.

    Raises:
        UserError: nothing that can be loaded; no classes; classes that a head of the adapter does not have; an alpha
            where there is nothing to interpolate; and as ``load_adapter``.
    """
    folder = Path(place)
    if folder.is_dir():
        if (folder / MANIFEST_NAME).is_file():
            adapter: Path | None = folder
        elif any((folder / name).is_file() for name in _FOLDERS):
            adapter = None
        else:
            adapter = find_run(folder, held_out) / ADAPTER
        if adapter is not None:
            parts = read_adapter(adapter, device=device, classes=classes, templates=templates)
            return LoadedClassifier(ClipClassifier(*parts), str(place), alpha=alpha)
        config, own = _of_checkpoint(folder)
    else:
        config, own = _of_name(str(place)), {}
    names = classes or own.get("classes")
    if not names:
        raise UserError(f"{place} does not say which classes to choose from; {_NO_CLASSES}")
    if alpha is not None:
        raise UserError(f"{place} is a whole model without an adapter, so there is nothing between it and zero-shot")
    backbone = load_backbone(config)
    if device is not None:
        backbone.to(torch.device(device))
    prompts = ClassPrompts(tuple(names), tuple(templates or own.get("templates") or prompt_templates(PromptConfig())))
    return LoadedClassifier(ClipClassifier(backbone, None, prompts), str(place))


def _of_checkpoint(folder: Path) -> tuple[BackboneConfig, dict[str, list[str]]]:
    """The config of a checkpoint's folder, and the classes and templates that it says."""
    family = next(family for name, family in _FOLDERS.items() if (folder / name).is_file())
    note = folder / EXPORT_NOTE
    if not note.is_file():
        return folder_config(family, folder), {}
    try:
        told = read_json(note, max_bytes=MAX_NOTE_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{note} cannot be read ({error}); export the checkpoint again") from error
    own = {}
    for key in ("classes", "templates"):
        value = told.get(key) if isinstance(told, dict) else None
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            own[key] = value
    return folder_config(family, folder), own


def _of_name(name: str) -> BackboneConfig:
    model, _, tag = name.partition(":")
    if name.startswith(("hf-hub:", "local-dir:")) or not tag:
        return BackboneConfig(name=name)
    return BackboneConfig(name=model, pretrained=tag)
