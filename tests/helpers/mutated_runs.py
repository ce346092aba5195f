"""Finished and half-finished runs whose files were damaged, swapped or prepared by somebody hostile.

``mutations(path, draw)`` gives for one file of a run many versions that are wrong, each with a name; ``apply`` puts one
in place. What a verb makes of it is ``outcome_of``: a result, an error for the user, or a fault of ours.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def mutations(path: Path, draw: random.Random) -> Iterator[Mutation]:
    """Versions of this file without end: first each whole replacement, then changes inside, as drawn."""
    for name, content in _WHOLE.items():
        yield name, lambda place, content=content: _replace(place, content)
    yield "8 GiB", lambda place: os.truncate(place, 8 * 2**30)
    yield "missing", Path.unlink
    yield "a folder", lambda place: (place.unlink(), place.mkdir())[0]
    yield "a pipe", lambda place: (place.unlink(), os.mkfifo(place))[0]
    while True:
        yield _inside(path, draw)


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


def _replace(place: Path, content: bytes) -> None:
    place.write_bytes(content)


def outcome_of(verb: Callable[[], Any]) -> str:
    """Empty where the verb gave a result or an error for the user, in time; else what is wrong with it."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            verb()
        except UserError as error:
            if not str(error):
                return "an error without a message"
            if len(str(error)) > 10_000:
                return f"a message of {len(str(error))} characters"
        except BaseException:
            return traceback.format_exc()
    seconds = time.perf_counter() - start
    return "" if seconds < SECONDS else f"took {seconds:.0f} s"


def files_of(folder: Path) -> list[Path]:
    """The files of a run, by name, without locks and drafts."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def fresh_copy(folder: Path, to: Path) -> Path:
    """A copy of ``folder`` at ``to``, whatever was there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to
