"""YAML from anybody: plain values only, no key twice, and no aliases that unfold into more than memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from disam_peft.errors import UserError, nearest

MAX_CHARACTERS = 4 * 2**20
_MERGE, _VALUE = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"
MAX_FILE_BYTES = 512 * 2**10
"""Of a recipe or study; its reader, which names the line of a mistake, takes seconds for this much."""
MAX_VALUES = 200_000
"""With every alias written out; a handful of lines can otherwise stand for billions."""


def parse_yaml(text: str, where: str, *, as_text: bool | Literal["keys"] = False) -> Any:
    """The value of a YAML document; ``where`` begins the messages.

    Args:
        as_text: numbers, dates and words such as ``true`` and ``null`` are the texts that stand there, for they may be
            names; or those that are keys. Only what is empty, or ``~``, is None.

    Raises:
        UserError: not YAML, a tag that would build objects, a key given twice, too large.
    """
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where} has {len(text)} characters; more than {MAX_CHARACTERS} are not read, shorten it")
    try:
        content = yaml.load(text, _loader(as_text))
        count = _count(content, {})
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # dates and numbers that there are not; depth
        raise UserError(f"{where} is not valid YAML: {type(error).__name__}: {error}") from error
    if count > MAX_VALUES:
        raise UserError(f"{where} holds more than {MAX_VALUES} values once its aliases (*name) are written out")
    return content


def _loader(as_text: bool | Literal["keys"]) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what YAML itself forbids and its reader lets pass, the same key twice in one mapping; and merges
        (``<<``) that grow faster than the file."""

        merged = 0

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)
            is_plain = as_text is True and kind is yaml.ScalarNode and implicit[0] and value not in ("", "~")
            return tag if not is_plain or tag == _MERGE else self.DEFAULT_SCALAR_TAG

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if as_text == "keys" and key.style is None and key.tag != _MERGE and key.value not in ("", "~"):
                        key.tag = self.DEFAULT_SCALAR_TAG
                    if key.value in seen:
                        raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} twice", key.start_mark)
                    seen.add(key.value)
                    if key.value == "<<" and isinstance(value, yaml.SequenceNode):
                        raise yaml.composer.ComposerError(None, None, "merge one mapping, no list", key.start_mark)
            return node

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            self.merged += len(node.value)
            if self.merged > MAX_VALUES:
                raise yaml.constructor.ConstructorError(None, None, "merges of too many keys", node.start_mark)

    for tag in (_MERGE, _VALUE):  # << and = have a meaning as keys alone; a value may be called so
        Loader.yaml_constructors = {**Loader.yaml_constructors, tag: yaml.SafeLoader.construct_yaml_str}
    return Loader


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in ``value``, those behind aliases as often as they are used, without walking through them again."""
    if isinstance(value, str):
        value.encode()  # half a character, written as an escape, is no text
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = MAX_VALUES + 1  # met again inside itself, it has no end
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    known[id(value)] = 1 + sum(_count(item, known) for item in inner)
    return known[id(value)]


def read_yaml(path: Path, what: str, *, as_text: bool = False) -> dict[str, Any]:
    """The keys and values of a YAML file, see ``parse_yaml``; ``what`` it is goes into the messages.

    Raises:
        UserError: no such file, too large, not YAML, no keys at the top.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"{path} has more than {MAX_FILE_BYTES} bytes, too many for a {what}; shorten it")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}{_files_near(path)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}); save it as such") from error
    values = parse_yaml(text, str(path), as_text=as_text)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values at the top, found {type(values).__name__}")
    return values


def _files_near(path: Path) -> str:
    """What may have been meant by a path that leads nowhere: names like it, or the YAML files that there are."""
    if path.exists():
        return ""
    place = path
    while not place.parent.is_dir():
        place = place.parent
    folder = place.parent
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() or entry.suffix in (".yaml", ".yml"))
    by_stem = {entry.stem: entry.name for entry in found}  # the suffix makes all files look alike
    near = [by_stem[stem] for stem in nearest(place.stem, by_stem)]
    if near:
        return f"; did you mean {' or '.join(repr(name) for name in near)}?"
    files = [entry.name for entry in found if entry.is_file()]
    if not files:
        return f"; {folder} has no YAML files"
    return f"; {folder} has {', '.join(files[:10])}{', ...' if len(files) > 10 else ''}"
