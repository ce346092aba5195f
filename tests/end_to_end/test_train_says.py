"""What ``disam-peft train`` says in processes of its own: on a terminal, without one, and with several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="terminals and gloo are tested on POSIX systems")


@pytest.fixture
def words(domains_folder, openclip_name, tmp_path):
    quick = ["train.steps=4", "train.batch_size=6", "train.warmup_steps=0", "train.workers=0", "evaluation.workers=0"]
    model = [f"backbone.name={openclip_name}", "backbone.pretrained=null", "adapter.blocks={last: 1}"]
    places = [f"data.root={domains_folder}", f"output={tmp_path / 'runs'}", "protocol.held_out=photo"]
    recipe = str(ROOT / "recipes/pacs/lora_disam.yaml")
    return ["-m", "disam_peft.cli", "train", recipe, *places, *model, *quick, "train.validate_every=2"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}


def test_on_a_terminal_the_bar_shows_loss_and_validation(words):
    import pty

    shown = bytearray()
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, *words], env=ENVIRONMENT, stdout=slave, stderr=slave)
    os.close(slave)
    while True:
        try:
            some = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not some:
            break
        shown += some
    assert child.wait(timeout=120) == 0, shown.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"training [^\n]* [234]/4 [^\n]*loss \d\.\d{3}, validation [\d.]+ %", plain), plain
    assert len(re.findall(r"step [24] of 4: validation accuracy", plain)) == 2


def test_of_two_processes_one_speaks_and_a_dry_run_writes_nothing(words, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for more in (["--dry-run"], []):
        done = subprocess.run(
            [*launch, *words, *more], env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stderr
        for said in ("data: ", "run: without photo", "  trained: lora", "2 processes"):
            assert done.stdout.count(said) == 1, done.stdout
        assert (tmp_path / "runs").exists() == (not more)
    assert len(re.findall(r"step [24] of 4: validation", done.stdout)) == 2
