"""``disam-peft cache``: shows and frees what is kept, and leaves alone what a running process uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from disam_peft.cli.app import app
from disam_peft.common import cache
from disam_peft.common.cache import kept, remove, use
from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.stores import pixels
from tests.helpers.folders import write_domains
from tests.unit.cli.test_quick_answers import answer

DAY = 86400


def call(*words: object) -> str:
    result = CliRunner().invoke(app, ["cache", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def entry(own_cache, monkeypatch):
    """``entry("features/abc", 1000, days=3, data="pacs")``: an entry that another process has left."""

    def make(name: str, size: int, *, days: float = 0, data: str = "") -> Path:
        path = own_cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("checks"):
            path.write_bytes(b"1" * size)
        else:
            path.mkdir()
            (path / "rows.bin").write_bytes(b"1" * size)
        note = path.with_name(f".{path.name.removesuffix('.partial')}.use")
        note.write_text(json.dumps(data) + "\n" if data else "")
        then = time.time() - days * DAY
        os.utime(note, (then, then))
        return path

    return make


@pytest.fixture
def filled(entry):
    entry("features/aaaa", 3000, days=40, data="/data/pacs")
    entry("pixels/bbbb", 5000, days=2, data="/data/pacs")
    entry("pixels/cccc.partial", 1000, days=10)
    entry("archives/dddd", 2000, days=20, data="/data/office.zip")
    entry("checks/eeee.json", 500, days=1, data="/data/office.zip")


def names() -> list[str]:
    return [row["name"] for row in json.loads(call("ls", "--json"))]


def test_everything_is_listed_the_longest_unused_first(filled, own_cache):
    rows = json.loads(call("ls", "--json"))
    assert [row["name"] for row in rows] == [
        "features/aaaa",
        "archives/dddd",
        "pixels/cccc.partial",
        "pixels/bbbb",
        "checks/eeee.json",
    ]
    assert [row["bytes"] for row in rows] == [3000, 2000, 1000, 5000, 500]
    assert [row["state"] for row in rows] == ["complete", "complete", "unfinished", "complete", "complete"]
    assert rows[0]["data"] == ["/data/pacs"] and abs(rows[0]["used"] - time.time() + 40 * DAY) < 60
    table = call("ls")
    for text in ("features/aaaa", "3.0 kB", "40 d", "unfinished", "office.zip", "11.5 kB"):
        assert text in table.replace("\n", " ")


def test_an_empty_cache(own_cache):
    assert call("ls").startswith("nothing is kept in ")
    assert json.loads(call("ls", "--json")) == []


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--unused-for", "15d"], ["features/aaaa", "archives/dddd"]),
        (["--unused-for", "1w"], ["features/aaaa", "archives/dddd", "pixels/cccc.partial"]),
        (["--data", "office"], ["archives/dddd", "checks/eeee.json"]),
        (["--data", "office", "--unused-for", "36h"], ["archives/dddd"]),
        (["--down-to", "6KB"], ["features/aaaa", "archives/dddd", "pixels/cccc.partial"]),
        (["--down-to", "6KB", "--data", "pacs"], ["features/aaaa", "pixels/bbbb"]),
        (["--down-to", "1GB"], []),
    ],
    ids=" ".join,
)
def test_prune_by_age_size_and_data(filled, options, gone):
    gone, everything = set(gone), set(names())
    would = call("prune", *options, "--dry-run")
    assert set(names()) == everything, "nothing went"
    assert {line.split()[2] for line in would.splitlines() if line.startswith("would remove")} == gone
    assert {row["name"] for row in json.loads(call("prune", *options, "--json"))} == gone
    assert set(names()) == everything - gone


def test_rm_takes_the_beginning_of_a_name(filled, own_cache):
    assert call("rm", "features/aa", "bbb", "--dry-run").splitlines()[-1] == "8.0 kB would be freed"
    assert call("rm", "features/aa", "bbb").splitlines()[-1] == "8.0 kB freed"
    assert set(names()) == {"archives/dddd", "pixels/cccc.partial", "checks/eeee.json"}
    assert not list((own_cache / "features").glob("*")) and not list((own_cache / "features").glob(".*.removed"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rm", "features/x"], "'features/x' is not in the cache (disam-peft cache ls shows what is there)"),
        (["rm", "p"], "'p' fits 2 entries: pixels/cccc.partial, pixels/bbbb; give more of it"),
        (["prune"], "say what may go: --unused-for 30d, --down-to 20GB, --data NAME, or several of them"),
        (["prune", "--unused-for", "30"], "--unused-for '30' is not a time such as 12h, 30d or 2w"),
        (["prune", "--down-to", "-3GB"], "--down-to '-3GB' is not a size such as 500MB or 20GB"),
    ],
)
def test_mistakes_are_explained_and_nothing_goes(filled, words, message):
    result = CliRunner().invoke(app, ["cache", *words])
    assert message in str(result.exception)
    assert len(names()) == 5


USER = """
import sys, time
from pathlib import Path
from disam_peft.common.cache import use
use(Path(sys.argv[1]), "pacs")
print("in use", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows itself refuses to remove files that are open")
def test_what_a_running_process_uses_stays_until_it_ends(filled, own_cache):
    path = own_cache / "pixels/bbbb"
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in use\n"
    [seen] = [entry for entry in kept() if entry.path == path]
    assert seen.state == "in use" and seen.data == ("/data/pacs", "pacs") and time.time() - seen.used < 60
    assert not remove(seen), "even where it was not seen in time"
    assert "pixels/bbbb" not in call("prune", "--down-to", "0GB") and path.is_dir()
    result = CliRunner().invoke(app, ["cache", "rm", "bbbb"])
    assert "in use by a running process" in str(result.exception) and path.is_dir()
    process.kill()
    process.communicate()
    assert "removed pixels/bbbb" in call("rm", "bbbb") and not path.exists()


def test_what_is_being_built_stays(filled, own_cache):
    with FileLock(own_cache / "pixels/cccc.lock"):
        assert [e.state for e in kept() if e.path.name == "cccc.partial"] == ["in use"]
        call("prune", "--down-to", "0GB")
    assert names() == ["pixels/cccc.partial"]


def test_what_the_package_keeps_is_found_with_its_data_and_used_again(tmp_path, own_cache):
    root = write_domains(tmp_path / "own data", count=1)
    dataset = load(DataConfig(root=root))
    store = pixels.open_or_build(dataset, 8, "bicubic")
    found = {entry.kind: entry for entry in kept()}
    assert found.keys() == {"pixels", "checks"}
    assert all(entry.data == (str(root),) and entry.state == "in use" for entry in found.values())
    assert found["pixels"].size >= len(dataset) * (8 * 8 * 3 + 8)
    for descriptor in cache._held.values():
        os.close(descriptor)  # as if this process had ended
    cache._held.clear()
    assert {entry.kind for entry in kept() if remove(entry)} == {"pixels", "checks"} and kept() == []
    assert pixels.open_or_build(dataset, 8, "bicubic").folder == store.folder
    assert {entry.kind for entry in kept()} == {"pixels"}


def test_an_unpacked_archive_goes_with_what_is_known_of_it(tmp_path, own_cache):
    import shutil

    from disam_peft.data.sources.archive import unpacked

    write_domains(tmp_path / "tree", count=1)
    archive = Path(shutil.make_archive(str(tmp_path / "pacs"), "zip", tmp_path / "tree"))
    place = unpacked(archive, max_gb=1, max_files=1000)
    [entry] = kept()
    assert entry.data == (str(archive),) and entry.state == "in use"
    os.close(cache._held.pop(entry.path))
    assert len(list((own_cache / "archives/seen").iterdir())) == 1
    assert remove(entry) and not place.exists() and not list((own_cache / "archives/seen").iterdir())
    assert unpacked(archive, max_gb=1, max_files=1000).is_dir()


def test_the_folder_of_feature_stores_may_lie_elsewhere(tmp_path, own_cache):
    (tmp_path / "features" / "ffff").mkdir(parents=True)
    assert names() == []
    assert [row["name"] for row in json.loads(call("ls", "--json", "--features", tmp_path / "features"))] == [
        "features/ffff"
    ]
    call("rm", "ffff", "--features", tmp_path / "features")
    assert not (tmp_path / "features" / "ffff").exists()


def test_a_cache_that_cannot_be_written_notes_nothing_and_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    use(tmp_path / "file" / "pixels" / "x", "data")


@pytest.mark.slow
def test_the_cache_is_shown_without_anything_heavy(own_cache):
    for words in (["cache", "ls"], ["cache", "--help"], ["cache", "prune", "--unused-for", "1d"]):
        done = answer(*words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == "heavy: []"
