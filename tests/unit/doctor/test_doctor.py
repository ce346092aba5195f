"""Each check passes on sound code, and fails on a fault of the kind that it is there for."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from disam_peft.adapters.peft.peft_adapter import PeftAdapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.cli.app import app
from disam_peft.cli.output import print_examination
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.composed_adapters import LpFtConfig
from disam_peft.config.feature_adapters import ClipAdapterConfig, LinearProbeConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig, PeftAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.config.recipe import save_recipe
from disam_peft.disam import passes
from disam_peft.disam.disam import DISAM
from disam_peft.disam.perturbation import AscentDirection, restored
from disam_peft.disam.ranks import Ranks
from disam_peft.doctor import check_result, derivatives, equalities, precision
from disam_peft.doctor import two_processes as ranks
from disam_peft.doctor.examine import Examination, checks, demo_recipe
from disam_peft.doctor.examine import examine as examine_all
from disam_peft.doctor.subject import build_subject
from disam_peft.doctor.two_processes import PROCESSES, TwoProcesses
from disam_peft.errors import UserError
from tests.helpers.ranks import fork_ranks

ADAPTERS = {
    "lora": LoraAdapterConfig(rank=2),
    "lora-both": LoraAdapterConfig(towers=["image", "text"], rank=2),
    "coop": CoOpConfig(context_tokens=4),
    "linear_probe": LinearProbeConfig(),
    "clip_adapter": ClipAdapterConfig(),
    "dora": PeftAdapterConfig(method="dora", options={"r": 2}),
    "lp_ft": LpFtConfig(adapter=LoraAdapterConfig(rank=2)),
    "full": FullConfig(towers=["image", "text"]),
    "full-norms": FullConfig(blocks="none", norms="all"),
}


@pytest.fixture
def recipe(openclip_name):
    def of(adapter="lora", **changes):
        backbone = BackboneConfig(name=openclip_name)
        return demo_recipe().model_copy(update={"backbone": backbone, "adapter": ADAPTERS[adapter], **changes})

    return of


@pytest.fixture
def subject(recipe):
    """Examined in float64, however busy the machine is."""

    def of(adapter="lora", *, exact=torch.float64, **changes):
        built = build_subject(recipe(adapter, **changes), torch.device("cpu"))
        built.exact_dtype, built.seconds = exact, 0.01
        return built

    return of


def verdicts(subject):
    return {check.name: check.run(subject) for check in checks(subject)}


METHODS = [
    MethodConfig(),
    MethodConfig(name="erm"),
    MethodConfig(adaptive=True, rho=1.0),
    MethodConfig(name="disam_gsam", variance_scale="relative", rho_factors={"*": 0.5}),
    MethodConfig(name="disam_sagm", alpha=0.01, variance_form="entropic"),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sound_code_passes(subject, adapter, method):
    found = verdicts(subject(adapter, method=method))
    expected = {precision.name_of("fp16")}
    if adapter in ("coop", "linear_probe", "clip_adapter", "lp_ft"):
        expected.add(derivatives.MERGED)
    if adapter == "dora":
        expected.add(derivatives.DERIVATIVES)
    assert len(found) == 11
    assert {name for name, finding in found.items() if finding.verdict == "not available"} == expected
    assert not [finding for finding in found.values() if finding.verdict == "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sound_code_passes_in_float32(subject, adapter):
    found = verdicts(subject(adapter, exact=torch.float32))
    assert not [finding for finding in found.values() if finding.verdict == "failed"]
    assert "float32" in found[equalities.ACCUMULATED].what


@pytest.mark.slow
def test_what_is_examined_can_tell(subject):
    """Domains with losses apart, and a rank without the first: equalities that hold of anything would show nothing."""
    tested = subject()
    report = tested.disam().backward(tested.losses(), tested.domains_B)
    assert report.domain_losses.diff().min() > 0.1
    assert 0 not in tested.domains_B[-2:]
    again = subject()
    assert torch.equal(again.weights(), tested.weights())
    before = tested.weights()
    assert torch.equal(tested.use(torch.float64).use(torch.float32).weights(), before)


def test_the_step_that_is_examined_is_the_recipes(subject):
    method = {"name": "disam_sagm", "alpha": 0.01, "variance_form": "entropic", "rho": {"from": 0.1, "to": 0.4}}
    tested = subject(method=MethodConfig.model_validate({**method, "rho_factors": {"*lora_A*": 0.5}}))
    disam = tested.disam()
    assert (disam.descent, disam.alpha, disam.variance_form, disam.rho) == ("sagm", 0.01, "entropic", 0.4)
    names = {p: name for name, p in tested.classifier.trainable().items()}
    assert sorted(names[p] for p in disam.rho_factors) == sorted(name for name in names.values() if "lora_A" in name)
    with pytest.raises(UserError, match=r"method\.rho_factors: no trained tensor has a name like 'lora_A'"):
        subject(method=MethodConfig(rho_factors={"lora_A": 0.5})).disam()


# -- faults --------------------------------------------------------------------------------------------------------


def failed(finding):
    return finding.verdict == "failed"


@pytest.mark.parametrize("exact", [torch.float64, torch.float32])
def test_a_gradient_that_is_no_derivative(subject, exact):
    tested = subject(exact=exact)
    assert not failed(derivatives.derivatives(tested))
    tested.losses()().sum().backward()
    largest = max(tested.params, key=lambda p: p.grad.norm())
    tested.gradient()
    largest.register_hook(lambda gradient: gradient / 2)  # as peft's LoRA on open_clip's own attention
    finding = derivatives.derivatives(tested)
    assert failed(finding)
    assert finding.measured > 0.1


def test_a_merge_that_leaves_something_out(subject, monkeypatch):
    real = PeftAdapter.merged

    def partly(self, backbone):
        model = real(self, backbone)
        merged, base = dict(model.named_parameters()), backbone.base_parameters()
        name = next(n for n in merged if not torch.equal(merged[n], base[n]))
        with torch.no_grad():
            merged[name].copy_(base[name])
        return model

    monkeypatch.setattr(PeftAdapter, "merged", partly)
    for exact in (torch.float64, torch.float32):
        assert failed(derivatives.merging(subject(exact=exact)))


def test_weights_that_are_not_restored(subject, monkeypatch):
    monkeypatch.setattr(restored, "copy_back", lambda self: None)
    assert failed(equalities.restoring(subject()))
    assert failed(equalities.restoring_after_an_exception(subject()))


def test_weights_that_are_restored_by_subtracting(subject, monkeypatch):
    copy_back = restored.copy_back

    @torch.no_grad()
    def roughly(self):
        copy_back(self)
        for group in self._groups:
            for p in group:
                p.copy_((p + 0.1) - 0.1)

    monkeypatch.setattr(restored, "copy_back", roughly)
    assert failed(equalities.restoring(subject()))


def test_weights_that_are_restored_on_success_alone(subject, monkeypatch):
    copy_back = restored.copy_back
    monkeypatch.setattr(restored, "__exit__", lambda self, kind, *_: copy_back(self) if kind is None else None)
    monkeypatch.setattr(restored, "copy_back", lambda self: None)
    assert not failed(equalities.restoring(subject()))
    assert failed(equalities.restoring_after_an_exception(subject()))


@pytest.mark.slow
def test_a_second_pass_on_the_same_weights(subject, monkeypatch):
    monkeypatch.setattr(AscentDirection, "add_", lambda self, rho: None)
    for check in (equalities.restoring, equalities.restoring_after_an_exception):
        finding = check(subject())
        assert failed(finding)
        assert "nothing was perturbed" in finding.what
    assert failed(equalities.sam(subject()))


def test_erm_that_is_not(subject, monkeypatch):
    weights = passes.ascent_weights
    monkeypatch.setattr(passes, "ascent_weights", lambda *of: weights(*of) * (1 + 1e-6))
    assert failed(equalities.erm(subject()))


def test_sam_that_is_not(subject, monkeypatch):
    add = AscentDirection.add_
    monkeypatch.setattr(AscentDirection, "add_", lambda self, rho: add(self, rho * (1 + 1e-5)))
    assert failed(equalities.sam(subject()))
    assert not failed(equalities.erm(subject()))


@pytest.mark.slow
@pytest.mark.parametrize("exact", [torch.float64, torch.float32])
def test_a_variance_of_each_piece(subject, monkeypatch, exact):
    """The mean of the pieces' own steps, as plain gradient accumulation would take it."""

    def naive(self, losses, domains, mode):
        summed = [torch.zeros_like(p) for p in self.params]
        total = sum(len(d) for d in domains)
        for loss, of in zip(losses, domains, strict=True):
            self.backward(loss, of)
            for s, p in zip(summed, self.params, strict=True):
                s += p.grad * len(of) / total
        for s, p in zip(summed, self.params, strict=True):
            p.grad = s

    assert not failed(equalities.accumulating(subject(exact=exact)))
    monkeypatch.setattr(DISAM, "backward_accumulated", naive)
    assert failed(equalities.accumulating(subject(exact=exact)))


@pytest.mark.parametrize("factor", [0.5, math.nan])
def test_a_half_precision_that_computes_something_else(subject, monkeypatch, factor):
    real = ClipClassifier.logits
    monkeypatch.setattr(
        ClipClassifier, "logits", lambda s, x: real(s, x) * (factor if torch.is_autocast_enabled("cpu") else 1.0)
    )
    assert failed(precision.stepping(subject(), "bf16"))
    assert not failed(precision.stepping(subject(), "no"))


@pytest.mark.parametrize("exact", [torch.float64, torch.float32])
def test_a_float32_that_overflows(subject, monkeypatch, exact):
    tested = subject(exact=exact)
    real = ClipClassifier.logits
    monkeypatch.setattr(
        ClipClassifier, "logits", lambda s, x: real(s, x) * (math.inf if x.dtype == torch.float32 else 1.0)
    )
    assert failed(precision.stepping(tested, "no"))


def test_casts_of_pass_1_served_to_pass_2(subject, monkeypatch):
    assert not failed(precision.recasting(subject()))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    assert failed(precision.recasting(subject()))


def test_row_30_fp16_on_a_cpu_is_not_available_and_no_failure(subject):
    finding = precision.stepping(subject(), "fp16")
    assert finding.verdict == "not available"
    assert finding.what.endswith("use bf16, or no")


def finding_of_forks(folder):
    """What both ranks find as forks, which have the faults of this process."""
    fork_ranks(2, lambda rank: ranks.work(folder, rank, torch.float64))
    return ranks.compared(folder, torch.float64)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks are of POSIX systems")
def test_what_each_process_does_for_itself(recipe, monkeypatch, tmp_path):
    """A mean and a variance of each rank's own, then gradients of each rank's own."""
    (tmp_path / "mean").mkdir()
    save_recipe(recipe(), tmp_path / "mean/recipe.yaml")
    with monkeypatch.context() as fault:
        fault.setattr(Ranks, "all_sums", lambda self, sums: sums)
        finding = finding_of_forks(tmp_path / "mean")
    assert failed(finding)
    assert finding.measured > 1e-2
    (tmp_path / "gradients").mkdir()
    save_recipe(recipe(), tmp_path / "gradients/recipe.yaml")
    monkeypatch.setattr(Ranks, "add_up_gradients_", lambda self, params: None)
    monkeypatch.setattr(Ranks, "check_replicas_agree", lambda self, norm: None)
    finding = finding_of_forks(tmp_path / "gradients")
    assert failed(finding)
    assert finding.what.startswith("numbers in which the two differ")


@pytest.mark.slow
def test_processes_that_end_or_hang(recipe):
    crash = [sys.executable, "-S", "-c", "raise SystemExit('no gloo here')"]
    finding = TwoProcesses.start(recipe(), torch.float64, crash).finding(60)
    assert failed(finding)
    assert "ended with 1: no gloo here" in finding.what
    hang = TwoProcesses.start(recipe(), torch.float64, [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert hang.finding(0.1).verdict == "not available"
    assert all(rank.poll() is not None for rank in hang.ranks), "nothing is left running"
    assert not Path(hang.folder.name).exists()


# -- all together ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_examination_from_the_command_line(recipe, tmp_path):
    save_recipe(recipe(), tmp_path / "recipe.yaml")
    words = ["doctor", str(tmp_path / "recipe.yaml"), "method.rho=0.1", "--json", str(tmp_path / "f.json")]
    result = CliRunner().invoke(app, [*words, "--seconds", "600"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "f.json").read_text())
    assert [f["verdict"] for f in found["findings"]].count("ok") == 11
    assert found["findings"][-1]["check"] == PROCESSES
    assert found["findings"][-1]["measured"] <= 1e-12
    assert found["environment"]["torch"] == torch.__version__.split("+")[0]
    assert "11 ok, 1 not available" in result.output


@pytest.mark.slow
def test_a_failure_is_an_exit_code_and_a_broken_check_stops_no_other(recipe, monkeypatch, tmp_path):
    def broken(self, *args, **options):
        raise RuntimeError("[no] kernel")

    monkeypatch.setattr(DISAM, "backward_accumulated", broken)
    monkeypatch.setattr(TwoProcesses, "start", lambda *_: None)
    save_recipe(recipe(), tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "recipe.yaml"), "--seconds", "600"])
    assert result.exit_code == 1
    assert "RuntimeError: [no] kernel" in result.output
    assert "9 ok, 1 failed, 2 not available" in result.output


def test_checks_that_would_take_too_long_are_left_out_and_say_so(recipe):
    found = examine_all(recipe(), seconds=1e-3)
    assert [finding.verdict for finding in found.findings] == ["not available"] * 12
    assert all("--seconds gives more time" in finding.what for finding in found.findings)


def test_the_table_fits_80_columns_and_nan_fails():
    findings = (check_result.measured("a [claim]", "numbers, " * 12, math.nan, 0), check_result.unavailable("b", "why"))
    console = Console(width=80, record=True, file=io.StringIO())
    print_examination(Examination({"torch": "1"}, "demo, lora, disam", findings, 1.5), console)
    assert Examination({}, "", findings, 0.0).as_dict()["findings"][0]["measured"] is None, "JSON has no NaN"
    text = console.export_text()
    assert "a [claim]" in text
    assert "1 failed, 1 not available" in text
    assert max(map(len, text.splitlines())) <= 80
