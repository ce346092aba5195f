"""The adapter folder: tensors as safetensors, everything else as JSON, and back to a classifier.

``adapter_model.safetensors`` and ``disam_peft.json`` are all that ``load_adapter`` reads. For methods of peft on a
transformers model, ``adapter_config.json`` makes the same folder what ``peft.PeftModel.from_pretrained`` loads; it
is written, compared, and never obeyed. CoOp exports ``class_features.safetensors`` too, the class features (C, E)
that its prompts came to, which is all that classification needs beside the image tower.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from disam_peft import __version__
from disam_peft.adapters.base import Adapter
from disam_peft.adapters.manifest import (
    MANIFEST_NAME,
    MAX_TENSOR_BYTES,
    PEFT_CONFIG_NAME,
    TENSORS_NAME,
    AdapterManifest,
    BackboneEntry,
    TensorEntry,
    read_json,
    read_manifest,
    require_inside,
    write_json,
)
from disam_peft.adapters.peft.peft_adapter import PeftAdapter, plan, to_json
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.config.adapters import CoOpConfig, LinearProbeConfig, LoraAdapterConfig, PeftAdapterConfig
from disam_peft.errors import UserError

_UNREAD = "It was not read; export the adapter again where it was trained"
_SLACK = 4  # what is a little short is told tensor by tensor, later
_LIBRARIES = ("torch", "open_clip_torch", "transformers", "peft", "safetensors")
# What may differ between two adapter_config.json of the same adapter.
_INCIDENTAL = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type"}


def write_adapter(
    directory: Path, adapter: Adapter, backbone: ClipBackbone, prompts: ClassPrompts, *, trained_with: Mapping[str, Any]
) -> None:
    """Write the files of an adapter folder into ``directory``, which exists.

    Args:
        trained_with: JSON types; the recipe and whatever else should travel with the adapter.

    Raises:
        UserError: an adapter that is merged into the live model, or whose tensors are not finite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(adapter.state().items())}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{len(broken)} tensors of the adapter hold NaN or infinity ({broken[0]}); nothing was saved")
    content = save_tensors(tensors, metadata={"format": "pt"})
    manifest = AdapterManifest(
        kind=adapter.kind,
        config=adapter.config,  # type: ignore[arg-type]  # checked by pydantic
        backbone=BackboneEntry(**backbone.describe()),
        classes=list(prompts.class_names),
        templates=list(prompts.templates),
        logit_scale=float(backbone.logit_scale),
        tensors={name: _tensor_entry(tensor) for name, tensor in tensors.items()},
        sha256=hashlib.sha256(content).hexdigest(),
        trained_with=dict(trained_with),
        versions=_versions(),
    )
    (directory / TENSORS_NAME).write_bytes(content)
    write_json(directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
    if isinstance(adapter, PeftAdapter) and backbone.family == "transformers":
        write_json(directory / PEFT_CONFIG_NAME, adapter.peft_json)


def read_adapter(
    directory: Path, backbone: ClipBackbone | None = None, *, device: torch.device | str | None = None
) -> tuple[ClipBackbone, Adapter, ClassPrompts]:
    """The adapter of a folder, attached to its backbone.

    Args:
        backbone: a backbone without adapter to attach to; None loads the recorded one.
        device: moves the backbone there first.

    Raises:
        UserError: not an adapter folder, pickled weights, another backbone than the recorded one, tensors that are
            missing, extra, misshapen, non-finite or damaged, or a peft config that says something else than the
            manifest. A ``backbone`` that was passed in is left as it was.
    """
    manifest = read_manifest(directory)
    state = _read_tensors(directory, manifest)
    if backbone is None:
        backbone = load_backbone(manifest.backbone.config())
    if backbone.base_hash != manifest.backbone.sha256:
        raise UserError(
            f"the adapter in {directory} was trained on {manifest.backbone.name} with weights "
            f"{manifest.backbone.sha256}, but {backbone.config.name} has {backbone.base_hash}; load the backbone that "
            "it was trained on"
        )
    if device is not None:
        backbone.to(device)
    _check_peft_config(directory, manifest, backbone)
    _require_size(directory, manifest, backbone)
    prompts = ClassPrompts(tuple(manifest.classes), tuple(manifest.templates))
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that are overwritten at once
        adapter = build_adapter(manifest.config, backbone, prompts)
    try:
        adapter.load_state(state)
    except BaseException:
        adapter.detach(backbone)
        raise
    return backbone, adapter, prompts


def _read_tensors(directory: Path, manifest: AdapterManifest) -> dict[str, Tensor]:
    path = directory / TENSORS_NAME
    require_inside(directory, path)
    if not path.is_file():
        raise UserError(f"{directory} has no {TENSORS_NAME}; copy the folder again, complete")
    if (size := path.stat().st_size) > MAX_TENSOR_BYTES:
        raise UserError(f"{path} has {size} bytes; more than {MAX_TENSOR_BYTES} is no adapter of a CLIP. {_UNREAD}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.sha256:
        raise UserError(
            f"{path} is not the file that was saved: sha256 {manifest.sha256} expected, {digest} found; copy it again"
        )
    try:
        tensors = load_tensors(content)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    found = {name: _tensor_entry(tensor) for name, tensor in tensors.items()}
    if found != manifest.tensors:
        differing = sorted(
            name for name in found.keys() | manifest.tensors.keys() if found.get(name) != manifest.tensors.get(name)
        )
        raise UserError(f"{path} does not hold the tensors that {MANIFEST_NAME} lists: {', '.join(differing[:5])}")
    return tensors


def _check_peft_config(directory: Path, manifest: AdapterManifest, backbone: ClipBackbone) -> None:
    """``adapter_config.json`` is for peft. Here it must say the same as the manifest; nothing in it is acted upon."""
    path = directory / PEFT_CONFIG_NAME
    require_inside(directory, path)
    if not path.is_file():
        return
    found = read_json(path)
    if not isinstance(manifest.config, LoraAdapterConfig | PeftAdapterConfig):
        raise UserError(f"{path} does not belong to a '{manifest.kind}' adapter; remove it")
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object")
    if isinstance(found.get("target_modules"), str):
        raise UserError(
            f"{path} chooses its modules by the pattern {found['target_modules']!r}; only a list of names is "
            f"accepted, and {MANIFEST_NAME} has it. Remove {PEFT_CONFIG_NAME} or export the adapter again"
        )
    _, peft_config = plan(manifest.config, backbone)
    expected = json.loads(json.dumps(to_json(peft_config, backbone)))
    # Fields that the file leaves out are the business of its version of peft; these two are never left out.
    keys = (found.keys() | {"peft_type", "target_modules"}) - _INCIDENTAL
    differing = sorted(key for key in keys if _canonical(found.get(key)) != _canonical(expected.get(key)))
    if differing:
        raise UserError(
            f"{path} disagrees with {MANIFEST_NAME} in {', '.join(differing)} "
            f"(found {differing[0]}: {str(found.get(differing[0]))[:200]}); it was changed after the export. "
            f"Nothing was loaded; export the adapter again, or remove {PEFT_CONFIG_NAME} if you trust {MANIFEST_NAME}"
        )


def _require_size(directory: Path, manifest: AdapterManifest, backbone: ClipBackbone) -> None:
    """Before anything is built: a config may ask for far more memory than the file beside it fills."""
    config, classes = manifest.config, len(manifest.classes)
    if isinstance(config, LoraAdapterConfig):
        targets, _ = plan(config, backbone)
        layers: list[Any] = [backbone.model.get_submodule(target.name) for target in targets]
        expected = sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)
    elif isinstance(config, LinearProbeConfig):
        expected = classes * backbone.embed_dim
    elif isinstance(config, CoOpConfig) and config.class_specific:
        expected = classes * backbone.token_width  # at least: for each context token
    else:
        return  # MAX_RANK and the backbone's layers bound it
    found = sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
    if expected > _SLACK * found:
        raise UserError(
            f"the '{manifest.kind}' adapter in {directory} needs {expected} numbers by its config and classes, but "
            f"{TENSORS_NAME} holds {found}; nothing was loaded, export it again where it was trained"
        )


def _canonical(value: Any) -> Any:
    """Lists of names are sets to peft; False, None and empty mean that nothing was asked for."""
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        value = sorted(value)
    return value or None


def _tensor_entry(tensor: Tensor) -> TensorEntry:
    return TensorEntry(shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _versions() -> dict[str, str]:
    found = {"disam_peft": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
