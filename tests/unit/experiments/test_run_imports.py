"""Importing the whole pipeline loads torch and accelerate; every other library waits until it is used."""

from __future__ import annotations

import subprocess
import sys

CODE = "import sys, disam_peft.experiments.run; print(*sys.modules)"
ABSENT = {
    *("transformers", "open_clip", "timm", "peft", "datasets", "pyarrow", "pandas"),
    *("torchvision", "matplotlib", "scipy", "sklearn", "jinja2", "torchmetrics", "tensorboard"),
    *("sympy", "triton", "onnx", "optuna", "wandb", "rich", "typer"),
    *("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "torch.utils.tensorboard"),
}


def test_importing_the_run_loads_no_library_before_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "accelerate", "numpy", "disam_peft.training.fit"} <= loaded
    assert loaded & ABSENT == set()


def test_a_finished_run_is_found_and_runs_are_listed_without_torch() -> None:
    code = "import sys, disam_peft.experiments.kept_runs, disam_peft.experiments.run_list; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "disam_peft.experiments.run_folder" in loaded
    assert loaded & {"torch", "accelerate", "transformers", "open_clip", "datasets", "scipy", "matplotlib"} == set()
