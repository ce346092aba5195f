"""Shared by all tests: the two lanes, no network, one thread, and the tiny checkpoints written once per process.

``pytest`` runs the fast lane: the unit tests that are not marked slow. ``pytest --full`` runs every test, and
``pytest --rest`` those that the fast lane leaves out. All use all cores if pytest-xdist is installed and ``-n`` does
not say otherwise. ``pytest PATH`` runs every test of that path, in one process. The repository's root is on
``sys.path``: ``from tests.helpers.tiny import tiny_openclip``.
"""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once: a test that would download fails instead.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports torch, and for the processes that tests start: there may be one test per core at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.helpers.folders import write_domains
from tests.helpers.tiny import twin_checkpoints

torch.set_num_threads(1)

LEFT_OUT = pytest.StashKey[int]()
"""How many tests the fast lane leaves out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tests too; naming a path does the same for it")
    parser.addoption("--rest", action="store_true", help="run the slow tests alone, which the fast lane leaves out")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose the lane and the number of processes, before pytest-xdist reads its options and hands them to workers."""
    option = config.option
    if hasattr(config, "workerinput"):
        return
    if option.file_or_dir:
        option.full = not option.rest
    elif config.pluginmanager.hasplugin("xdist") and option.numprocesses is None and not option.usepdb:
        # A file's tests stay together: its module's fixtures may take longer than its tests.
        option.numprocesses, option.dist = "auto", "loadfile"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.full:
        return
    unit = Path(__file__).parent / "unit"
    fast, slow = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        is_fast = unit in item.path.parents and item.get_closest_marker("slow") is None
        (fast if is_fast else slow).append(item)
    if config.option.rest:
        config.hook.pytest_deselected(items=fast)
        items[:] = slow
        return
    config.stash[LEFT_OUT] = len(slow)
    config.hook.pytest_deselected(items=slow)
    items[:] = fast


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # a worker of pytest-xdist tells its main process
    if output is not None:
        output["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"fast lane: {left_out} slow tests were left out; pytest --full runs them too")


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


@pytest.fixture(scope="module", autouse=True)
def precision_is_left_as_it_was() -> Iterator[None]:
    """Accelerate keeps one precision for all of a process: a file that trained in another one leaves none behind.

    Not after each test: within a file, a workplace of several tests keeps its Accelerator."""
    yield
    if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def domains_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains, four classes, eight images each. Read only."""
    return write_domains(tmp_path_factory.mktemp("domains"))
