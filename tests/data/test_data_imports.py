"""Reading a config must not cost an import of torch or datasets: `--help` waits for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import disam_peft.data


def test_configs_import_nothing_heavy():
    code = (
        "import sys; from disam_peft.data import AugmentConfig, DataConfig; DataConfig(root='r'); AugmentConfig();"
        "print(sorted({'torch', 'torchvision', 'datasets', 'pyarrow', 'numpy', 'PIL', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_has_a_home():
    assert len(disam_peft.data.__all__) > 15
    for name in disam_peft.data.__all__:
        assert getattr(disam_peft.data, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        disam_peft.data.nonsense  # noqa: B018
