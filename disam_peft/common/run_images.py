"""``images.parquet``: which images a run trained on, chose its state by and was judged on, by their content."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args

from disam_peft.common.files import write_atomically
from disam_peft.errors import UserError

IMAGES = "images.parquet"
Part = Literal["training", "validation", "held_out", "test", "unused"]
PARTS: tuple[Part, ...] = get_args(Part)
MAX_IMAGES = 50_000_000
"""A file that claims more rows is not read: a few bytes can claim any number."""
_TEXTS = ("key", "content", "domain", "class_name", "part")
_OPTIONAL = ("given", "state")
_WORDS = b"class_words"


@dataclass(frozen=True)
class RunImages:
    """The images of a run, one entry of each column per image, in any order.

    Attributes:
        key: the permanent name of each image in its data set.
        content: sha256 of each file, 64 hex digits; ``size:BYTES`` where nobody has read the files.
        domain: the domain of the data, not one that was inferred.
        class_name: the class as in the source.
        part: what the run used the image for: ``training``, ``validation``, ``held_out`` or ``test``. ``unused`` are
            given test parts of the domains that it trained on, which belong to its data all the same.
        size: of each file in bytes.
        class_words: class as in the source -> its name in a prompt, for every class, also those without images.
        given: the part that the data themselves give, if the run used it: ``validation``, ``test``, or empty for what
            is to train or has no given part. None where the data give none, and in files of older versions.
        state: what the file system noted about each file, hashed; where nobody has read the files, it alone tells them
            from others of equal sizes. None elsewhere, and in files of older versions.
    """

    key: tuple[str, ...]
    content: tuple[str, ...]
    domain: tuple[str, ...]
    class_name: tuple[str, ...]
    part: tuple[Part, ...]
    size: tuple[int, ...]
    class_words: Mapping[str, str] = field(default_factory=dict)
    given: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.key)

    @property
    def is_hashed(self) -> bool:
        """Whether the content of every image is known, not only its size."""
        return not any(is_size(content) for content in self.content)

    @cached_property
    def identity(self) -> str:
        """sha256, hex, over what the data are: keys, contents, domains, classes and their names in prompts, and given
        parts. Neither the place of the files, nor their order, nor the parts that a run draws by its seed enter."""
        digest = hashlib.sha256(json.dumps(sorted(self.class_words.items())).encode())
        given = ("",) * len(self) if self.given is None else self.given
        rows = zip(self.key, self.content, self.domain, self.class_name, given, strict=True)
        for row in sorted(rows):
            told = row if row[-1] else row[:-1]  # without given parts as in older versions
            digest.update("\0".join(told).encode("utf-8", "surrogateescape") + b"\1")
        return digest.hexdigest()


def size_as_content(size: int) -> str:
    """What stands in place of a hash where nobody has read the files."""
    return f"size:{size}"


def is_size(content: str) -> bool:
    """Whether ``content`` stands in place of a hash."""
    return content.startswith("size:")


def write_images(path: Path, images: RunImages) -> None:
    """Replace ``path`` by these images; a reader sees the old file or the new one, never half of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.Array] = {name: pa.array(getattr(images, name), pa.string()) for name in _TEXTS}
    columns["size"] = pa.array(images.size, pa.int64())
    for name in _OPTIONAL:
        if getattr(images, name) is not None:
            columns[name] = pa.array(getattr(images, name), pa.string())
    words = {_WORDS: json.dumps(dict(images.class_words), ensure_ascii=False).encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(words), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def read_images(path: Path) -> RunImages:
    """The images of a run.

    Raises:
        UserError: no such file; it is damaged or holds something else (says what).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_IMAGES:
                raise UserError(f"{path} claims {file.metadata.num_rows} images; more than {MAX_IMAGES} are not read")
            schema, words = file.schema_arrow, (file.schema_arrow.metadata or {}).get(_WORDS, b"{}")
            kinds = {name: schema.field(name).type for name in schema.names}
            wanted = {**dict.fromkeys(_TEXTS, pa.string()), "size": pa.int64()}
            if not wanted.items() <= kinds.items():
                raise UserError(
                    f"{path} lacks some of the columns {', '.join(wanted)} (it has "
                    f"{', '.join(f'{name}: {kind}' for name, kind in kinds.items()) or 'none'})"
                )
            wanted |= {name: pa.string() for name in _OPTIONAL if kinds.get(name) == pa.string()}
            table = file.read(columns=list(wanted))
        columns = {name: table.column(name).to_pylist() for name in wanted}
        class_words = json.loads(words)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a run of version 0.1 has none") from error
    except (OSError, ValueError, pa.ArrowException, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as the images of a run ({error})") from error
    for name, values in columns.items():
        if None in values:
            raise UserError(f"{path} has no {name} in row {values.index(None)}")
    if unknown := set(columns["part"]) - set(PARTS):
        raise UserError(f"{path}: part {min(unknown)!r} is none of {', '.join(PARTS)}")
    if not isinstance(class_words, dict) or not all(isinstance(word, str) for word in class_words.values()):
        raise UserError(f"{path} names the classes in another way than class to words")
    texts = {name: tuple(cast("list[str]", columns[name])) for name in _TEXTS}
    return RunImages(
        key=texts["key"],
        content=texts["content"],
        domain=texts["domain"],
        class_name=texts["class_name"],
        part=cast("tuple[Part, ...]", texts["part"]),
        size=tuple(columns["size"]),
        class_words=class_words,
        **{name: tuple(columns[name]) for name in _OPTIONAL if name in columns},
    )
