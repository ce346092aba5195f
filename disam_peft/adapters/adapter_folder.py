"""The adapter folder: tensors as safetensors, everything else as JSON, and back to an adapter on its backbone.

``adapter_model.safetensors`` and ``disam_peft.json`` (the manifest) are all that is needed to load an adapter. An
adapter may add files for other programs (``Adapter.companion_files``), such as ``adapter_config.json``, which makes
the same folder what ``peft.PeftModel.from_pretrained`` loads; when a folder is read they are compared, never obeyed.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
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
    TENSORS_NAME,
    AdapterManifest,
    BackboneEntry,
    TensorEntry,
    read_manifest,
    require_inside,
)
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import ADAPTERS, build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.backbones.fingerprint import differences
from disam_peft.common.strict_json import json_bytes
from disam_peft.config.backbone import Precision
from disam_peft.errors import Notice, UserError

_UNREAD = "It was not read; export the adapter again where it was trained"
_SLACK = 4  # tensors that are a little too small are reported one by one, after building
_LIBRARIES = ("torch", "open_clip_torch", "transformers", "peft", "safetensors")


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
        logit_scale=float(adapter.scale_and_bias(backbone)[0].detach()),
        tensors={name: _tensor_entry(tensor) for name, tensor in tensors.items()},
        sha256=hashlib.sha256(content).hexdigest(),
        trained_with=dict(trained_with),
        versions=_versions(),
    )
    (directory / TENSORS_NAME).write_bytes(content)
    (directory / MANIFEST_NAME).write_bytes(json_bytes(manifest.model_dump(mode="json")))
    for name, companion in adapter.companion_files(backbone).items():
        (directory / name).write_bytes(companion)


def read_state(directory: Path) -> tuple[AdapterManifest, dict[str, Tensor]]:
    """The manifest and the tensors of a folder, without its backbone.

    Raises:
        UserError: not an adapter folder, pickled weights, or tensors that are not those that were saved.
    """
    manifest = read_manifest(directory)
    return manifest, _read_tensors(directory, manifest)


def read_adapter(
    directory: Path,
    backbone: ClipBackbone | None = None,
    *,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> tuple[ClipBackbone, Adapter, ClassPrompts]:
    """The adapter of a folder, attached to its backbone.

    Args:
        backbone: a backbone without adapter to attach to; None loads the recorded one.
        device: moves the backbone there first.
        precision: of the frozen weights; one that is named may be another than that which the adapter was trained on.
            Unset: it has to be that one.
        classes, templates: in place of those that it was trained with; unset: those.

    Raises:
        UserError: not an adapter folder, pickled weights, another backbone than the recorded one, tensors that are
            missing, extra, misshapen, non-finite or damaged, a companion file that says something else than the
            manifest, or other classes for an adapter that has weights for its own. A ``backbone`` that was passed in is
            left as it was.
    """
    manifest, state = read_state(directory)
    names = tuple(manifest.classes if classes is None else classes)
    if names != tuple(manifest.classes):
        ADAPTERS[type(manifest.config)].require_any_classes(manifest.config)
    if backbone is None:
        named = {} if precision is None else {"precision": precision}
        backbone = load_backbone(manifest.backbone.config().model_copy(update=named))
    require_same_backbone(directory, manifest, backbone, precision=precision)
    if device is not None:
        backbone.to(device)
    _check_companions(directory, manifest, backbone)
    _require_size(directory, manifest, backbone)
    prompts = ClassPrompts(names, tuple(manifest.templates if templates is None else templates))
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that are overwritten at once
        adapter = build_adapter(manifest.config, backbone, prompts, to_train=False)
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


def require_same_backbone(
    directory: Path, manifest: AdapterManifest, backbone: ClipBackbone, *, precision: Precision | None = None
) -> None:
    """
    Args:
        precision: the precision of the backbone, where it may be another than the recorded one.

    Raises:
        UserError: the backbone has other weights than the recorded one, or computes something else with them.
    """
    record, here = manifest.backbone, backbone.config.precision
    if precision not in (None, here):
        raise UserError(f"precision={precision} was named, but {backbone.config.name} was loaded with precision {here}")
    if precision is None and here != record.precision:
        raise UserError(
            f"the adapter in {directory} was trained on {record.name} with backbone.precision={record.precision}, and "
            f"this one has {here}: its features are others. Load it as it was, or allow this by its name "
            f"(load_adapter(..., precision='{here}'), or backbone.precision={here} for evaluate) and check the accuracy"
        )
    if record.fingerprint is not None:
        formats = {"number formats": backbone.fingerprint["number formats"]} if here != record.precision else {}
        changes = differences({**record.fingerprint, **formats}, backbone.fingerprint)
        unknown = [name for name in backbone.fingerprint if name not in record.fingerprint]
    else:
        changes = differences({"QuickGELU": record.quick_gelu}, {"QuickGELU": backbone.quick_gelu})
        unknown = list(backbone.fingerprint)
    listed = "".join(f"\n  {change}" for change in changes)
    if backbone.base_hash != record.sha256:
        raise UserError(
            f"the adapter in {directory} was trained on {record.name} with weights {record.sha256}, but "
            f"{backbone.config.name} has {backbone.base_hash}; load the backbone that it was trained on"
            + (f". It also differs in:{listed}" if changes else "")
        )
    if changes:
        raise UserError(
            f"the adapter in {directory} was trained on {record.name}, and {backbone.config.name} has its weights but "
            f"computes something else with them; load the backbone as it was. It differs in:{listed}"
        )
    if unknown:
        warnings.warn(
            f"the adapter in {directory} was saved by version {manifest.versions.get('disam_peft', 'unknown')}, which "
            f"recorded less of its backbone: its weights are the same, but these could not be compared: "
            f"{', '.join(unknown)}",
            Notice,
            stacklevel=4,
        )


def _check_companions(directory: Path, manifest: AdapterManifest, backbone: ClipBackbone) -> None:
    """Files for other programs must say the same as the manifest; nothing in them is acted upon."""
    adapter_class = ADAPTERS[type(manifest.config)]
    for name in sorted({name for kind in ADAPTERS.values() for name in kind.companion_names}):
        path = directory / name
        require_inside(directory, path)
        if not path.is_file():
            continue
        if name not in adapter_class.companion_names:
            raise UserError(f"{path} does not belong to a '{manifest.kind}' adapter; remove it")
        adapter_class.check_companion(path, manifest.config, backbone)


def _require_size(directory: Path, manifest: AdapterManifest, backbone: ClipBackbone) -> None:
    """Before anything is built: a config may ask for far more memory than the file beside it fills."""
    expected = ADAPTERS[type(manifest.config)].expected_numbers(manifest.config, backbone, len(manifest.classes))
    found = sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
    if expected > _SLACK * found:
        raise UserError(
            f"the '{manifest.kind}' adapter in {directory} needs {expected} numbers by its config and classes, but "
            f"{TENSORS_NAME} holds {found}; nothing was loaded, export it again where it was trained"
        )


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
