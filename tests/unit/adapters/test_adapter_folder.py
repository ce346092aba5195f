"""Adapter folders: what is written, and what is refused when it comes back."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disam_peft.adapters import manifest as manifest_module
from disam_peft.adapters.manifest import read_manifest
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier, zero_shot
from disam_peft.classification.saved_classifier import load_adapter, save_adapter
from disam_peft.config.backbone import BackboneConfig
from disam_peft.errors import Notice, UserError
from disam_peft.export.peft import export_peft
from tests.helpers.adapter_cells import CELLS, FAMILIES, PEFT_CELLS, PROMPTS, pixels, tiny_backbone, tiny_classifier
from tests.helpers.tiny import tiny_transformers

PEFT_ALONE = [cell for cell in PEFT_CELLS if cell != "lora-scale"]  # peft knows no logit scale
TENSORS, RECORD, PEFT_CONFIG = "adapter_model.safetensors", "disam_peft.json", "adapter_config.json"


def save(directory: Path, classifier: ClipClassifier) -> Path:
    save_adapter(directory, classifier, trained_with={"recipe": {"rho": 0.05}})
    return directory


@pytest.fixture
def backbone(twins: tuple[str, str]) -> ClipBackbone:
    return tiny_backbone(twins, "transformers", torch.float32)


@pytest.fixture
def folder(twins: tuple[str, str], tmp_path: Path) -> Path:
    """A saved LoRA of the transformers family."""
    return save(
        tmp_path / "adapter", tiny_classifier(tiny_backbone(twins, "transformers", torch.float32), "lora-image")
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_tensors(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """As a careful forger: the record's list and hash follow the tensors."""
    save_file(state, folder / TENSORS)
    digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    tensors = {name: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for name, t in state.items()}
    edit(folder / RECORD, sha256=digest, tensors=tensors)


def refused(folder: Path, backbone: ClipBackbone, message: str) -> None:
    """Loading raises, and the backbone that was handed over is as before."""
    before = {name: type(module) for name, module in backbone.model.named_modules()}
    with pytest.raises(UserError, match=message):
        load_adapter(folder, backbone)
    assert {name: type(module) for name, module in backbone.model.named_modules()} == before


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", CELLS)
def test_round_trip_is_bit_exact(twins: tuple[str, str], family: str, cell: str, tmp_path: Path) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, family), cell)
    wanted = classifier(pixels())
    save(tmp_path / "adapter", classifier)
    assert torch.equal(classifier(pixels()), wanted)
    random_state = torch.get_rng_state()
    loaded = load_adapter(tmp_path / "adapter", tiny_backbone(twins, family))
    assert torch.equal(loaded(pixels()), wanted)
    assert loaded.prompts == PROMPTS and loaded.adapter is not None
    assert loaded.adapter.config == CELLS[cell]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_backbone_is_found_again(twins: tuple[str, str], family: str, tmp_path: Path) -> None:
    backbone = load_backbone(BackboneConfig(family=family, name=twins[FAMILIES.index(family)]))
    classifier = tiny_classifier(backbone, "lora-both")
    images = pixels(dtype=torch.float32)
    wanted = classifier(images)
    loaded = load_adapter(save(tmp_path / "adapter", classifier), device="cpu")
    assert torch.equal(loaded(images), wanted)
    assert not loaded.training


def test_the_record_says_what_was_trained_on_what(folder: Path, backbone: ClipBackbone) -> None:
    record = read_manifest(folder)
    assert record.kind == "lora" and record.config == CELLS["lora-image"]
    assert record.backbone.sha256 == backbone.base_hash and record.backbone.name == backbone.config.name
    assert record.classes == list(PROMPTS.class_names) and record.templates == list(PROMPTS.templates)
    assert record.logit_scale == pytest.approx(float(backbone.logit_scale))
    assert record.trained_with == {"recipe": {"rho": 0.05}}
    assert record.versions["peft"] and record.versions["disam_peft"]
    stored = load_file(folder / TENSORS)
    assert {name: tuple(entry.shape) for name, entry in record.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }


def test_saving_twice_gives_the_same_bytes_and_replaces_only_adapters(
    folder: Path, backbone: ClipBackbone, tmp_path: Path
) -> None:
    classifier = load_adapter(folder, backbone)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    save(folder, classifier)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(UserError, match="already exists and is not empty"):
        export_peft(folder, classifier)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        save(tmp_path / "photos", classifier)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_save_that_fails_keeps_the_adapter_that_was_there(folder: Path, backbone: ClipBackbone) -> None:
    classifier = load_adapter(folder, backbone)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="finite number"):
        save_adapter(folder, classifier, trained_with={"accuracy": float("nan")})
    next(iter(classifier.trainable().values())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="hold NaN or infinity"):
        save(folder, classifier)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert len(list(folder.parent.iterdir())) == 1


def test_zero_shot_has_nothing_to_save(backbone: ClipBackbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to save"):
        save(tmp_path / "adapter", zero_shot(backbone, ["cat"], ["a {}."]))
    assert not list(tmp_path.iterdir())


PLAIN_PEFT = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = load_file(folder + "/../given.safetensors")
    base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder).eval()
    with torch.no_grad():
        logits = model(pixel_values=given["pixels"], input_ids=given["tokens"]).logits_per_image
    print((logits - given["logits"]).abs().max().item() / given["logits"].abs().max().item())
assert "disam_peft" not in sys.modules
"""


@pytest.mark.slow
def test_peft_alone_loads_every_method_onto_a_plain_clip(twins: tuple[str, str], tmp_path: Path) -> None:
    images = pixels(dtype=torch.float32)
    prompts = ClassPrompts(PROMPTS.class_names, ("a photo of a {}.",))
    folders, logits = [], []
    for cell in PEFT_ALONE:
        backbone = tiny_backbone(twins, "transformers", torch.float32)
        classifier = tiny_classifier(backbone, cell, prompts=prompts)
        export_peft(tmp_path / cell / "adapter", classifier)
        tokens = backbone.tokenize([f"a photo of a {name}." for name in prompts.class_names])
        logits.append(classifier(images).detach())
        save_file({"pixels": images, "tokens": tokens, "logits": logits[-1]}, tmp_path / cell / "given.safetensors")
        folders.append(str(tmp_path / cell / "adapter"))
    plain = zero_shot(tiny_backbone(twins, "transformers", torch.float32), prompts.class_names, prompts.templates)
    assert all((plain(images) - adapted).abs().max() > 1e-3 for adapted in logits)
    outcome = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *folders], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    differences = dict(zip(PEFT_ALONE, map(float, outcome.stdout.split()), strict=True))
    assert max(differences.values()) <= 1e-6, differences
    assert "missing" not in outcome.stderr.lower()


def test_a_trained_logit_scale_is_said_because_peft_does_not_know_it(twins: tuple[str, str], tmp_path: Path) -> None:
    classifier = tiny_classifier(tiny_backbone(twins, "transformers", torch.float32), "lora-scale")
    assert classifier.adapter is not None
    scale = float(classifier.adapter.scale_and_bias(classifier.backbone)[0].detach())
    with pytest.warns(Notice, match=f"the logit scale was trained too, from .* to {scale:.5g}; .*set it"):
        export_peft(tmp_path / "exported", classifier)
    logarithm = load_file(tmp_path / "exported" / TENSORS)["trained_scale.logit_scale"]
    assert float(logarithm.exp()) == pytest.approx(scale)


def test_an_open_clip_adapter_does_not_pretend_to_be_for_peft(twins: tuple[str, str], tmp_path: Path) -> None:
    save(tmp_path / "adapter", tiny_classifier(tiny_backbone(twins, "open_clip"), "lora-image"))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [TENSORS, RECORD]


def test_coop_exports_its_class_features_with_names(twins: tuple[str, str], tmp_path: Path) -> None:
    from safetensors import safe_open

    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, "coop-shared")
    export_peft(tmp_path / "adapter", classifier)
    with safe_open(tmp_path / "adapter" / "class_features.safetensors", "pt") as stored:
        features_CE = stored.get_tensor("class_features").double()
        assert json.loads(stored.metadata()["classes"]) == list(PROMPTS.class_names)
    record = read_manifest(tmp_path / "adapter")
    image_BE = torch.nn.functional.normalize(backbone.encode_image(pixels()), dim=-1)
    by_hand = record.logit_scale * image_BE @ features_CE.T
    assert (by_hand - classifier(pixels())).abs().max() < 1e-5
    assert tuple(load_file(tmp_path / "adapter" / TENSORS)["context"].shape) == (4, 32)


def test_a_probe_exports_its_head(twins: tuple[str, str], tmp_path: Path) -> None:
    backbone = tiny_backbone(twins, "open_clip")
    classifier = tiny_classifier(backbone, "probe-zero_shot")
    export_peft(tmp_path / "adapter", classifier)
    head = load_file(tmp_path / "adapter" / TENSORS)
    image_BE = torch.nn.functional.normalize(backbone.encode_image(pixels()), dim=-1)
    assert (image_BE @ head["weight"].T + head["bias"] - classifier(pixels())).abs().max() < 1e-12


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_row_40_another_backbone(folder: Path, tmp_path: Path) -> None:
    other = load_backbone(BackboneConfig(family="transformers", name=tiny_transformers(tmp_path / "other", seed=9)))
    expected = read_manifest(folder).backbone.sha256
    refused(folder, other, f"weights {expected}, but .*other has {other.base_hash}")


def test_row_40_tensors_that_do_not_fit(folder: Path, backbone: ClipBackbone) -> None:
    state = load_file(folder / TENSORS)
    name = sorted(state)[0]
    replace_tensors(folder, {key: tensor for key, tensor in state.items() if key != name})
    refused(folder, backbone, rf"24 expected, 23 found\): missing {name}")
    replace_tensors(folder, {**state, "base_model.model.logit_scale": torch.zeros(1)})
    refused(folder, backbone, "unexpected base_model.model.logit_scale")
    replace_tensors(folder, {**state, name: state[name] * float("inf")})
    refused(folder, backbone, f"{name} holds NaN or infinity")
    replace_tensors(folder, state)
    load_adapter(folder, backbone)


def test_row_40_a_damaged_tensor_file(folder: Path, backbone: ClipBackbone) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)
    refused(folder, backbone, "sha256 [0-9a-f]{64} expected, [0-9a-f]{64} found")
    (folder / TENSORS).unlink()
    refused(folder, backbone, f"has no {TENSORS}")


def test_row_40_a_record_of_other_tensors(folder: Path, backbone: ClipBackbone) -> None:
    tensors = json.loads((folder / RECORD).read_text())["tensors"]
    name = sorted(tensors)[0]
    edit(folder / RECORD, tensors={**tensors, name: {"shape": [1], "dtype": "float32"}})
    refused(folder, backbone, f"does not hold the tensors that {RECORD} lists: {name}")


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "state.PKL", TENSORS])
def test_row_41_pickled_weights_are_not_opened(folder: Path, backbone: ClipBackbone, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "code-was-run"
    content = pickle.dumps(Trap(mark))
    pickle.loads(content)
    assert mark.exists()  # the trap works
    mark.unlink()
    (folder / name).write_bytes(content)
    edit(folder / RECORD, sha256=hashlib.sha256(content).hexdigest())
    refused(folder, backbone, "not a safetensors file" if name == TENSORS else f"pickled weights .{name}.")
    if name != TENSORS:
        refused(folder / name, backbone, "is a pickle")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": r".*\.q_proj"}, "chooses its modules by the pattern"),
        ({"target_modules": ["q_proj"]}, "disagrees with disam_peft.json in target_modules"),
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, "in auto_mapping"),
        ({"megatron_core": "evil.core", "megatron_config": {}}, r"in megatron_core"),
        ({"exclude_modules": ".*"}, "in exclude_modules"),
        ({"r": 3}, r"in r \(found r: 3\)"),
        ({"peft_type": "IA3"}, "in peft_type"),
        ({"run_this": "evil.main"}, "in run_this"),
    ],
)
def test_row_42_a_peft_config_that_asks_for_more(
    folder: Path, backbone: ClipBackbone, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder))
    original = json.loads((folder / PEFT_CONFIG).read_text())
    edit(folder / PEFT_CONFIG, **changes)
    refused(folder, backbone, message)
    assert "evil" not in sys.modules
    # Incidental fields may differ, and names may come in any order.
    harmless = {"peft_version": "0.20.0", "base_model_name_or_path": "elsewhere"}
    harmless["target_modules"] = original["target_modules"][::-1]
    (folder / PEFT_CONFIG).write_text(json.dumps({**original, **harmless}))
    load_adapter(folder, backbone)


def test_row_42_a_peft_config_beside_an_adapter_that_has_none(twins: tuple[str, str], tmp_path: Path) -> None:
    backbone = tiny_backbone(twins, "transformers")
    folder = save(tmp_path / "adapter", tiny_classifier(backbone, "coop-shared"))
    (folder / PEFT_CONFIG).write_text("{}")
    refused(folder, backbone, "does not belong to a 'coop' adapter")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "does not fit its schema"),
        (b"x" * 5_000_000, "bytes; more than"),
    ],
)
def test_a_record_that_is_none(
    folder: Path, backbone: ClipBackbone, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", 4_000_000)
    (folder / RECORD).write_bytes(content)
    refused(folder, backbone, message)


@pytest.mark.parametrize(
    "changes",
    [{"format_version": 2}, {"kind": "coop"}, {"stranger": 1}, {"sha256": "abc"}, {"classes": [1]},
     {"config": {"kind": "lora", "target_modules": ".*"}}, {"config": {"kind": "os.system"}}],
)  # fmt: skip
def test_a_record_outside_the_schema(folder: Path, backbone: ClipBackbone, changes: dict[str, Any]) -> None:
    edit(folder / RECORD, **changes)
    refused(folder, backbone, "does not fit its schema: ")


def test_a_folder_of_something_else(tmp_path: Path, backbone: ClipBackbone) -> None:
    refused(tmp_path, backbone, f"has no {RECORD}")
    refused(tmp_path / "nowhere", backbone, "is not a folder")
