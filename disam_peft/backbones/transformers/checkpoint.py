"""Where a transformers CLIP comes from: a local folder or a hub repository, and its weights.

``clip.py`` makes a backbone of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import Filter, LogRecord
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from disam_peft.backbones.hub import hub_folder, refuse_file_settings
from disam_peft.backbones.transformers.architectures import ARCHITECTURES, WITHOUT_ONE_SIZE, Architecture
from disam_peft.config.backbone import RANDOM_WEIGHTS, BackboneConfig
from disam_peft.errors import UserError

WEIGHTS = "model*.safetensors"
PROCESSOR = "*processor_config.json"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("*.model",))
"""Files of which a tokenizer needs one group; ``*.model`` is sentencepiece's."""


def require_known(config: BackboneConfig) -> None:
    """Pass if there is such a folder, as far as can be told without fetching or loading anything.

    Raises:
        UserError: there is none, or it holds something else.
    """
    folder = Path(config.name).expanduser()
    on_hub = not folder.is_dir() and not config.name.startswith((".", "~", "/")) and config.name.count("/") <= 1
    if not on_hub or config.pretrained not in (None, RANDOM_WEIGHTS):
        checkpoint_folder(config)


def checkpoint_folder(config: BackboneConfig) -> Path:
    refuse_file_settings(config)
    if config.pretrained not in (None, RANDOM_WEIGHTS):
        raise UserError(
            f"backbone.pretrained '{config.pretrained}' has no meaning for transformers, where backbone.name says "
            f"which weights: leave it out (or 'random' for random weights)"
        )
    folder = Path(config.name).expanduser()
    weights = [] if config.pretrained == RANDOM_WEIGHTS else [WEIGHTS]
    if folder.is_dir():
        if config.revision is not None:
            raise UserError(
                f"backbone.revision '{config.revision}' has no meaning with the folder '{folder}': only hub "
                "repositories have revisions; leave it out"
            )
        _check_folder(folder, weights)
    elif folder.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise UserError(f"there is no folder '{folder}'; a hub id has the form OWNER/NAME")
    else:
        common = ["config.json", PROCESSOR, *weights]
        folder = hub_folder(
            config.name,
            [[*common, *vocabulary] for vocabulary in VOCABULARIES],
            revision=config.revision,
            optional=["*.json", "*.txt", "*.model"],  # some tokenizers read sentencepiece's file whatever else is there
        )
    architecture_of(folder, config.name)
    return folder


def _check_folder(folder: Path, weights: list[str]) -> None:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and any(not list(folder.glob(pattern)) for pattern in weights):
        raise UserError(
            f"{folder} has only pickled weights ({pickled[0]}), which could run code and are not loaded; convert "
            "them where you trust them (AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors)"
        )
    missing = [pattern for pattern in ("config.json", PROCESSOR, *weights) if not list(folder.glob(pattern))]
    if not any(all(list(folder.glob(name)) for name in vocabulary) for vocabulary in VOCABULARIES):
        missing.append("tokenizer.json (or vocab.json + merges.txt, vocab.txt, or a sentencepiece *.model)")
    if missing:
        raise UserError(
            f"{folder} is not a complete transformers CLIP: no {', '.join(missing)}; save model, image processor "
            "and tokenizer there (save_pretrained of each)"
        )


def architecture_of(folder: Path, name: str) -> Architecture:
    """What the config in the folder says that the model is.

    Raises:
        UserError: it is no config, or of a model that is not supported.
    """
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is not a transformers config: {error}") from error
    if model_type == WITHOUT_ONE_SIZE:
        raise UserError(
            f"backbone '{name}' is a Siglip2Model (NaFlex): it takes images of any size as lists of patches, which is "
            "not supported; use a SigLIP 2 of one image size, such as google/siglip2-base-patch16-224, which "
            "transformers loads as a SiglipModel"
        )
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"backbone '{name}' is a transformers model of type '{model_type}'; supported are "
            f"{', '.join(ARCHITECTURES)} (many others have an open_clip version: backbone.family: open_clip)"
        )
    return ARCHITECTURES[model_type]


def load_model(folder: Path, config: BackboneConfig, architecture: Architecture) -> Any:
    """The model in float32. Its attention is torch's, of which blocks that are computed in another way give the result.

    Raises:
        UserError: the weights cannot be read, or are not those of the whole model.
    """
    kind = architecture.model
    if config.pretrained == RANDOM_WEIGHTS:
        with torch.random.fork_rng(devices=[]), without_chatter():
            torch.manual_seed(config.seed)
            return kind(kind.config_class.from_pretrained(folder, attn_implementation="sdpa"))
    try:
        with without_chatter():
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} do not load as a {kind.__name__}: {error}") from error
    model, report = loaded
    # transformers would go on with random values in their place.
    wrong = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if wrong:
        raise UserError(
            f"the weights in {folder} do not fit its config: {len(wrong)} are missing or of another shape "
            f"({', '.join(wrong[:3])}, ...); is it the folder of a whole {kind.__name__}?"
        )
    return model


@contextmanager
def without_chatter() -> Iterator[None]:
    """transformers shows a bar for every file that it reads or writes, and warns of ids in SigLIP's default config that
    nothing here reads: both between the lines of the program."""
    shown = logging.is_progress_bar_enabled()
    of_configs = logging.get_logger("transformers.configuration_utils")
    logging.disable_progress_bar()
    of_configs.addFilter(filtered := _NotOfIds())
    try:
        yield
    finally:
        of_configs.removeFilter(filtered)
        if shown:
            logging.enable_progress_bar()


class _NotOfIds(Filter):
    def filter(self, record: LogRecord) -> bool:
        return "_token_id must be `None` or an integer within the vocabulary" not in record.getMessage()
