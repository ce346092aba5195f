"""Files of a Hugging Face repository: from the cache if they are there, and otherwise fetched or refused quickly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError

PATIENCE_SECONDS = 8.0
"""How long the hub may take to answer before it counts as out of reach."""

FileGroup = Sequence[str]
"""Patterns that must each match a file of the repository."""

TOKENIZER_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "config.json")

Result = TypeVar("Result")


def hub_folder(
    repo: str, choices: Sequence[FileGroup], *, revision: str | None = None, optional: Sequence[str] = ()
) -> Path:
    """The local folder with the files of the first group in ``choices`` that the repository can satisfy.

    A group that is in the cache completely is taken without asking the network, so a cached model loads offline
    and at once; a moved branch is noticed only when the cache is emptied or ``revision`` changed.

    Args:
        repo: ``OWNER/NAME``.
        choices: groups of file patterns, best first.
        revision: branch, tag or commit; None is the default branch.
        optional: patterns that are fetched along if the repository has them.

    Raises:
        UserError: no such repository, revision or files in it, or not cached and the hub does not answer.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cached = _cached_snapshot(repo, revision)
    held: list[str] = []
    if cached is not None:
        held = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        if any(_satisfied(group, held) for group in choices):
            return cached

    wanted = " or ".join(" + ".join(group) for group in choices)
    at = "" if revision is None else f" at revision '{revision}'"
    missing = min(([one for one in group if not _satisfied([one], held)] for group in choices), key=len)
    try:
        info = _within(
            PATIENCE_SECONDS,
            lambda: HfApi().model_info(repo, revision=revision, timeout=PATIENCE_SECONDS),
        )
        held = [sibling.rfilename for sibling in info.siblings or []]
        group = next((group for group in choices if _satisfied(group, held)), None)
        if group is not None:
            # By name, not by commit: the cache then remembers which commit the branch pointed to.
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[*group, *optional]))
    except GatedRepoError as error:
        raise UserError(
            f"hub repository '{repo}' asks you to accept its terms first: do so on its page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"hub repository '{repo}' does not exist, or is private and you are not logged in; "
            "check the spelling or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"hub repository '{repo}' has no revision '{revision}'") from error
    except HFValidationError as error:
        raise UserError(f"'{repo}' is neither a folder nor a hub id of the form OWNER/NAME") from error
    except (OSError, HTTPError) as error:
        which = "" if revision is None else f" --revision {revision}"
        more = f" (nor {', '.join(missing[1:])})" if missing[1:] else ""
        raise UserError(
            f"{missing[0]} of '{repo}'{at} is missing: with a connection, run `hf download {repo}{which}` beforehand, "
            f"or copy its cache folder here. It is not in the cache {constants.HF_HUB_CACHE}{more}, which HF_HOME or "
            f"HF_HUB_CACHE can move, and {constants.ENDPOINT} does not answer ({_first_line(error)})"
        ) from error
    pickled = [name for name in held if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise UserError(
            f"hub repository '{repo}'{at} has no {wanted}; its pickled weights ({pickled[0]}) could run code and "
            "are not loaded: choose a repository or a revision with safetensors (often one of its pull requests, "
            "backbone.revision: refs/pr/N)"
        )
    raise UserError(f"hub repository '{repo}'{at} has no {wanted} (it has: {', '.join(sorted(held)[:8])})")


def fetch_text_files(text_config: dict[str, Any]) -> Path | None:
    """Have what a foreign text tower (open_clip's ``text_cfg``) takes from the hub in the cache, before its own loader
    waits for it.

    Returns:
        the folder with the files of its tokenizer; None where that is open_clip's own.

    Raises:
        UserError: as ``hub_folder``.
    """
    tower, tokenizer = text_config.get("hf_model_name"), text_config.get("hf_tokenizer_name")
    if tower and not Path(tower).is_dir():
        hub_folder(tower, [["config.json"]])
    if not tokenizer:
        return None
    if Path(tokenizer).is_dir():
        return Path(tokenizer)
    # A vocabulary alone does not say how texts are cut, padded and ended: one of the configs does.
    choices = [[vocabulary, config] for config in TOKENIZER_CONFIGS for vocabulary in TOKENIZER_VOCABULARIES]
    return hub_folder(tokenizer, choices, optional=["*token*.json", "config.json"])


def require_safetensors(path: Path) -> None:
    """Raises UserError for a weights file of any other format."""
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is not a safetensors file: pickled weights could run code and are not loaded; convert it where "
            "you trust it (torch.load with weights_only=True, then safetensors.torch.save_file)"
        )


@contextmanager
def loading_tokenizer(name: str) -> Iterator[None]:
    """Around the loading of a tokenizer of transformers: what it raises becomes a UserError of one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ImportError) and "sentencepiece" in str(error).lower():
            raise UserError(
                f"the tokenizer of '{name}' needs the package sentencepiece: `pip install sentencepiece protobuf`"
            ) from error
        raise UserError(
            f"the tokenizer of '{name}' does not load ({type(error).__name__}: {_first_line(error)}); with a "
            "connection, fetch all its files with `hf download`, or install the library that it needs"
        ) from error


def refuse_file_settings(config: BackboneConfig) -> None:
    """Raises UserError for settings of a bare weights file where the weights are something else."""
    for name in ("activation", "preprocessing"):
        if getattr(config, name) is not None:
            raise UserError(
                f"backbone.{name} has no meaning with '{config.name}' and backbone.pretrained "
                f"'{config.pretrained}': only a safetensors file cannot say it itself; leave it out"
            )


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Without patterns a snapshot fetched in part counts as incomplete; what is needed is checked by the caller.
        nothing_else = ["*"]
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, ignore_patterns=nothing_else))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _satisfied(group: FileGroup, held: Sequence[str]) -> bool:
    return all(any(fnmatchcase(name, pattern) for name in held) for pattern in group)


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """``call()``, or TimeoutError: a client's own timeout covers neither name lookup nor several addresses."""
    results: list[Result] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
