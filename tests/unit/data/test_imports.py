"""Reading a config must not cost an import of torch or datasets: `--help` waits for it."""

from __future__ import annotations

import subprocess
import sys


def test_configs_import_nothing_heavy():
    code = (
        "import sys; from disam_peft.config.data import AugmentConfig, DataConfig;"
        "DataConfig(root='r'); AugmentConfig();"
        "print(sorted({'torch', 'torchvision', 'datasets', 'pyarrow', 'numpy', 'PIL', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
