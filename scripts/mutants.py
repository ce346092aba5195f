"""Faults that the tests must notice: each is put into a copy of the project, and the tests that are named must fail.

    python scripts/mutants.py                     # all of scripts/mutants.yaml, some minutes
    python scripts/mutants.py --only splits,ece   # those with one of these words in their name or file
    python scripts/mutants.py --jobs 4

A fault is killed if a named test fails, and has survived if all of them pass: then a test is missing. A fault whose old
text does not stand exactly once in its file is an error, so that the list keeps up with the code. The exit code is 0 if
every fault was killed. First the named tests run on the source as it is; there they must pass.

Each fault is tried in a fork of this process, which has imported the libraries (POSIX only). The step has faults of its
own in tests/unit/disam/test_mutants.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "scripts" / "mutants.yaml"
SECONDS = 300
"""How long the tests of one fault may take; a fault that makes them hang is killed."""

OUTCOMES = {0: "survived", 1: "killed", -signal.SIGALRM: "killed"}


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old``, which stands exactly once in ``file`` below the package, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str | None:
        """The source with the fault; None where it does not fit."""
        return source.replace(self.old, self.new) if source.count(self.old) == 1 else None


@dataclass(frozen=True)
class Result:
    mutant: Mutant | None
    outcome: str
    seconds: float
    output: str


def read_list() -> list[Mutant]:
    entries = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    names = [mutant.name for mutant in mutants]
    assert len(set(names)) == len(names), "two faults have one name"
    return mutants


def copy_project(folder: Path) -> Path:
    """Every file that git knows or would add, so that the tests' own processes import the copy too."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def start_tests(folder: Path, tests: tuple[str, ...], log: Path, seconds: int) -> int:
    """The pid of a fork that runs these tests in the copy; its exit code is pytest's."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.alarm(seconds)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        with log.open("w") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        import pytest

        # What a fault lets out of a test's folder stays in the scratch folder: other runs of the tests would find it.
        temporary = folder / "temporary" / "of" / "the" / "tests"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={temporary}"]
        code = int(pytest.main([*options, *tests]))
        imported = sys.modules.get("disam_peft")
        if imported is not None and not str(imported.__file__).startswith(str(folder)):
            code = 98  # the tests ran on another package
        sys.stdout.flush()
    finally:
        os._exit(code)


@contextlib.contextmanager
def changed(folder: Path, mutant: Mutant) -> Iterator[bool]:
    """The copy with the fault, for a while; False where the fault does not fit."""
    file = folder / "disam_peft" / mutant.file
    source = file.read_text(encoding="utf-8") if file.exists() else ""
    faulty = mutant.applied(source)
    if faulty is None:
        yield False
        return
    file.write_text(faulty, encoding="utf-8")
    try:
        yield True
    finally:
        file.write_text(source, encoding="utf-8")


def tried(
    mutant: Mutant | None, folder: Path, tests: tuple[str, ...], seconds: int = SECONDS
) -> Iterator[Result | None]:
    """None while the tests run, then the result."""
    begin, log = time.monotonic(), folder / "output-of-the-tests.txt"
    with contextlib.ExitStack() as stack:
        if mutant is not None and not stack.enter_context(changed(folder, mutant)):
            yield Result(mutant, "not applicable", 0.0, f"{mutant.old!r} does not stand once in {mutant.file}")
            return
        child = start_tests(folder, tests, log, seconds)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
            yield None
        shutil.rmtree(folder / "temporary", ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        outcome = OUTCOMES.get(code, f"did not run ({code})")
        yield Result(mutant, outcome, time.monotonic() - begin, log.read_text(errors="replace"))


def try_all(mutants: list[Mutant], jobs: int, scratch: Path) -> Iterator[Result]:
    folders = [copy_project(scratch / str(number)) for number in range(jobs)]
    waiting, running = list(reversed(mutants)), dict[Path, Iterator[Result | None]]()
    while waiting or running:
        for folder in folders:
            if folder not in running and waiting:
                mutant = waiting.pop()
                running[folder] = tried(mutant, folder, mutant.tests)
        for folder, attempt in list(running.items()):
            result = next(attempt)
            if result is not None:
                next(attempt, None)  # puts the source back
                del running[folder]
                yield result


def import_libraries() -> None:
    """Once for all forks; nothing of the project."""
    import accelerate
    import datasets
    import open_clip
    import peft
    import pytest
    import torch
    import torchvision
    import transformers

    loaded = (accelerate, datasets, open_clip, peft, pytest, torchvision, transformers)
    torch.set_num_threads(1)
    assert all(loaded) and "disam_peft" not in sys.modules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="words, separated by commas, of names or files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests on the source as it is first")
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]
    mutants = [m for m in read_list() if not words or any(word in m.name or word in m.file for word in words)]
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "scripts")]
    os.environ.pop("PYTHONPATH", None)
    import_libraries()
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        if not options.no_baseline:
            tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
            *_, result = tried(None, copy_project(Path(scratch) / "none"), tests, seconds=3600)
            if result is None or result.outcome != "survived":
                print(result.output if result else "", "\nthe tests fail without any fault", sep="")
                return 1
            print(f"the source as it is passes all {len(tests)} named tests ({result.seconds:.0f} s)", flush=True)
        for result in try_all(mutants, options.jobs, Path(scratch)):
            assert result.mutant is not None
            counts[result.outcome] = counts.get(result.outcome, 0) + 1
            print(
                f"{result.outcome:15} {result.seconds:5.0f} s  {result.mutant.file}: {result.mutant.name}", flush=True
            )
            if result.outcome != "killed":
                print("    " + "\n    ".join(result.output.strip().splitlines()[-3:]), flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())), "of", len(mutants))
    return 0 if set(counts) <= {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main())
