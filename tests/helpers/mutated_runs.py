"""Finished and half-finished runs whose files were damaged, swapped or prepared by somebody hostile.

``mutations(path, draw)`` gives for one file of a run many versions that are wrong, each with a name and a function that
puts it in place; ``some_mutations`` draws a few of them. What a verb makes of it is ``outcome_of``: a result, an error
for the user, or a fault of ours.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from disam_peft.errors import UserError

Mutation = tuple[str, Callable[[Path], None]]
SECONDS = 60
"""Longer than any verb may take on a run of this size, whatever was done to it."""

_YAML_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_WHOLE = {
    "empty": b"",
    "blank": b"\n\n",
    "NUL": b"\0" * 100,
    "no UTF-8": b"\xff\xfe\xfa{}",
    "a list": b"[]",
    "a list of lists": b"[[[]]]",
    "a mapping": b"{}",
    "null": b"null",
    "a number": b"17",
    "a text": b'"text"',
    "deep lists": b"[" * 100_000,
    "deep mappings": b'{"a":' * 50_000,
    "many lists": b"[" + b"[]," * 3_000_000 + b"[]]",
    "a tag": b'!!python/object/apply:os.system ["true"]\n',
    "aliases": _YAML_BOMB.encode(),
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
}
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        "x",
        "",
        -1,
        0,
        10**18,
        1e300,
        -1e300,
        0.5,
        [],
        {},
        [[]],
        {"a": 1},
        "\0",
        "../../../x",
        "x" * 100_000,
    ),
    *("\x1b[31m", "NaN", [None] * 3, ["x", "x"], 2**63),
)


def _replace(place: Path, content: bytes) -> None:
    place.write_bytes(content)


def _replaced_by(content: bytes) -> Callable[[Path], None]:
    return lambda place: _replace(place, content)


_WHOLE_FILES: tuple[Mutation, ...] = (
    *((name, _replaced_by(content)) for name, content in _WHOLE.items()),
    ("8 GiB", lambda place: os.truncate(place, 8 * 2**30)),
    ("missing", Path.unlink),
    ("a folder", lambda place: (place.unlink(), place.mkdir())[0]),
    ("a pipe", lambda place: (place.unlink(), os.mkfifo(place))[0]),
)


def mutations(path: Path, draw: random.Random) -> Iterator[Mutation]:
    """Versions of this file without end: first each whole replacement, then changes inside, as drawn."""
    yield from _WHOLE_FILES
    while True:
        yield _inside(path, draw)


def some_mutations(path: Path, draw: random.Random, count: int) -> Iterator[Mutation]:
    """``count`` versions of this file: whole replacements for one half, or all of them if they are fewer, and changes
    inside for the rest."""
    whole = draw.sample(_WHOLE_FILES, min(count // 2, len(_WHOLE_FILES)))
    inside = (_inside(path, draw) for _ in range(count - len(whole)))
    return chain(whole, inside)


def _inside(path: Path, draw: random.Random) -> Mutation:
    content = path.read_bytes()
    kind = draw.choice(["bits", "cut", "zeros", "twice", "words", "values", "values", "values"])
    at = draw.randrange(max(1, len(content)))
    if kind == "bits":
        return f"bit flipped at {at}", lambda place: _replace(place, _flipped(content, at, draw.randrange(8)))
    if kind == "cut":
        return f"cut at {at}", lambda place: _replace(place, content[:at])
    if kind == "zeros":
        return f"zeros from {at}", lambda place: _replace(place, content[:at] + b"\0" * (len(content) - at))
    if kind == "twice":
        return "its content twice", lambda place: _replace(place, content + content)
    if kind == "words":
        old, new = draw.choice([(b"1", b"NaN"), (b"0.", b"1e999"), (b": ", b": ["), (b"\n", b"\r"), (b'"', b"'")])
        return f"{old!r} as {new!r}", lambda place: _replace(place, content.replace(old, new))
    changed = _changed_values(path, content, draw)
    return f"values {changed[-400:]!r}", lambda place: _replace(place, changed)


def _changed_values(path: Path, content: bytes, draw: random.Random) -> bytes:
    """The same file with one to three values inside taken out, exchanged or doubled; of binary files, a few bytes."""
    try:
        if path.suffix == ".jsonl":
            lines = content.splitlines()
            number = draw.randrange(len(lines))
            lines[number] = json.dumps(_exchanged(json.loads(lines[number]), draw)).encode()
            return b"\n".join(lines) + b"\n"
        if path.suffix == ".yaml":
            import yaml

            return yaml.safe_dump(_exchanged(yaml.safe_load(content), draw), sort_keys=False).encode()
        value = json.loads(content)
    except ValueError:
        at = draw.randrange(max(1, len(content) - 8))
        return content[:at] + draw.randbytes(8) + content[at + 8 :]
    for _ in range(draw.randint(1, 3)):
        value = _exchanged(value, draw)
    return json.dumps(value, indent=1).encode()


def _exchanged(value: Any, draw: random.Random) -> Any:
    """``value`` with something inside it exchanged. Strings are few among its values, so that all depths are met."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.03:
        return draw.choice(_VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw.choice(keys)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    action = draw.random()
    if action < 0.1:
        del copy[key]
    elif action < 0.15 and isinstance(copy, list):
        copy.append(copy[key])
    elif action < 0.15:
        copy[draw.choice(["later", "", "../x", "\0"])] = draw.choice(_VALUES)
    else:
        copy[key] = _exchanged(value[key], draw)
    return copy


def _flipped(content: bytes, at: int, bit: int) -> bytes:
    return content if not content else content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


class Outcome(NamedTuple):
    """What a verb made of a run, and after how many seconds. ``text`` is the message of an error, or the traceback."""

    kind: Literal["result", "error", "fault"]
    text: str
    seconds: float


class HangsError(BaseException):
    """No ``except Exception`` stops it."""


def outcome(verb: Callable[[], Any]) -> Outcome:
    """A fault is any end but a result, or an error for the user, in time."""
    start = time.perf_counter()
    kind: Literal["result", "error", "fault"] = "result"
    text = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _interrupted_after(SECONDS):
                verb()
        except UserError as error:
            kind, text = "error", str(error)
            if not text:
                kind, text = "fault", "an error without a message"
            elif len(text) > 10_000:
                kind, text = "fault", f"a message of {len(text)} characters"
        except BaseException:
            kind, text = "fault", traceback.format_exc()
    seconds = time.perf_counter() - start
    if kind != "fault" and seconds > SECONDS:
        kind, text = "fault", f"took {seconds:.0f} s"
    return Outcome(kind, text, seconds)


def outcome_of(verb: Callable[[], Any]) -> str:
    """Empty where the verb gave a result or an error for the user, in time; else what is wrong with it."""
    found = outcome(verb)
    return found.text if found.kind == "fault" else ""


@contextmanager
def _interrupted_after(seconds: int) -> Iterator[None]:
    """What waits for a pipe that nobody writes would wait for ever, and show nobody where."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise HangsError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_of(folder: Path) -> list[Path]:
    """The files of a run, by name, without locks and drafts."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def fresh_copy(folder: Path, to: Path) -> Path:
    """A copy of ``folder`` at ``to``, whatever was there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to
