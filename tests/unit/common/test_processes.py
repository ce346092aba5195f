"""Ranks, and decisions that all processes take together."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from disam_peft.common import processes
from disam_peft.errors import UserError
from tests.helpers.ranks import fork_ranks, gloo_group


def test_without_a_group_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.rank(), processes.world_size(), processes.is_main(), processes.has_group()) == (0, 1, True, False)
    assert processes.on_main(lambda: "done") == "done"
    assert processes.largest(3, torch.device("cpu")) == 3
    assert processes.from_all("mine") == ["mine"]
    processes.wait()


def test_before_there_is_a_group_the_launcher_says_who_is_main_and_torch_is_not_loaded():
    code = (
        "import os, sys; from disam_peft.common.processes import is_main, rank, world_size;"
        "os.environ['RANK'] = '1'; second = is_main(); os.environ['RANK'] = '0';"
        "print(second, is_main(), rank(), world_size(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "0", "1", "False"]


def _refuse() -> None:
    raise UserError("no room")


def _fail() -> None:
    raise KeyError("lost")


def _raised(action) -> tuple[str, str]:
    try:
        processes.on_main(action)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _found(rank: int) -> dict[str, Any]:
    return {
        "rank": (processes.rank(), processes.world_size(), processes.is_main()),
        "on_main": processes.on_main(lambda: f"by {processes.rank()}"),
        "refused": _raised(_refuse),
        "failed": _raised(_fail),
        "largest": processes.largest(7 - rank, torch.device("cpu")),
        "from_all": processes.from_all("ab"[rank]),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")

    def work(rank: int) -> None:
        with gloo_group(folder, rank, 2):
            torch.save(_found(rank), folder / f"{rank}.pt")
            processes.wait()

    fork_ranks(2, work)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_each_rank_knows_its_place(two_ranks):
    assert [found["rank"] for found in two_ranks] == [(0, 2, True), (1, 2, False)]


def test_the_main_process_alone_acts_and_all_have_the_result(two_ranks):
    assert [found["on_main"] for found in two_ranks] == ["by 0", "by 0"]


def test_an_error_of_the_main_process_ends_every_process(two_ranks):
    assert [found["refused"] for found in two_ranks] == [("UserError", "no room")] * 2
    main, other = (found["failed"] for found in two_ranks)
    assert main == ("KeyError", "'lost'")
    assert other == ("RuntimeError", "the main process failed: KeyError('lost')")


def test_numbers_and_values_of_all_ranks(two_ranks):
    assert [found["largest"] for found in two_ranks] == [7, 7]
    assert [found["from_all"] for found in two_ranks] == [["a", "b"], ["a", "b"]]
