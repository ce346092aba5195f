"""``adapter_config.json``: what the peft library reads for an adapter. It is written, compared, and never obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from disam_peft.adapters.manifest import MANIFEST_NAME, read_folder_json
from disam_peft.backbones.base import ClipBackbone
from disam_peft.errors import UserError

PEFT_CONFIG_NAME = "adapter_config.json"
# What may differ between two files of the same adapter.
_INCIDENTAL = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type"}


def peft_config_json(peft_config: Any, backbone: ClipBackbone) -> dict[str, Any]:
    """The file's content for a ``peft.PeftConfig``: JSON types only, sets sorted."""
    entries = {key: sorted(value) if isinstance(value, set) else value for key, value in peft_config.to_dict().items()}
    return {
        **entries,
        "base_model_name_or_path": backbone.config.name,
        "revision": backbone.config.revision,
        "inference_mode": True,  # as peft saves it: loading it does not make it trainable
    }


def require_same_config(path: Path, expected: dict[str, Any]) -> None:
    """Refuse a file that says something else than ``expected``, which follows from the manifest.

    Raises:
        UserError: not a JSON object, modules chosen by a pattern, or a field with another value.
    """
    found = read_folder_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object")
    if isinstance(found.get("target_modules"), str):
        raise UserError(
            f"{path} chooses its modules by the pattern {found['target_modules']!r}; only a list of names is "
            f"accepted, and {MANIFEST_NAME} has it. Remove {path.name} or export the adapter again"
        )
    expected = json.loads(json.dumps(expected))
    # Fields that the file leaves out are the business of its version of peft; these two are never left out.
    keys = (found.keys() | {"peft_type", "target_modules"}) - _INCIDENTAL
    differing = sorted(key for key in keys if _canonical(found.get(key)) != _canonical(expected.get(key)))
    if differing:
        raise UserError(
            f"{path} disagrees with {MANIFEST_NAME} in {', '.join(differing)} "
            f"(found {differing[0]}: {str(found.get(differing[0]))[:200]}); it was changed after the export. "
            f"Nothing was loaded; export the adapter again, or remove {path.name} if you trust {MANIFEST_NAME}"
        )


def _canonical(value: Any) -> Any:
    """Lists of names are sets to peft; False, None and empty mean that nothing was asked for."""
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        value = sorted(value)
    return value or None
