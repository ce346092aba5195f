"""The documentation is built without a warning, and needs nothing from elsewhere."""

import os
import re
import subprocess
import sys

from tests.helpers.paths import ROOT


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md"))) > 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link[^>]*\shref=[\"']?([^\"'\s>]+)", text)
        assert loaded
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page.name
