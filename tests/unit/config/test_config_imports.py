"""The configs stand on pydantic and PyYAML alone, so that a mistake in a recipe is found at once."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
before = set(sys.modules)
import disam_peft.config.recipe, disam_peft.config.study
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
PYDANTIC = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
YAML = {"yaml", "_yaml"}


def test_configs_import_pydantic_and_yaml_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    # ``_cython...`` and ``_sysconfigdata...`` are named after the machine; YAML's parser and pydantic bring them
    found = {name for name in done.stdout.split() if not name.startswith(("_cython", "cython_", "_sysconfigdata"))}
    assert {"pydantic", "yaml", "disam_peft"} <= found
    assert found - PYDANTIC - YAML - {"disam_peft"} == set()
