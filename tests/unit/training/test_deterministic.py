"""``train.deterministic`` chooses kernels for the time of a run, and ``method.variance_over`` reaches the step."""

import os

import pytest
import torch

from disam_peft.config.method import MethodConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.errors import UserError
from disam_peft.experiments import run
from disam_peft.training import trainer
from disam_peft.training.accelerator import CUBLAS_WORKSPACE, deterministic_kernels, start_accelerator


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.setenv(CUBLAS_WORKSPACE, "")  # so that it is put back
    monkeypatch.delenv(CUBLAS_WORKSPACE)


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


def test_kernels_are_chosen_inside_and_put_back(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with deterministic_kernels(False):
        assert settings() == before and CUBLAS_WORKSPACE not in os.environ
    with pytest.raises(KeyError), deterministic_kernels(True):
        assert settings() == (True, False, False) and os.environ[CUBLAS_WORKSPACE] == ":4096:8"
        raise KeyError
    assert settings() == before


def test_a_workspace_that_is_not_deterministic_is_an_error_on_a_gpu(monkeypatch):
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = r"CUBLAS_WORKSPACE_CONFIG=:0:0 .*unset it, or set it to :4096:8 or :16:8"
    with pytest.raises(UserError, match=text), deterministic_kernels(True):
        pass
    for accepted in (":4096:8", ":16:8"):
        monkeypatch.setenv(CUBLAS_WORKSPACE, accepted)
        with deterministic_kernels(True):
            assert os.environ[CUBLAS_WORKSPACE] == accepted


@pytest.mark.slow
def test_on_a_cpu_a_run_has_the_same_bits_with_it_and_its_recipe_says_so(domains_folder, openclip_name, tmp_path):
    seen = []

    def trained(wanted: bool):
        recipe = Recipe.model_validate(
            {
                "name": f"deterministic-{wanted}",
                "output": tmp_path,
                "backbone": {"name": openclip_name},
                "adapter": {"kind": "lora", "rank": 2, "dropout": 0.2},
                "data": {"root": domains_folder},
                "protocol": {"held_out": "photo"},
                "train": {"steps": 3, "batch_size": 4, "workers": 0, "deterministic": wanted},
                "evaluation": {"workers": 0},
            }
        )
        real = trainer.DISAM.backward

        def backward(self, *arguments, **options):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return real(self, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.DISAM, "backward", backward)
            [outcome] = run.train(recipe)
        adapter = next((outcome.folder / "adapter").glob("*.safetensors")).read_bytes()
        return adapter, (outcome.folder / "recipe.yaml").read_text()

    (plain, recipe), (repeated, asked) = trained(False), trained(True)
    assert plain == repeated
    assert seen == [False] * 3 + [True] * 3
    assert "deterministic: false" in recipe and "deterministic: true" in asked
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_step_has_the_methods_variance(domains_folder):
    from disam_peft.config.data import DataConfig

    dataset, weights = load(DataConfig(root=domains_folder)), [torch.nn.Parameter(torch.zeros(2))]
    for method in (MethodConfig(), MethodConfig(variance_over="samples")):
        disam = trainer._disam(weights, method, TrainConfig(), dataset, start_accelerator())
        assert disam.variance_over == method.variance_over
