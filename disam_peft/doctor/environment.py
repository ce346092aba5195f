"""The machine and the versions that a finding holds for."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from disam_peft import __version__

PACKAGES = ("torch", "open_clip_torch", "transformers", "peft", "accelerate")


def this_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def environment(device: torch.device) -> dict[str, str]:
    """Names and versions, as text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {"disam_peft": __version__, "python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    return found | {
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({name})",
        "cores": f"{cores}, torch uses {torch.get_num_threads()}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
