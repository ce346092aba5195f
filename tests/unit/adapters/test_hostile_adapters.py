"""Adapters from strangers: whatever stands in their files, an error of the user's kind and nothing done."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import struct
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disam_peft.adapters import manifest as manifest_module
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.errors import UserError
from tests.helpers.adapter_cells import tiny_backbone, tiny_classifier

TENSORS, RECORD, PEFT_CONFIG = "adapter_model.safetensors", "disam_peft.json", "adapter_config.json"
CELLS = ("lora-image", "dora", "oft", "coop-shared", "coop-class", "probe-zero_shot", "clip_adapter")


@pytest.fixture(scope="module")
def backbone(twins: tuple[str, str]) -> ClipBackbone:
    """Shared: every refusal must leave it as it was, or the next test fails."""
    return tiny_backbone(twins, "transformers", torch.float32)


@pytest.fixture(scope="module")
def saved(twins: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for cell in CELLS:
        folders[cell] = tmp_path_factory.mktemp("saved") / cell
        classifier = tiny_classifier(tiny_backbone(twins, "transformers", torch.float32), cell)
        save_adapter(folders[cell], classifier, trained_with={"recipe": {"rho": 0.05}})
    return folders


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["lora-image"], tmp_path / "adapter"))


def refused(folder: Path, backbone: ClipBackbone, message: str) -> None:
    before = {name: type(module) for name, module in backbone.model.named_modules()}
    with pytest.raises(UserError, match=message):
        load_adapter(folder, backbone)
    assert {name: type(module) for name, module in backbone.model.named_modules()} == before


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- the JSON files ------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**9, 10**30, -(10**30), 1e308, "", "x", "../../etc/passwd", "/etc/passwd", "os.system",
    "a" * 10_000, [], ["q"] * 3, {}, {"a": 1}, [[[]]], "\u0000", "\ud800", "{0.__class__}", 2**63, 2**62, 65_536,
    {"last": 10**12}, [10**30], [0] * 10_000, ".*", "(a+)+$",
)  # fmt: skip
KEYS = ("auto_mapping", "target_modules", "kind", "rank", "options", "model_config", "config", "trust_remote_code")


def places(content: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here]
    if isinstance(content, dict):
        for key in content:
            found += places(content[key], (*here, key))
    elif isinstance(content, list):
        for number in range(min(3, len(content))):
            found += places(content[number], (*here, number))
    return found


def distort(content: Any, rng: Random) -> Any:
    """One value set, removed or added, anywhere."""
    content = copy.deepcopy(content)
    place = rng.choice(places(content)[1:])
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    action = rng.choice(["set", "set", "remove", "add"])
    if action == "remove":
        del parent[place[-1]]
    elif action == "add" and isinstance(parent, dict):
        parent[rng.choice(KEYS)] = rng.choice(VALUES)
    else:
        parent[place[-1]] = rng.choice(VALUES)
    return content


@pytest.mark.slow
def test_row_42_distorted_json_is_an_error_or_harmless(
    saved: dict[str, Path], backbone: ClipBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_adapter(saved["lora-image"], backbone).adapter.detach(backbone)
    modules, compiled = set(sys.modules), []
    compile_pattern = re.compile
    monkeypatch.setattr(re, "compile", lambda *given, **kw: compiled.append(given[0]) or compile_pattern(*given, **kw))
    refusals = 0
    for seed in range(240):
        rng = Random(seed)
        folder = Path(shutil.copytree(saved[rng.choice(CELLS)], tmp_path / str(seed)))
        path = folder / rng.choice([RECORD, RECORD, PEFT_CONFIG])
        path = path if path.is_file() else folder / RECORD
        path.write_text(json.dumps(distort(json.loads(path.read_text()), rng)))
        try:
            classifier = load_adapter(folder, backbone)
        except UserError:
            refusals += 1
        else:
            assert classifier.adapter is not None
            classifier.adapter.detach(backbone)
        shutil.rmtree(folder)
    assert 120 < refusals < 240, "most are refused; what a record merely tells may say anything"
    assert {name for name in set(sys.modules) - modules if not name.startswith(("peft", "transformers"))} == set()
    assert not {".*", "(a+)+$"} & set(compiled)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"versions": {', b'"versions": {"peft": "1", "peft": "2", ', "the key 'peft' is there twice"),
        (b'"rank":', b'"rank": 1, "rank":', "the key 'rank' is there twice"),
        (b"{", b'{"x": NaN, ', "NaN is no number"),
        (b"{", b'{"x": -Infinity, ', "-Infinity is no number"),
        (b"{", b'{"x": 1e999, ', "1e999 is no number"),
        (b"{", b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b", ", "is not valid JSON"),
        (b"{", b'{"x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b", ", "is not valid JSON"),
        (b"{", b'{"x": ' + b"1" * 5_000 + b", ", "is not valid JSON"),
        (b"{", b'{"x": "\xff\xfe", ', "is not valid JSON"),
        (b"{", b'{"x": "\\ud800", ', "is not valid JSON.*surrogates"),
    ],
)
def test_row_42_json_that_other_readers_take(
    folder: Path, backbone: ClipBackbone, old: bytes, new: bytes, message: str
) -> None:
    tried = 0
    for name in (PEFT_CONFIG, RECORD):
        content = (folder / name).read_bytes()
        if old in content:
            (folder / name).write_bytes(content.replace(old, new, 1))
            refused(folder, backbone, message)
            (folder / name).write_bytes(content)
            tried += 1
    assert tried == (2 if old == b"{" else 1)


@pytest.mark.parametrize(
    ("cell", "config", "message"),
    [
        ("lora-image", {"rank": 5_000}, "less than or equal to 4096"),
        ("lora-image", {"rank": 4_000}, "needs 4608000 numbers by its config and classes, but .* holds 2304"),
        ("lora-image", {"blocks": {"last": 10**12}}, r"blocks last: 1000000000000 do not all exist"),
        ("lora-image", {"seed": -1}, "config.lora.seed"),
        ("lora-image", {"seed": 2**64}, "config.lora.seed"),
        ("dora", {"options": {"r": 10**7}}, "option 'r' of peft method 'dora' is 10000000, beyond 4096"),
        ("oft", {"options": {"num_cayley_neumann_terms": 10**9}}, "beyond 4096"),
        ("coop-shared", {"context_tokens": 10**9}, "takes 77"),
    ],
)
def test_row_40_a_config_cannot_ask_for_all_memory(
    saved: dict[str, Path], backbone: ClipBackbone, tmp_path: Path, cell: str, config: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(saved[cell], tmp_path / "adapter"))
    (folder / PEFT_CONFIG).unlink(missing_ok=True)
    record = json.loads((folder / RECORD).read_text())
    edit(folder / RECORD, config={**record["config"], **config})
    refused(folder, backbone, message)


@pytest.mark.parametrize("cell", ["coop-class", "probe-zero_shot"])
def test_row_40_classes_that_the_file_has_no_numbers_for(
    saved: dict[str, Path], backbone: ClipBackbone, tmp_path: Path, cell: str
) -> None:
    folder = Path(shutil.copytree(saved[cell], tmp_path / "adapter"))
    edit(folder / RECORD, classes=[f"class {number}" for number in range(50_000)])
    refused(
        folder, backbone, r"needs (160|80)0000 numbers by its config and classes, but .* holds \d+; nothing was loaded"
    )
    edit(folder / RECORD, classes=["x"] * 100_001)
    refused(folder, backbone, "at most 100000 items")


# -- the tensors ---------------------------------------------------------------------------------------------


def with_header(folder: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """As a careful forger: the record's hash follows the file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    (folder / TENSORS).write_bytes(content)
    edit(folder / RECORD, sha256=hashlib.sha256(content).hexdigest())


def parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_row_40_a_header_that_lies_about_its_length(folder: Path, backbone: ClipBackbone, length: int) -> None:
    header, data = parts(folder)
    with_header(folder, header, data, length)
    refused(folder, backbone, "is not a safetensors file")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2**40, 2**40]}, {"shape": [2**62, 4]}, {"shape": [-1, 4]}, {"shape": []}, {"shape": [10**30]},
        {"dtype": "F4"}, {"dtype": "PICKLE"}, {"data_offsets": [0, 2**40]}, {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 8]}, {"data_offsets": [0, 4]}, {"shape": "x"},
    ],
)  # fmt: skip
def test_row_40_tensors_that_lie_about_themselves(
    folder: Path, backbone: ClipBackbone, changes: dict[str, Any]
) -> None:
    header, data = parts(folder)
    name = sorted(key for key in header if key != "__metadata__")[0]
    header[name] = {**header[name], **changes}
    with_header(folder, header, data)
    record = json.loads((folder / RECORD).read_text())
    shape = changes.get("shape", record["tensors"][name]["shape"])
    edit(folder / RECORD, tensors={**record["tensors"], name: {**record["tensors"][name], "shape": shape}})
    refused(
        folder,
        backbone,
        "is not a safetensors file|does not (hold the tensors|fit its schema)|are missing|match",
    )


def test_row_40_damage_anywhere_in_the_tensors(folder: Path, backbone: ClipBackbone) -> None:
    """The hash follows, so that it is the reader that must hold."""
    original = (folder / TENSORS).read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    refusals = 0
    for seed in range(60):
        rng = Random(seed)
        content = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(header_end)] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        (folder / TENSORS).write_bytes(content)
        edit(folder / RECORD, sha256=hashlib.sha256(content).hexdigest())
        try:
            load_adapter(folder, backbone).adapter.detach(backbone)
        except UserError:
            refusals += 1
    assert refusals >= 55


def test_row_40_a_file_too_large_to_be_read(folder: Path, backbone: ClipBackbone, monkeypatch: Any) -> None:
    with open(folder / TENSORS, "r+b") as file:
        file.truncate(5 * 2**30)  # a hole, which costs its sender nothing
    refused(folder, backbone, f"has 5368709120 bytes; more than {manifest_module.MAX_TENSOR_BYTES} is no adapter")


def test_row_40_tensors_of_another_type(folder: Path, backbone: ClipBackbone) -> None:
    state = {name: tensor.to(torch.int64) for name, tensor in load_file(folder / TENSORS).items()}
    save_file(state, folder / TENSORS)
    digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    edit(folder / RECORD, sha256=digest)
    refused(folder, backbone, "does not hold the tensors that")


# -- links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TENSORS, RECORD, PEFT_CONFIG])
@pytest.mark.parametrize("kind", ["absolute", "relative", "folder"])
def test_row_42_a_link_out_of_the_adapter_folder(
    folder: Path, backbone: ClipBackbone, tmp_path: Path, name: str, kind: str
) -> None:
    outside = tmp_path / "private" / name
    outside.parent.mkdir()
    shutil.move(folder / name, outside)
    target = {"absolute": outside, "relative": Path("..") / "private" / name, "folder": tmp_path / "private"}[kind]
    (folder / name).symlink_to(target)
    refused(folder, backbone, f"{name} leads out of its folder, to .*private")


def test_links_inside_and_those_of_a_hugging_face_cache_are_fine(
    folder: Path, backbone: ClipBackbone, tmp_path: Path
) -> None:
    shutil.move(folder / TENSORS, folder / "blob")
    (folder / TENSORS).symlink_to("blob")
    alias = tmp_path / "alias"
    alias.symlink_to(folder)
    load_adapter(alias, backbone).adapter.detach(backbone)
    repository = tmp_path / "models--me--lora"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in (TENSORS, RECORD, PEFT_CONFIG):
        shutil.copy(folder / name, repository / "blobs" / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    load_adapter(snapshot, backbone).adapter.detach(backbone)


# -- numbers that are finite and absurd ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e13, -1e38, 3e38])
def test_row_67_absurd_tensors_are_refused(folder: Path, backbone: ClipBackbone, value: float) -> None:
    tensors = load_file(folder / TENSORS)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    edit(folder / RECORD, sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())
    refused(folder, backbone, rf"{re.escape(name)} holds numbers up to .*, which no training leaves")


@pytest.mark.parametrize(
    ("cell", "config", "message"),
    [
        ("lora-image", {"alpha": 1e308}, r"alpha: Input should be less than or equal to 1000000000"),
        ("lora-image", {"alpha": 10**18}, r"alpha: Input should be less than or equal to 1000000000"),
        ("dora", {"options": {"lora_alpha": 1e300}}, r"lora_alpha=1e\+300 is beyond 1e\+09"),
        ("dora", {"options": {"lora_alpha": 10**18}}, r"lora_alpha=1000000000000000000 is beyond 1e\+09"),
    ],
)
def test_row_67_absurd_factors_are_refused(
    saved: dict[str, Path], backbone: ClipBackbone, tmp_path: Path, cell: str, config: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(saved[cell], tmp_path / "adapter"))
    record = json.loads((folder / RECORD).read_text())
    edit(folder / RECORD, config={**record["config"], **config})
    refused(folder, backbone, message)


def test_row_67_thousands_of_classes_work_and_too_many_are_refused_at_once(
    folder: Path, backbone: ClipBackbone
) -> None:
    edit(folder / RECORD, classes=[f"class {number}" for number in range(1_000)])
    classifier = load_adapter(folder, backbone)
    assert len(classifier.class_names) == 1_000
    classifier.adapter.detach(backbone)
    edit(folder / RECORD, classes=[f"class {number}" for number in range(100_001)])
    (folder / TENSORS).unlink()  # so that nothing can be done before the refusal
    refused(folder, backbone, "at most 100000 items")
