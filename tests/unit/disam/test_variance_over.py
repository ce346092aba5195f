"""``variance_over``: the paper's variance over domains, or its code's, which weighs each domain by its samples."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from disam_peft import DISAM
from disam_peft.disam.ascent import ascent_weights
from tests.helpers.paths import ROOT
from tests.helpers.ranks import fork_ranks, gloo_group

REFERENCE = ROOT / "tests/reference/disam_published_variance.npz"
NAMES = {"samples": "published", "domains": "paper"}


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE, allow_pickle=False) as file:
        found = {name: torch.from_numpy(file[name]) for name in file if name != "meta"}
        return json.loads(str(file["meta"]))["cases"], found


@pytest.mark.parametrize("case", ["balanced", "unequal", "unequal_lambda0.1", "two"])
@pytest.mark.parametrize("over", ["samples", "domains"])
def test_the_ascent_gradient_is_the_authors(reference, case, over):
    cases, found = reference
    logits = found[f"{case}/logits"].clone().requires_grad_()
    labels, domains = found[f"{case}/labels"], found[f"{case}/domains"]
    losses = cross_entropy(logits, labels, reduction="none")
    counts = torch.bincount(domains).double()
    means = torch.zeros_like(counts).index_add(0, domains, losses.detach()) / counts
    weight_D = ascent_weights(means, counts, cases[case]["lam"], variance_over=over)
    (weight_D[domains] * losses).sum().backward()
    assert torch.allclose(logits.grad, found[f"{case}/{NAMES[over]}_grad_logits"], atol=1e-15, rtol=0)
    assert (weight_D * counts).sum().item() == pytest.approx(1, abs=1e-14)


def test_the_two_differ_where_domains_are_not_balanced_alone(reference):
    _, found = reference
    differ = {
        case: not torch.allclose(found[f"{case}/published_grad_logits"], found[f"{case}/paper_grad_logits"])
        for case in ("balanced", "unequal", "two")
    }
    assert differ == {"balanced": False, "unequal": True, "two": True}


SIZES = (7, 3, 2)  # of three domains
DOMAINS = torch.cat([torch.full((n,), d) for d, n in enumerate(SIZES)])
X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
RHO, LAMBDA = 0.3, 0.7


def start() -> torch.Tensor:
    return torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()


def losses_of(w, samples):
    return torch.tanh(X[samples] @ w - Y[samples]) ** 2


def directly(over: str) -> torch.Tensor:
    """The step by autograd through the variance itself."""
    w = start()
    losses = losses_of(w, slice(None))
    means = torch.stack([losses[d == DOMAINS].mean() for d in range(3)])
    shares = torch.tensor(SIZES).double() / 12 if over == "samples" else torch.full((3,), 1 / 3, dtype=torch.float64)
    variance = (shares * (means - (shares * means).sum()) ** 2).sum()
    [ascent] = torch.autograd.grad(losses.mean() - LAMBDA * variance, w)
    there = (w + RHO * ascent / ascent.norm()).detach().requires_grad_()
    [gradient] = torch.autograd.grad(losses_of(there, slice(None)).mean(), there)
    return gradient


@pytest.mark.parametrize("over", ["samples", "domains"])
@pytest.mark.parametrize("mode", ["one", "two_phase", "per_domain"])
def test_a_step_equals_autograd_through_the_variance(over, mode):
    w = start()
    disam = DISAM([w], RHO, LAMBDA, variance_over=over)
    if mode == "one":
        report = disam.backward(lambda: losses_of(w, slice(None)), DOMAINS)
    else:
        parts = [torch.arange(12)[:5], torch.arange(12)[5:7], torch.arange(12)[7:10], torch.arange(12)[10:]]
        closures = [lambda part=part: losses_of(w, part) for part in parts]
        report = disam.backward_accumulated(closures, [DOMAINS[part] for part in parts], mode=mode)
        assert report.mode == mode
    assert torch.allclose(w.grad, directly(over), atol=1e-15, rtol=0)
    assert report.domain_weights.sum().item() == pytest.approx(1, abs=1e-14)


def test_it_is_the_same_on_two_ranks(tmp_path):
    """Of which one has no sample of the third domain."""

    def work(rank: int) -> None:
        with gloo_group(tmp_path, rank, 2):
            own = torch.arange(12)[[slice(0, 9), slice(9, 12)][rank]]
            w = start()
            disam = DISAM([w], RHO, LAMBDA, variance_over="samples", reduce_gradients=True)
            disam.backward(lambda: losses_of(w, own), DOMAINS[own])
            assert torch.allclose(w.grad, directly("samples"), atol=1e-14, rtol=0)

    fork_ranks(2, work)


def test_an_unknown_choice_is_an_error_at_any_time():
    with pytest.raises(ValueError, match="variance_over must be one of domains, samples, not 'classes'"):
        DISAM([start()], variance_over="classes")
    disam = DISAM([start()])
    assert disam.variance_over == "domains"
    with pytest.raises(ValueError, match="not 'sample'"):
        disam.variance_over = "sample"  # type: ignore[assignment]
