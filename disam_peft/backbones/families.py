"""The families of CLIP models, and the way from a config to a frozen backbone."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from disam_peft.common.file_hashes import sha256_of
from disam_peft.config.backbone import DEMO, RANDOM_WEIGHTS, BackboneConfig

_OF_A_CHECKPOINT = {".safetensors", ".json", ".txt", ".model"}

if TYPE_CHECKING:
    from disam_peft.backbones.base import ClipBackbone
    from disam_peft.backbones.listed_model import ListedModel


def located(config: BackboneConfig) -> BackboneConfig:
    """The config with ``demo`` replaced by the folder that it stands for."""
    if config.name != DEMO:
        return config
    folder = Path(__file__).parent / DEMO
    return config.model_copy(update={"name": folder_config(config.family, folder).name})


def folder_config(family: Literal["open_clip", "transformers"], directory: Path) -> BackboneConfig:
    """The config that loads what ``ClipBackbone.save`` of that family wrote into a folder."""
    return BackboneConfig(family=family, name=f"local-dir:{directory}" if family == "open_clip" else str(directory))


def _open_clip(config: BackboneConfig) -> ClipBackbone:
    from disam_peft.backbones.open_clip.backbone import OpenClipBackbone

    return OpenClipBackbone(config)


def _transformers(config: BackboneConfig) -> ClipBackbone:
    from disam_peft.backbones.transformers.clip import HfBackbone

    return HfBackbone(config)


BACKBONES: dict[str, Callable[[BackboneConfig], ClipBackbone]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
}


def load_backbone(config: BackboneConfig) -> ClipBackbone:
    """A frozen CLIP on the CPU, in the config's precision and eval mode. Random weights come with a warning.

    Raises:
        UserError: an unknown name or tag, weights that are missing, pickled or cannot be fetched.
    """
    if config.pretrained == RANDOM_WEIGHTS:
        warnings.warn(
            f"backbone '{config.name}' has RANDOM weights (pretrained: random): accuracies will be at chance and say "
            "nothing about the method; set backbone.pretrained to a tag such as 'openai', or leave it out where the "
            "name brings weights",
            stacklevel=2,
        )
    backbone = BACKBONES[config.family](located(config))
    backbone.config = config  # records and exports name the model, not a folder of this machine
    return backbone


def local_files_hash(config: BackboneConfig, *, again: bool = False) -> str:
    """sha256, hex, over the names and contents of the files that the backbone is loaded from; empty where these are not
    the user's own: built-in names, hub repositories, the demo.

    Equal files make the same backbone. Other files may do so, too (``ClipBackbone.identity`` decides).

    Args:
        again: read the files, though the file system notes nothing new about them since they were hashed.

    Raises:
        OSError: a file cannot be read.
    """
    name, weights = config.name, Path(config.pretrained or "").expanduser()
    if config.family == "open_clip":
        folder = Path(name.removeprefix("local-dir:")).expanduser() if name.startswith("local-dir:") else None
    else:
        folder = Path(name).expanduser() if name != DEMO else None
    files = []
    if folder is not None and folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in _OF_A_CHECKPOINT and path.is_file())
    elif weights.suffix == ".safetensors" and weights.is_file():
        files = [weights]
    parts = [part for path in files for part in (path.name, sha256_of(path, again=again))]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest() if parts else ""


def require_known(config: BackboneConfig) -> None:
    """Pass if there is such a model, as far as can be told without fetching or loading it.

    Raises:
        UserError: an unknown name or tag, with the near ones; a folder that is not there.
    """
    config = located(config)
    if config.family == "open_clip":
        from disam_peft.backbones.open_clip.weights import require_known as known
    else:
        from disam_peft.backbones.transformers.checkpoint import require_known as known
    known(config)


def listed_models(family: str | None = None) -> list[ListedModel]:
    """The models of both families, or of one, that are known by name; neither builds nor fetches any."""
    found: list[ListedModel] = []
    if family != "transformers":
        from disam_peft.backbones.open_clip.built_in_models import built_in_models

        found += built_in_models()
    if family != "open_clip":
        from disam_peft.backbones.transformers.architectures import known_models

        found += known_models()
    return found


def imagenet_templates() -> tuple[str, ...]:
    """The 80 sentences of CLIP's ImageNet ensemble, each with one ``{}``."""
    from disam_peft.backbones.open_clip.backbone import imagenet_templates as templates

    return templates()
