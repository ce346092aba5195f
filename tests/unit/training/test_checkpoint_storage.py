"""The folder of a checkpoint: whole or not at all, whatever fails; every damaged bit is found."""

import builtins
import errno
import os
import random
import shutil
import signal

import pytest

from disam_peft.common import files
from disam_peft.errors import UserError
from disam_peft.training.checkpoint.storage import MANIFEST, complete_checkpoints, read_checkpoint, write_checkpoint
from tests.helpers.interrupted import ended, forked

FILES = {"tensors.safetensors": bytes(range(256)) * 4, "state.json": b'{"step": 4}'}
LATER = {"tensors.safetensors": bytes(range(255, -1, -1)) * 4, "state.json": b'{"step": 6}'}


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of steps 2 and 4."""
    write_checkpoint(tmp_path / "checkpoints", 2, FILES, keep=2)
    write_checkpoint(tmp_path / "checkpoints", 4, FILES, keep=2)
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class EveryCall:
    """Lets ``happen()`` come between at the ``number``-th call to the system that a save makes."""

    def __init__(self, monkeypatch, number, happen):
        self.number, self.happen, self.calls, self.happened = number, happen, 0, None
        for module, name in ((os, "mkdir"), (os, "fsync"), (os, "open"), (os, "rename"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self._around(getattr(module, name), name))
        monkeypatch.setattr(files, "open", self._open, raising=False)

    def _tick(self, name):
        self.calls += 1
        if self.calls == self.number:
            self.happened = name
            self.happen()

    def _around(self, real, name):
        def call(*arguments, **options):
            self._tick(name)
            return real(*arguments, **options)

        return call

    def _open(self, path, mode):
        file = builtins.open(path, mode)  # noqa: SIM115  (the caller closes it)
        if "x" not in mode:
            return file
        real = file.write

        class Half:
            def __enter__(half):
                return half

            def __exit__(half, *error):
                file.close()

            def write(half, content):
                real(content[: len(content) // 2])  # a full disk takes what it can
                file.flush()
                self._tick("write")
                real(content[len(content) // 2 :])

            flush, fileno = file.flush, file.fileno

        return Half()


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_read_and_the_newest_are_kept(folder):
    assert read_checkpoint(write_checkpoint(folder, 6, LATER, keep=2)) == LATER
    assert names(folder) == ["step-000004", "step-000006"]
    write_checkpoint(folder, 1_000_000, FILES, keep=3)
    assert [path.name for path in complete_checkpoints(folder)] == ["step-000004", "step-000006", "step-1000000"]
    assert read_checkpoint(write_checkpoint(folder, 6, FILES, keep=3)) == FILES, "the same step once more"


def test_row_34_a_failure_at_any_call_of_a_save_keeps_the_checkpoint_before_it(folder, tmp_path):
    failed = []
    for number in range(1, 100):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)
        with pytest.MonkeyPatch.context() as patch:
            calls = EveryCall(patch, number, no_space)
            try:
                write_checkpoint(place, 6, LATER, keep=2)
            except UserError as error:
                assert "No space left on device" in str(error)
                assert "step-000004, the one before it, is untouched" in str(error)
            else:  # to make a folder that is there may fail
                assert calls.happened is None or number == 1, f"{calls.happened} failed, and nobody was told"
        found = complete_checkpoints(place)
        assert names(place) == [path.name for path in found], f"stray files after {calls.happened} failed"
        assert read_checkpoint(place / "step-000004") == FILES
        assert read_checkpoint(found[-1]) == (LATER if found[-1].name == "step-000006" else FILES)
        if calls.happened is None:
            break
        failed.append(calls.happened)
    assert set(failed) == {"mkdir", "write", "fsync", "open", "rename", "rmtree"}
    assert len(failed) >= 15


@pytest.mark.slow
def test_row_33_a_kill_at_any_call_of_a_save_leaves_a_whole_checkpoint(folder, tmp_path):
    for number in range(1, 100):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)

        def save(place=place, number=number):
            with pytest.MonkeyPatch.context() as patch:
                EveryCall(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                write_checkpoint(place, 6, LATER, keep=2)

        code = ended(forked(save))
        newest = complete_checkpoints(place)[-1]
        assert read_checkpoint(newest) == (LATER if newest.name == "step-000006" else FILES)
        write_checkpoint(place, 8, LATER, keep=2)
        assert names(place)[-1] == "step-000008"
        assert all(name.startswith("step-") for name in names(place)), "the next save clears up"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number >= 15


def test_row_35_truncated_files_are_found_and_the_one_before_is_offered(folder):
    place = folder / "step-000004"
    cuts = 0
    for name in (*FILES, MANIFEST):
        whole = (place / name).read_bytes()
        for length in sorted({*range(0, len(whole), max(1, len(whole) // 20)), len(whole) - 1}):
            (place / name).write_bytes(whole[:length])
            with pytest.raises(UserError, match=rf"step-000004 is damaged: {name}") as caught:
                read_checkpoint(place)
            assert f"step-000002 is whole: to go on from there, delete {place}" in str(caught.value)
            cuts += 1
        (place / name).write_bytes(whole)
    assert cuts >= 40
    assert read_checkpoint(place) == FILES


def test_row_35_flipped_bits_are_found(folder):
    place, rng = folder / "step-000004", random.Random(0)
    contents = {name: (place / name).read_bytes() for name in (*FILES, MANIFEST)}
    flips = [(name, rng.randrange(8 * len(content))) for name, content in contents.items() for _ in range(100)]
    for name, bit in flips:
        damaged = bytearray(contents[name])
        damaged[bit // 8] ^= 1 << bit % 8
        (place / name).write_bytes(damaged)
        with pytest.raises(UserError, match="step-000004 is damaged"):
            read_checkpoint(place)
        (place / name).write_bytes(contents[name])
    assert len(flips) == 300
    assert read_checkpoint(place) == FILES


def test_row_35_the_message_says_what_was_expected_and_found(folder):
    place = folder / "step-000004"
    (place / "state.json").write_bytes(b'{"step": 5}')
    with pytest.raises(UserError, match=r"state\.json has sha256 [0-9a-f]{64}, [0-9a-f]{64} expected; step-000002 is"):
        read_checkpoint(place)
    (place / "state.json").unlink()
    (folder / "step-000002" / MANIFEST).write_bytes(b"{}")
    with pytest.raises(UserError, match=r"state\.json cannot be read .*; no other one is whole"):
        read_checkpoint(place)


def test_a_manifest_cannot_name_files_elsewhere(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    content = (folder / "step-000004" / MANIFEST).read_text().replace('"state.json"', '"../../secret"')
    (folder / "step-000004" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="outside the folder"):
        read_checkpoint(folder / "step-000004")
