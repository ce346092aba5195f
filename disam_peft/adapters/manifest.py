"""The manifest of an adapter folder, ``disam_peft.json``.

It may come from anybody: it is read strictly, has a largest size, and nothing in it names code or paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from disam_peft.common.strict_json import read_json
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.backbone import BackboneConfig, FilePreprocessing
from disam_peft.config.base import Config
from disam_peft.errors import UserError

MANIFEST_NAME = "disam_peft.json"
TENSORS_NAME = "adapter_model.safetensors"
MAX_JSON_BYTES = 16 * 2**20  # tens of thousands of class names fit
MAX_TENSOR_BYTES = 4 * 2**30  # beyond the largest CLIP's own weights in half precision
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_AS_OPENAI = FilePreprocessing(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    interpolation="bicubic",
    resize="shortest",
)


class BackboneEntry(BackboneConfig):
    """``ClipBackbone.describe()``: the config of the backbone, and what its output depends on, as it was loaded."""

    sha256: Sha256
    """Of its weights."""
    quick_gelu: bool
    embed_dim: int
    fingerprint: dict[str, JsonValue] | None = None
    """Everything else, in named parts. Version 0.1 recorded none."""

    def config(self) -> BackboneConfig:
        config = BackboneConfig(**self.model_dump(include=set(BackboneConfig.model_fields)))
        if self.fingerprint is not None or not (config.pretrained or "").endswith(".safetensors"):
            return config
        # 0.1 took every bare weights file to be preprocessed as OpenAI's, and so this adapter was trained.
        activation: Literal["gelu", "quick_gelu"] = "quick_gelu" if self.quick_gelu else "gelu"
        return config.model_copy(update={"activation": activation, "preprocessing": _AS_OPENAI})


class TensorEntry(Config):
    shape: list[Annotated[int, Field(ge=0)]] = Field(max_length=8)
    dtype: str


class AdapterManifest(Config):
    """The content of ``disam_peft.json``."""

    format: Literal["disam_peft.adapter"] = "disam_peft.adapter"
    format_version: Literal[1] = 1
    kind: str
    config: AdapterConfig
    backbone: BackboneEntry
    classes: list[str] = Field(min_length=1, max_length=100_000)
    """Names as they stand in the prompts, one per label."""
    templates: list[str] = Field(min_length=1, max_length=1_000)
    logit_scale: float
    tensors: dict[str, TensorEntry]
    sha256: Sha256
    """Of the file ``adapter_model.safetensors``."""
    trained_with: dict[str, JsonValue]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _same_kind(self) -> AdapterManifest:
        if self.kind != self.config.kind:
            raise ValueError(f"kind '{self.kind}' and config.kind '{self.config.kind}' differ")
        return self


def read_manifest(directory: Path) -> AdapterManifest:
    """Read and check ``disam_peft.json``; opens no other file.

    Raises:
        UserError: no adapter folder, pickled weights in it, or a manifest that does not fit the schema.
    """
    directory = Path(directory)
    if directory.suffix.lower() in PICKLES and not directory.is_dir():
        raise UserError(f"{directory} is a pickle, which can run code when loaded; it was not opened. {_WANTED}")
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder. {_WANTED}")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        raise UserError(
            f"{directory} holds pickled weights ({', '.join(pickles)}), which can run code when loaded; nothing was "
            f"opened. {_WANTED}"
        )
    path = directory / MANIFEST_NAME
    require_inside(directory, path)
    if not path.is_file():
        raise UserError(f"{directory} has no {MANIFEST_NAME}, so disam_peft did not write it. {_WANTED}")
    try:
        return AdapterManifest.model_validate(read_folder_json(path))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()[:5]
        )
        raise UserError(f"{path} does not fit its schema: {faults}. {_WANTED}") from error


_WANTED = (
    f"Give a folder with {MANIFEST_NAME} and {TENSORS_NAME}, as training or `disam-peft export --to peft` writes it"
)


def read_folder_json(path: Path) -> Any:
    """The content of a JSON file of an adapter folder, at most 16 MiB; see ``common/strict_json.py``.

    Raises:
        UserError: too large, or not strict JSON.
    """
    try:
        return read_json(path, max_bytes=MAX_JSON_BYTES)
    except ValueError as error:
        raise UserError(f"{error}; the folder is damaged or no adapter's, copy it again") from error


def require_inside(directory: Path, path: Path) -> None:
    """Refuse a file that is a link out of the adapter's folder, except into the store of files of a Hugging Face
    cache, where all files are such links.

    Raises:
        UserError: it leads elsewhere.
    """
    folder, target = directory.resolve(), path.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(f"{path} leads out of its folder, to {target}; put a copy of the file in its place")
