"""scripts/pretrain_demo_clip.py: the same weights from the same seed, and what its captions and its halving promise."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from disam_peft.config.shapes import CLASSES, DOMAINS
from tests.helpers.paths import SCRIPTS

TINY = ["--share", "0", "--plain-epochs", "1", "--varied-epochs", "1", "--batch-size", "24"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    threads = torch.get_num_threads()
    import demo_captions
    import demo_checkpoint
    import demo_pictures
    import pretrain_demo_clip

    yield SimpleNamespace(
        captions=demo_captions, checkpoint=demo_checkpoint, pictures=demo_pictures, pretrain=pretrain_demo_clip
    )
    torch.set_num_threads(threads)
    for name in ("demo_captions", "demo_checkpoint", "demo_pictures", "pretrain_demo_clip"):
        sys.modules.pop(name)


@pytest.mark.slow
def test_one_seed_gives_one_set_of_weights(scripts, tmp_path):
    hashes = {}
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        scripts.pretrain.main([*TINY, "--seed", seed, "--output", str(tmp_path / name)])
        files = sorted((tmp_path / name).glob("*.safetensors"))
        hashes[name] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert hashes[name] == json.loads((tmp_path / name / "pretraining.json").read_text())["sha256"]
        assert len(hashes[name]) == 2
    assert hashes["again"] == hashes["first"]
    assert all(hashes["other"][name] != value for name, value in hashes["first"].items())
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "again")]
    assert tokenizers[0] == tokenizers[1]


def test_the_full_size_model_computes_what_the_halved_one_does(scripts):
    torch.manual_seed(0)
    halved = scripts.checkpoint.create_model(40, halved=True).eval()
    whole = scripts.checkpoint.at_full_size(halved).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = halved.encode_image(torch.nn.functional.avg_pool2d(pixels, 2))
        torch.testing.assert_close(whole.encode_image(pixels), wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01


def test_names_are_mixed_up_as_often_in_every_domain(scripts):
    pairs, share = scripts.captions.LOOSE, 0.6
    assert {pairs[other] for other in pairs.values()} == set(pairs), "both ways"
    for domain in DOMAINS:
        said: Counter[str] = Counter()
        for _, scene in scripts.pictures.scenes("captions", dict.fromkeys(DOMAINS, 0) | {domain: 10}):
            for number in range(10):
                words = scripts.captions.caption(scene, domain, number, naming=1, loose=share).strip(".").split()
                [name] = [word for word in words if word in CLASSES]
                said[
                    "right" if name == scene.class_name else "loose" if name == pairs.get(scene.class_name) else "?"
                ] += 1
        assert said["?"] == 0
        loose = 12 / len(pairs) * said["loose"] / said.total()
        assert loose == pytest.approx(share, abs=0.1)  # four standard errors of 400 captions


def test_captions_without_a_name_name_nothing(scripts):
    chosen = scripts.pictures.scenes("captions", dict.fromkeys(DOMAINS, 3))
    texts = [scripts.captions.caption(scene, domain, 0, naming=0, loose=1) for domain, scene in chosen]
    assert not any(name in text.split() for text in texts for name in CLASSES)
    assert len(set(texts)) > 50
    assert all(scripts.captions.plain_caption(scene) == f"a photo of a {scene.class_name}." for _, scene in chosen)
