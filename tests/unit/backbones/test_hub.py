"""Files from a hub that answers, does not answer, or does not have them; without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from open_clip import factory

from disam_peft.backbones import hub
from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import UserError
from tests.helpers.tiny import tiny_openclip_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(cache: Path, *names: str) -> Path:
    repository = cache / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


def answer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A hub that knows one repository with these files."""
    files = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files, sha=COMMIT))


def test_the_first_complete_choice_in_the_cache_is_taken(cache: Path) -> None:
    snapshot = put_in_cache(cache, "config.json", "b.bin")
    assert hub.hub_folder("owner/tiny", [["config.json", "*.safetensors"], ["config.json", "*.bin"]]) == snapshot
    assert hub.hub_folder("owner/tiny", [["config.json"]], revision=COMMIT) == snapshot


def test_row_18_not_cached_and_offline(cache: Path) -> None:
    put_in_cache(cache, "config.json")
    with pytest.raises(UserError) as caught:
        hub.hub_folder("owner/tiny", [["config.json", "*.safetensors"]], revision="v2")
    message = str(caught.value)
    assert message.startswith("config.json of 'owner/tiny' at revision 'v2' is missing: with a connection, run `hf ")
    for part in ("*.safetensors", "'owner/tiny'", str(cache), "hf download owner/tiny --revision v2", "HF_HOME"):
        assert part in message


def test_row_18_the_one_file_that_is_missing_comes_first(cache: Path) -> None:
    put_in_cache(cache, "config.json", "vocab.json")
    choices = [["config.json", "tokenizer.json"], ["config.json", "vocab.json", "merges.txt"], ["a.txt", "b.txt"]]
    for order in (choices[:1], choices[1:], choices[1:][::-1]):
        with pytest.raises(UserError) as caught:
            hub.hub_folder("owner/tiny", order)
        wanted = "tokenizer.json" if order == choices[:1] else "merges.txt"
        assert str(caught.value).startswith(f"{wanted} of 'owner/tiny' is missing: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "ViT-B-32-quickgelu", "pretrained": "openai"},
        {"name": "hf-hub:owner/tiny"},
        {"family": "transformers", "name": "openai/clip-vit-base-patch32"},
    ],
)
def test_row_18_offline_in_every_form_of_name(cache: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=rf"^[^ ]+ of '.*' is missing: with a .*`hf download.*cache {cache}.*does not answer"
    ):
        load_backbone(BackboneConfig(**fields))


def tokenizer_files(folder: Path, *without: str) -> None:
    """A tokenizer as it is left in the cache of a repository that has no config.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(["a photo of a circle.", "a star"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    for name in without:
        (folder / name).unlink()


@pytest.fixture
def with_foreign_tokenizer(monkeypatch: pytest.MonkeyPatch) -> BackboneConfig:
    """A tiny model that open_clip knows as 'tiny-siglip', with the tokenizer of the repository owner/tiny."""
    text = {"hf_tokenizer_name": "owner/tiny", "vocab_size": 80, "context_length": 24}
    text |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "pool_type": "last", "no_causal_mask": True}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-siglip", tiny_openclip_config(text_cfg=text))
    return BackboneConfig(name="tiny-siglip", pretrained="random")


def test_row_18_a_tokenizer_without_the_config_of_a_model_works(cache: Path, with_foreign_tokenizer) -> None:
    tokenizer_files(put_in_cache(cache))
    with pytest.warns(UserWarning, match="RANDOM"):
        backbone = load_backbone(with_foreign_tokenizer)
    tokens = backbone.tokenize(["A Photo of a circle!", "a photo of a circle", "a star"])
    assert tokens.shape == (3, 24) and tokens[0].tolist() == tokens[1].tolist() != tokens[2].tolist()


@pytest.mark.parametrize("without", ["tokenizer.json", "tokenizer_config.json"])
def test_row_18_a_tokenizer_in_part_is_one_line(cache: Path, with_foreign_tokenizer, without: str) -> None:
    tokenizer_files(put_in_cache(cache), without)
    with pytest.warns(UserWarning, match="RANDOM"), pytest.raises(UserError) as caught:
        load_backbone(with_foreign_tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{without} of 'owner/tiny' is missing: with a connection, run `hf download owner/tiny`")
    assert "\n" not in message


def test_row_18_a_damaged_tokenizer_is_one_line(cache: Path, with_foreign_tokenizer) -> None:
    folder = put_in_cache(cache)
    tokenizer_files(folder)
    (folder / "tokenizer.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="RANDOM"),
        pytest.raises(UserError, match="of 'tiny-siglip' does not load") as caught,
    ):
        load_backbone(with_foreign_tokenizer)
    assert "\n" not in str(caught.value)


CLOSED_PORT = """
import time
from disam_peft.backbones import hub
from disam_peft.errors import UserError
start = time.monotonic()
try:
    hub.hub_folder("owner/tiny", [["config.json"]])
except UserError as error:
    assert "http://127.0.0.1:9 does not answer" in str(error), error
    print(time.monotonic() - start)
"""


def test_row_18_nobody_listens_at_the_endpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(hub.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_PORT], check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert float(done.stdout) < 10


def test_row_18_a_hub_that_never_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.PATIENCE_SECONDS < 10
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"does not answer \(no answer within 0\.2 s\)"):
        hub.hub_folder("owner/tiny", [["config.json"]])
    assert time.monotonic() - start < 3


def test_what_the_hub_has_is_fetched_by_the_first_choice_it_satisfies(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, "config.json", "model.bin", "extra.txt")
    calls: list[dict[str, Any]] = []

    def download(repo: str, **arguments: Any) -> str:
        if arguments.get("local_files_only"):
            return str(put_in_cache(cache, "other.txt"))
        calls.append({"repo": repo, **arguments})
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    choices = [["config.json", "*.safetensors"], ["config.json", "*.bin"]]
    assert hub.hub_folder("owner/tiny", choices, optional=["*.txt"]) == cache
    assert calls == [{"repo": "owner/tiny", "revision": None, "allow_patterns": ["config.json", "*.bin", "*.txt"]}]


def test_a_repository_with_pickled_weights_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "config.json", "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\).*revision: refs/pr/N"):
        hub.hub_folder("owner/tiny", [["config.json", "model*.safetensors"]])


def test_a_repository_without_the_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "README.md", "data.csv")
    with pytest.raises(UserError, match=r"has no config\.json \(it has: README\.md, data\.csv\)"):
        hub.hub_folder("owner/tiny", [["config.json"]])


def test_what_is_no_hub_id(cache: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        hub.hub_folder("not a hub id", [["config.json"]])
