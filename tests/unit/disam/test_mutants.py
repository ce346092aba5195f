"""Mutants of the step: each line that carries the exactness, broken, must be caught by a named test.

All mutants run in one process that has imported torch once and forks for each: a start of pytest apiece would take
minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes"),
]

DESCENT = "tests/unit/disam/test_descent.py"
NORMS = "tests/unit/disam/test_masks_and_norms.py"
STEP, MICRO_BATCHES, PRECISION = (
    f"tests/unit/disam/test_{name}.py" for name in ("disam", "micro_batches", "precision")
)


class Mutant(NamedTuple):
    """A change of the source, ``old`` occurring exactly once in ``file``, and the test that must fail on it."""

    file: str
    old: str
    new: str
    killer: str


MUTANTS = {
    "no rank factor": Mutant(
        "ranks.py",
        "return 1 if self.reduces_here else self.size",
        "return 1",
        "tests/helpers/disam_rank_mutants.py::test_ddp",
    ),
    "mean over this rank": Mutant(
        "passes.py",
        "                self._weighted_backward(losses, known.loss_D, known.statistics)\n",
        "                self._weighted_backward(losses, 0 * known.loss_D + 1.0 / (2 * max(len(losses.loss_B), 1)))\n",
        "tests/helpers/disam_rank_mutants.py::test_reduce",
    ),
    "variance over this rank": Mutant(
        "ranks.py",
        "everybodys = self.summed(torch.cat([tensor.reshape(-1) for tensor in mine]))",
        "everybodys = torch.cat([tensor.reshape(-1) for tensor in mine])",
        "tests/helpers/disam_rank_mutants.py::test_reduce",
    ),
    "perturbation per rank": Mutant(
        "passes.py",
        "        self._ranks.add_up_gradients_(self._params)\n        return FirstPass(\n",
        "        return FirstPass(\n",
        "tests/helpers/disam_rank_mutants.py::test_reduce",
    ),
    "no restore": Mutant(
        "perturbation.py",
        "            torch._foreach_copy_(shards, unflatten(snapshot, shards))\n",
        "            pass\n",
        f"{STEP}::test_weights_are_bit_identical_after_a_step",
    ),
    "restore by subtraction": Mutant(
        "perturbation.py",
        "            torch._foreach_copy_(shards, unflatten(snapshot, shards))\n",
        "            e = flatten(shards) - snapshot\n"
        "            torch._foreach_sub_(shards, unflatten(e * (1 + 1e-6), shards))\n",
        f"{STEP}::test_weights_are_bit_identical_after_a_step",
    ),
    "restore after the optimizer": Mutant(
        "perturbation.py",
        "        self.copy_back()\n",
        "        torch.optim.optimizer.register_optimizer_step_post_hook(lambda *_: self.copy_back())\n",
        f"{STEP}::test_two_quadratics_by_hand",
    ),
    "no restore on an interrupt in the restore": Mutant(
        "disam.py",
        "            weights.copy_back()  # an interrupt may have hit the exit of the block above\n",
        "",
        f"{STEP}::test_weights_are_restored_by_an_interrupt_at_any_line_of_pass_2",
    ),
    "restore only where there is a gradient": Mutant(
        "perturbation.py",
        "            torch._foreach_copy_(shards, unflatten(snapshot, shards))\n",
        "            for p, value in zip(group, unflatten(snapshot, group), strict=True):\n"
        "                if p.grad is not None:\n"
        "                    p.copy_(value)\n",
        f"{STEP}::test_row_24_unused_parameters_are_no_error_and_are_restored",
    ),
    "one autocast around both passes": Mutant(
        "disam.py",
        "        torch.clear_autocast_cache()\n",
        "",
        f"{PRECISION}::test_bfloat16_autocast_recasts_the_weights_in_pass_2",
    ),
    "unbiased variance": Mutant(
        "ascent.py",
        "(2.0 * variance_weight / num_present)",
        "(2.0 * variance_weight / (num_present - 1))",
        f"{STEP}::test_two_quadratics_by_hand",
    ),
    "variance with the other sign": Mutant(
        "ascent.py",
        "objective_D) - pull_D",
        "objective_D) + pull_D",
        f"{STEP}::test_two_quadratics_by_hand",
    ),
    "variance over samples weighed as over domains": Mutant(
        "ascent.py",
        "(2.0 * variance_weight / total) * (mean_D - grand_mean)",
        "(2.0 * variance_weight / num_present) * (mean_D - grand_mean)",
        "tests/unit/disam/test_variance_over.py::test_the_ascent_gradient_is_the_authors",
    ),
    "norms that underflow": Mutant(
        "perturbation.py",
        "or not in_range:",
        "or False:",
        f"{NORMS}::test_row_74_the_perturbation_has_its_norm_whatever_the_size_of_the_gradient",
    ),
    "gradients of masked samples": Mutant(
        "micro_batches.py",
        "            guard_gradients((loss_B, *statistics), self.mask_B)\n",
        "            pass\n",
        f"{NORMS}::test_row_74_a_masked_sample_whose_derivative_alone_is_infinite",
    ),
    "what is kept of masked samples": Mutant(
        "micro_batches.py",
        "            with finite_where_masked(mask_B):\n",
        "            if True:\n",
        f"{NORMS}::test_row_74_a_masked_sample_that_is_not_finite_is_as_if_absent",
    ),
    "a batch of none is stepped on": Mutant(
        "disam.py",
        "if self._counts_nothing(batch, first.sums):",
        "if False:",
        f"{NORMS}::test_row_74_a_batch_of_masked_samples_changes_nothing",
    ),
    "absent domains count": Mutant(
        "ascent.py",
        "present_D = count_D > 0",
        "present_D = count_D >= 0",
        f"{STEP}::test_domain_ids_and_num_domains_do_not_change_the_gradient",
    ),
    "variance in both passes": Mutant(
        "disam.py",
        "perturbed = passes.second(first.sums.count_D)",
        "perturbed = passes.first(Target(self.variance_weight, True), 'two_phase', with_plain_gradients=False).sums",
        "tests/unit/disam/test_reference.py::test_trajectory",
    ),
    "gradients of both passes added": Mutant(
        "disam.py",
        "            self._clear_gradients()\n\n            with weights:",
        "            with weights:",
        "tests/unit/disam/test_reference.py::test_trajectory",
    ),
    "no replay of random numbers": Mutant(
        "micro_batches.py",
        "            self._random_state.restore()\n",
        "            pass\n",
        f"{STEP}::test_both_passes_draw_the_same_dropout_and_the_stream_advances_by_one_forward",
    ),
    "random numbers of the first micro-batch for all": Mutant(
        "micro_batches.py",
        "    _random_state: RandomState | None = None\n",
        "    _random_state: RandomState | None = None\n\n"
        "    def __post_init__(self):\n        self._random_state = RandomState.of(self.params)\n",
        f"{MICRO_BATCHES}::test_every_micro_batch_sees_its_own_dropout_masks_in_every_pass",
    ),
    "variance per micro-batch": Mutant(
        "passes.py",
        "self._weighted_backward(losses, weight_D, wanted.statistics)",
        "own = losses.sums()\n"
        "                w = ascent_weights(own.mean_D, own.count_D, target.variance_weight) * own.total / sums.total\n"
        "                self._weighted_backward(losses, w)",
        f"{MICRO_BATCHES}::test_micro_batches_equal_the_whole_batch",
    ),
    "gradients per domain unweighted": Mutant(
        "passes.py",
        "_combined(gradients, total * weight_D)",
        "_combined(gradients, torch.ones_like(weight_D))",
        f"{MICRO_BATCHES}::test_micro_batches_equal_the_whole_batch",
    ),
    "an overflow of pass 1 forgotten": Mutant(
        "disam.py",
        "            poison_unless_(direction.is_finite, self.params)\n",
        "",
        f"{PRECISION}::test_row_29_an_overflow_changes_nothing_but_the_scale",
    ),
    "perturbed by a direction that is not finite": Mutant(
        "perturbation.py",
        "usable = self.is_finite & (self._scaled_norm > 0)",
        "usable = self._scaled_norm == self._scaled_norm",
        f"{STEP}::test_row_28_a_zero_ascent_gradient_gives_a_plain_step",
    ),
    "norm of one shard": Mutant(
        "sharding.py",
        "            dist.all_reduce(value, group=mesh.get_group(mesh_dim))\n",
        "            pass\n",
        "tests/helpers/disam_rank_mutants.py::test_fsdp",
    ),
    "gsam takes all of g1 away": Mutant(
        "descent.py",
        "b - alpha * (a - along.to(b) * of_size_1)",
        "b - alpha * a",
        f"{DESCENT}::test_a_step_is_its_formula",
    ),
    "gsam's products of one tensor": Mutant(
        "descent.py",
        "torch.stack([product.to(products[0].device, widest) for product in products]).sum()",
        "products[0]",
        f"{DESCENT}::test_the_functions_give_the_authors_gradients",
    ),
    "gsam's products vanish": Mutant(
        "descent.py",
        "scaled_second = [b / second_size.to(b) for b in second]",
        "second_size, scaled_second = torch.ones_like(second_size), list(second)",
        f"{DESCENT}::test_products_neither_vanish_nor_overflow_in_float32",
    ),
    "sagm's sum": Mutant("descent.py", "0.5 * a + 0.5 * b", "a + b", f"{DESCENT}::test_a_step_is_its_formula"),
    "sagm does not go back": Mutant(
        "perturbation.py", "self._back * self._divisor", "0 * self._back", f"{DESCENT}::test_a_step_is_its_formula"
    ),
    "sagm goes back along the scaled gradient": Mutant(
        "disam.py",
        "back = self._scale.at_scale_1(torch.full(",
        "back = torch.Tensor.detach(torch.full(",
        f"{DESCENT}::test_a_loss_scale_changes_nothing_but_the_scale",
    ),
    "a gradient of pass 1 alone is lost": Mutant(
        "descent.py",
        "if p.grad is None and p in self._used:",
        "if False:",
        f"{DESCENT}::test_a_parameter_may_have_a_gradient_in_one_pass_or_in_none",
    ),
    "groups without a rho of their own": Mutant(
        "perturbation.py",
        "if any(p in self._rho_factors for p in group):",
        "if False:",
        f"{DESCENT}::test_groups_have_a_rho_of_their_own_and_one_norm",
    ),
}

# Runs in a process of its own: argv holds the root of the copies; prints {name: exit code of pytest}.
RUNNER = """
import contextlib, io, json, os, sys
import numpy, torch, torch.testing, pytest, _pytest.assertion.rewrite
import torch.distributed.fsdp, torch.nn.parallel, torch.utils._foreach_utils, torch._dynamo  # before the forks
torch.set_num_threads(1)
jobs = json.load(sys.stdin)
codes = {}

def run(folder, tests):
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    options = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider", "-c", folder + "/pytest.ini"]
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        return int(pytest.main([*options, *tests]))

running = {}

def wait_for_one():
    child, status = os.wait()
    codes[running.pop(child)] = os.waitstatus_to_exitcode(status)

for name, (folder, tests) in jobs.items():
    if len(running) == 2:
        wait_for_one()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = run(folder, tests)
        finally:
            os._exit(code)
    running[child] = name
while running:
    wait_for_one()
print(json.dumps(codes))
"""


def copy_of_the_project(folder: Path, mutant: Mutant | None) -> Path:
    """The step and its tests, with the mutation applied."""
    package = folder / "disam_peft"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "disam_peft" / name, package)
    shutil.copytree(ROOT / "disam_peft/disam", package / "disam", ignore=shutil.ignore_patterns("__pycache__"))
    os.symlink(ROOT / "tests", folder / "tests")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: device\n    slow: long\npythonpath = .\n")
    if mutant is not None:
        file = package / "disam" / mutant.file
        source = file.read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
        file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def exit_codes(tmp_path_factory):
    """pytest's exit code for each mutant and its killer, and for all killers on the source as it is."""
    folder = tmp_path_factory.mktemp("mutants")
    killers = sorted({mutant.killer for mutant in MUTANTS.values()})
    jobs = {"none": (str(copy_of_the_project(folder / "none", None)), killers)}
    for number, (name, mutant) in enumerate(MUTANTS.items()):
        jobs[name] = (str(copy_of_the_project(folder / str(number), mutant)), [mutant.killer])
    result = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(jobs), capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_source_as_it_is_passes_every_killer(exit_codes):
    assert exit_codes["none"] == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(exit_codes, name):
    assert exit_codes[name] == 1, f"{name}: 1 is 'tests failed', 0 'survived', others 'did not run'"
