"""The data check: census, bad files, duplicates, and what it remembers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from disam_peft.config.data import DataConfig
from disam_peft.data import check
from disam_peft.data.census import SizeSummary, inspect
from disam_peft.data.check import verified
from disam_peft.data.load import load
from disam_peft.errors import UserError
from tests.helpers.tiny_images import write_image


def dataset_of(root: Path, **options):
    return load(DataConfig(root=root, verify=False, **options))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of the files that the check has decoded, in any order."""
    sizes: list[int] = []
    original = check.decode_image

    def counting(data, source, *, max_pixels):
        sizes.append(len(data))
        return original(data, source, max_pixels=max_pixels)

    monkeypatch.setattr(check, "decode_image", counting)
    return sizes


def broken_tree(tree) -> Path:
    """Twenty good images and an empty one, a truncated one, a page of HTML."""
    root = tree(["a", "b"], ["x", "y"], 5)
    (root / "a/x/empty.jpg").write_bytes(b"")
    (root / "a/y/page.jpg").write_text("<html>404</html>")
    whole = write_image(root / "b/y/cut.png", (40, 40))
    whole.write_bytes(whole.read_bytes()[:-800])
    return root


def test_report(tree):
    root = broken_tree(tree)
    shutil.copy(root / "a/x/0.png", root / "a/y/again.png")
    shutil.copy(root / "a/x/1.png", root / "b/x/twin.png")
    write_image(root / "b/x/big.png", (30, 20))
    (root / "a/notes.txt").write_text("x")
    report = inspect(dataset_of(root))
    assert report.counts == ((6, 7), (7, 6)) and report.total == 26
    bad = {Path(file.source).name: (file.domain, file.class_name) for file in report.bad}
    assert bad == {"empty.jpg": ("a", "x"), "page.jpg": ("a", "y"), "cut.png": ("b", "y")}
    assert "empty" in report.bad[0].reason and "HTML" in report.bad[1].reason
    (within,), (across,) = report.duplicates_within, report.duplicates_across
    assert [Path(s).name for s in within.sources] == ["0.png", "again.png"]
    assert within.domains == ("a",) and within.classes == ("x", "y")
    assert across.domains == ("a", "b") and across.classes == ("x",)
    assert report.sizes == SizeSummary(smallest=(12, 10), median=(12, 10), largest=(30, 20))
    assert report.ignored == {".txt": 1}
    as_dict = report.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["total"] == 26 and as_dict["bad"][1]["class_name"] == "y"


def test_two_empty_files_are_not_duplicates(tree):
    root = tree(["a"], ["x"], 1)
    for name in ("p.png", "q.png"):
        (root / "a/x" / name).write_bytes(b"")
    report = inspect(dataset_of(root))
    assert len(report.bad) == 2 and report.duplicates_within == ()


def test_row_12_bad_files_are_an_error_by_default(tree):
    with pytest.raises(UserError) as caught:
        verified(dataset_of(broken_tree(tree)))
    message = str(caught.value)
    assert message.startswith("3 of 23 images (13.0%) cannot be used:")
    for name in ("a/x/empty.jpg", "a/y/page.jpg", "b/y/cut.png"):
        assert name in message
    assert "data.skip_bad" in message


def test_row_12_ten_are_listed_and_the_rest_counted(tree):
    root = tree(["a"], ["x"], 1)
    for i in range(13):
        (root / f"a/x/bad{i:02d}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)^13 of 14 .*bad09\.png[^\n]*\n  and 3 more") as caught:
        verified(dataset_of(root))
    assert "bad10" not in str(caught.value)


def test_row_12_skip_bad_up_to_one_percent(tree):
    root = tree(["a"], ["x"], 99)
    (root / "a/x/bad.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 100 images \(1\.0%\) .* left out"):
        dataset = load(DataConfig(root=root, skip_bad=True))
    assert len(dataset) == 99 and "a/x/bad.png" not in dataset.keys
    ((skipped),) = dataset.skipped
    assert skipped.source.endswith("a/x/bad.png") and "empty" in skipped.reason
    os.remove(root / "a/x/0.png")
    with pytest.raises(UserError, match=r"(?s)1 of 99 images \(1\.0%\).*more than the 1% that data.skip_bad"):
        load(DataConfig(root=root, skip_bad=True))


def test_verified_knows_the_hashes_in_order(tree):
    dataset = verified(dataset_of(tree(["a", "b"], ["x"], 40)))
    bare = dataset_of(Path(dataset.origin))
    assert dataset.hashes == tuple(bare.content_hash(i) for i in range(80))


def test_findings_are_remembered(tree, decoded, own_cache):
    root = broken_tree(tree)
    first = inspect(dataset_of(root))
    assert len(decoded) == 23
    again = inspect(dataset_of(root))
    assert len(decoded) == 23
    assert again == first
    assert len(list(own_cache.glob("checks/*.json"))) == 1
    inspect(dataset_of(root, max_pixels=100))
    assert len(decoded) == 46


def test_a_change_is_noticed(tree, decoded):
    root = tree(["a"], ["x"], 3)
    verified(dataset_of(root))
    path = root / "a/x/1.png"
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)  # same size; only the time of change tells
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    with pytest.raises(UserError, match=r"1\.png"):
        verified(dataset_of(root))
    assert len(decoded) == 6


def test_a_copy_elsewhere_is_checked_anew(tree, decoded, tmp_path):
    root = tree(["a"], ["x"], 3)
    verified(dataset_of(root))
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copy2)
    verified(dataset_of(tmp_path / "copy"))
    assert len(decoded) == 6


def test_a_file_that_could_not_be_read_is_not_remembered(tree, decoded):
    root = tree(["a"], ["x"], 3)
    dataset = dataset_of(root)
    path = root / "a/x/1.png"
    data = path.read_bytes()
    os.remove(path)
    report = inspect(dataset)
    assert [file.reason for file in report.bad] == ["cannot be read (No such file or directory)"]
    path.write_bytes(data)
    assert inspect(dataset).bad == ()


@pytest.mark.parametrize("content", ["", "[[1]]", "[]", '{"a": 1}', "null"])
def test_a_damaged_memory_is_replaced(tree, decoded, own_cache, content):
    dataset = dataset_of(tree(["a"], ["x"], 3))
    verified(dataset)
    (path,) = own_cache.glob("checks/*.json")
    whole = path.read_text()
    path.write_text(content)
    verified(dataset)
    assert len(decoded) == 6 and path.read_text() == whole


def test_a_cache_that_cannot_be_written_only_warns(tree, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISAM_PEFT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be remembered"):
        assert verified(dataset_of(tree(["a"], ["x"], 2))).hashes is not None


@pytest.mark.slow
def test_pacs_mini_is_clean(pacs_mini):
    report = inspect(dataset_of(pacs_mini))
    assert report.total == 1680 and report.bad == () and report.duplicates_across == ()
    assert report.counts == ((60,) * 7,) * 4
    assert report.sizes == SizeSummary((227, 227), (227, 227), (227, 227))
