"""Runs in processes of their own, forked from this one with everything imported, so that they may be killed.

Every test that kills compares files: ``result(folder)`` is what an uninterrupted run leaves, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from disam_peft.backbones.families import load_backbone
from disam_peft.config.recipe import Recipe
from disam_peft.errors import Stopped, UserError
from disam_peft.experiments import run

_children: set[int] = set()


def end_the_rest() -> None:
    """After a test that failed: nobody is left waiting for a process that is gone."""
    while _children:
        pid = _children.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def recipe_for(domains: Path, model: str, output: Path, **changes) -> Recipe:
    """Twelve steps with dropout and augmentation, a validation after each third, a checkpoint after each second."""
    values = {
        "name": "interrupted",
        "output": output,
        "backbone": {"name": model},
        "adapter": {"kind": "lora", "blocks": {"last": 1}, "rank": 2, "dropout": 0.3},
        "data": {"root": domains},
        "protocol": {"held_out": "photo"},
        "train": {"steps": 12, "batch_size": 4, "validate_every": 3, "save_every": 2, "workers": 0, "log_every": 1},
        "evaluation": {"workers": 0},
    }
    for key, value in changes.items():
        joined = isinstance(values.get(key), dict) and "kind" not in value
        values[key] = {**values[key], **value} if joined else value
    return Recipe.model_validate(values)


def result(recipe: Recipe) -> dict[str, str]:
    """sha256 of every file of the finished run; anything that should not be there would stand out."""
    folder = recipe.folder(recipe.protocol.held_out)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert not (folder / "checkpoints").exists()
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def forked(action: Callable[[], object], *, environment: dict[str, str] | None = None) -> int:
    """The pid of a child that runs ``action`` and ends with 0; with 2 for a UserError, 1 for any other failure, and as
    a signal has it. What it says goes to standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        _children.add(pid)
        return pid
    _children.clear()  # they are not this one's
    code = 1
    try:
        os.environ.update({"ACCELERATE_USE_CPU": "true", **(environment or {})})
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.cuda.is_available = lambda: False  # a forked process cannot use what its parent may have opened
        action()
        code = 0
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        code = 2
    except Stopped as stopped:
        os.write(2, f"{stopped}\n".encode())
        code = stopped.exit_code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def ended(pid: int, *, within: float = 120.0) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it.

    Raises:
        TimeoutError: it goes on for longer (and is killed).
    """
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _children.discard(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    end_the_rest()
    raise TimeoutError(f"process {pid} did not end within {within} s")


def warmed_up(recipe: Recipe) -> Callable[[], None]:
    """Import what a run imports. The result is for the start of a child: it then takes the model from memory."""
    run.train(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    backbone = load_backbone(recipe.backbone)
    return lambda: setattr(run, "load_backbone", lambda config: backbone)


def train_in_child(recipe: Recipe, *, before: Callable[[], object] = lambda: None, resume: bool = True) -> int:
    """The pid of a child that trains, after ``before()``, which may break something there."""

    def action() -> None:
        before()
        run.train(recipe, resume=resume)

    return forked(action)


def train_in_two(recipe: Recipe, *, before: Callable[[int], object] = lambda rank: None) -> Sequence[int]:
    """The pids of two children that train together over gloo, after ``before(rank)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = []
    for rank in range(2):

        def action(rank: int = rank) -> None:
            before(rank)
            run.train(recipe, resume=True)

        pids.append(forked(action, environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    return pids


def ends_itself(module: Any, name: str, count: int, *, number: int = signal.SIGKILL) -> Callable[[], None]:
    """For a child: a signal to itself right after the ``count``-th call of a function."""
    real, calls = getattr(module, name), list[int]()

    def call(*arguments: Any, **options: Any) -> Any:
        given = real(*arguments, **options)
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return given

    return lambda: setattr(module, name, call)


def saved(recipe: Recipe) -> list[str]:
    """The names of the checkpoints of an unfinished run."""
    return sorted(path.name for path in (recipe.folder("photo") / "checkpoints").glob("step-*"))


def ends_itself_at_a_write(recipe: Recipe, count: int) -> Callable[[], None]:
    """For a child: SIGKILL right before the ``count``-th change that it makes in the folder of its run, counted from
    the end of training on. Changes are files that are opened for writing, renamed, removed or cut, and folders."""
    folder, seen = str(recipe.folder("photo")), list[str]()
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            _, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if mode is None else mode[0] in "wax+"
            if not writes:
                return
        elif event not in changes:
            return
        if folder in str(arguments[0]) or folder.replace("/photo", "/.photo") in str(arguments[0]):
            seen.append(event)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    def begin() -> None:
        real = run._judge_all_weights

        def judge(*arguments: Any) -> Any:
            sys.addaudithook(watch)
            return real(*arguments)

        run._judge_all_weights = judge  # type: ignore[assignment]

    return begin
