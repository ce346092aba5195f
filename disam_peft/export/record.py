"""``disam_peft.json``: what an adapter folder says about itself. A boundary: strict, capped, no code, no paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from disam_peft.adapters.config import AdapterConfig
from disam_peft.backbones.config import BackboneConfig
from disam_peft.config import Config
from disam_peft.errors import UserError

RECORD_NAME = "disam_peft.json"
TENSORS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
MAX_JSON_BYTES = 16 * 2**20  # tens of thousands of class names fit
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BackboneRecord(BackboneConfig):
    """``ClipBackbone.describe()``: what was asked for, and the fingerprint of what came."""

    sha256: Sha256
    quick_gelu: bool
    embed_dim: int

    def config(self) -> BackboneConfig:
        return BackboneConfig(**self.model_dump(include=set(BackboneConfig.model_fields)))


class TensorRecord(Config):
    shape: list[int]
    dtype: str


class AdapterRecord(Config):
    """The content of ``disam_peft.json``."""

    format: Literal["disam_peft.adapter"] = "disam_peft.adapter"
    format_version: Literal[1] = 1
    kind: str
    config: AdapterConfig
    backbone: BackboneRecord
    classes: list[str]
    """Names as they stand in the prompts, one per label."""
    templates: list[str]
    logit_scale: float
    tensors: dict[str, TensorRecord]
    sha256: Sha256
    """Of the file ``adapter_model.safetensors``."""
    trained_with: dict[str, JsonValue]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _same_kind(self) -> AdapterRecord:
        if self.kind != self.config.kind:
            raise ValueError(f"kind '{self.kind}' and config.kind '{self.config.kind}' differ")
        return self


def read_record(directory: Path) -> AdapterRecord:
    """Read and check ``disam_peft.json``; opens no other file.

    Raises:
        UserError: no adapter folder, pickled weights in it, or a record that does not fit the schema.
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
    path = directory / RECORD_NAME
    if not path.is_file():
        raise UserError(f"{directory} has no {RECORD_NAME}, so disam_peft did not write it. {_WANTED}")
    try:
        return AdapterRecord.model_validate(read_json(path))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()[:5]
        )
        raise UserError(f"{path} does not fit its schema: {faults}. {_WANTED}") from error


_WANTED = f"Give a folder with {RECORD_NAME} and {TENSORS_NAME}, as training or `disam-peft export --to peft` writes it"


def read_json(path: Path) -> Any:
    """A JSON file of at most 16 MiB.

    Raises:
        UserError: too large, or not JSON.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {size} bytes; more than {MAX_JSON_BYTES} is no description of an adapter")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); the folder is damaged, copy it again") from error


def write_json(path: Path, content: Any) -> None:
    """Sorted and indented: the same content gives the same bytes."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
