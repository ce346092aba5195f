"""Shared by all tests: no network, one thread, and the tiny checkpoints written once per session.

The repository's root is on ``sys.path`` for every test: ``from tests.helpers.tiny import tiny_openclip``.
"""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once: a test that would download fails instead.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import datasets
import pytest
import torch

from tests.helpers.folders import write_domains
from tests.helpers.tiny import twin_checkpoints

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """One tiny CLIP in both formats: (open_clip name, transformers folder). Read only."""
    return twin_checkpoints(tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="session")
def openclip_name(twins: tuple[str, str]) -> str:
    """``local-dir:`` name of a tiny open_clip checkpoint. Read only."""
    return twins[0]


@pytest.fixture(scope="session")
def transformers_dir(twins: tuple[str, str]) -> str:
    """Folder of a tiny transformers CLIP. Read only."""
    return twins[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test may read or write the findings of another one, or of the user."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DISAM_PEFT_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    return folder


@pytest.fixture(scope="session")
def domains_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains, four classes, eight images each. Read only."""
    return write_domains(tmp_path_factory.mktemp("domains"))
