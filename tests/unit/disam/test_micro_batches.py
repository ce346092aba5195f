"""Micro-batches against the whole batch: the same gradient, in every mode."""

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.disam import passes
from disam_peft.disam.domain_objective import DomainObjective
from disam_peft.disam.micro_batches import SEVERAL, EffectiveBatch
from disam_peft.disam.ranks import Ranks

BATCH, DOMAINS = 28, torch.tensor([0, 1, 2, 0, 0, 2, 1] * 4)


def problem(dtype=torch.float64, dropout=0.0):
    """A network and a batch of 28 samples in three domains of unequal size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).to(dtype)
    x, y = torch.randn(BATCH, 6, dtype=dtype), torch.randint(0, 4, (BATCH,))

    def loss_of(places):
        # the domains' losses lie apart, or the variance would not matter
        factor_B = 1.0 + 2.0 * DOMAINS[places].to(dtype)
        return lambda: factor_B * nn.functional.cross_entropy(model(x[places]), y[places], reduction="none")

    return model, loss_of


def mixed(count):
    """``count`` micro-batches of unequal size and of several domains."""
    return torch.arange(BATCH).tensor_split(count)


def of_one_domain(count):
    """``count`` micro-batches, each of one domain, in no order."""
    per_domain = {3: (1, 1, 1), 4: (2, 1, 1), 6: (2, 2, 2), 7: (3, 2, 2)}[count]
    pieces = [p for d in range(3) for p in torch.eq(DOMAINS, d).nonzero()[:, 0].tensor_split(per_domain[d])]
    return [pieces[k] for k in torch.randperm(count, generator=torch.Generator().manual_seed(count))]


def gradients(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def accumulated(disam, loss_of, pieces, mode="auto", masks=None):
    return disam.backward_accumulated([loss_of(p) for p in pieces], [DOMAINS[p] for p in pieces], masks, mode=mode)


def disam_for(model, **options):
    return DISAM(model.parameters(), **{"rho": 0.3, "variance_weight": 0.8, **options})


@pytest.mark.parametrize(
    ("mode", "pieces"),
    [("two_phase", mixed(k)) for k in (1, 2, 4, 7)] + [("per_domain", of_one_domain(k)) for k in (3, 4, 6, 7)],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"ascent_cosine": True, "num_domains": 5}])
def test_micro_batches_equal_the_whole_batch(mode, pieces, options):
    model, loss_of = problem()
    whole = disam_for(model, **options).backward(loss_of(torch.arange(BATCH)), DOMAINS)
    expected = gradients(model)
    report = accumulated(disam_for(model, **options), loss_of, pieces, mode)
    assert report.mode == mode
    assert (gradients(model) - expected).abs().max() <= 1e-12
    for name in ("loss", "perturbed_loss", "domain_losses", "domain_weights", "domain_counts", "ascent_norm"):
        torch.testing.assert_close(getattr(report, name), getattr(whole, name), rtol=0, atol=1e-12, equal_nan=True)
    if "ascent_cosine" in options:
        assert report.ascent_cosine.item() == pytest.approx(whole.ascent_cosine.item(), abs=1e-12)
        assert report.ascent_cosine.item() < 0.999


def test_a_step_per_micro_batch_would_be_seen():
    """The mean of the micro-batches' own steps is another gradient: their variances are not the batch's."""
    model, loss_of = problem()
    disam_for(model).backward(loss_of(torch.arange(BATCH)), DOMAINS)
    expected, naive = gradients(model), 0.0
    for piece in mixed(4):
        disam_for(model).backward(loss_of(piece), DOMAINS[piece])
        naive = naive + gradients(model) / 4
    assert (naive - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("mode", "pieces"), [("two_phase", mixed(4)), ("per_domain", of_one_domain(6))])
def test_every_micro_batch_sees_its_own_dropout_masks_in_every_pass(mode, pieces):
    """With rho near 0 both passes compute one function; its gradient is the one of M forwards drawn in order."""
    model, loss_of = problem(dropout=0.5)
    seen = [[] for _ in pieces]

    def recorded(k):
        def call():
            loss_B = loss_of(pieces[k])()
            seen[k].append(loss_B.detach())
            return loss_B

        return call

    torch.manual_seed(3)
    disam = disam_for(model, rho=1e-12)
    disam.backward_accumulated([recorded(k) for k in range(len(pieces))], [DOMAINS[p] for p in pieces], mode=mode)
    after, ours = torch.rand(1), gradients(model)
    for losses in seen:
        assert len(losses) in (2, 3)
        assert all((loss_B - losses[0]).abs().max() <= 1e-9 for loss_B in losses)

    torch.manual_seed(3)
    for p in model.parameters():
        p.grad = None
    for piece in pieces:
        (loss_of(piece)().sum() / BATCH).backward()
    assert (gradients(model) - ours).abs().max() <= 1e-9
    assert torch.equal(after, torch.rand(1)), "the stream advances by one forward of each micro-batch"


def test_forwards_of_each_way():
    model, loss_of = problem()
    calls = 0

    def counted(piece):
        def call():
            nonlocal calls
            calls += 1
            return loss_of(piece)()

        return call

    expected = {
        ("two_phase", 0.8, 0.3): 4 + 3 + 4,  # losses, all but the last again, pass 2
        ("per_domain", 0.8, 0.3): 4 + 4,
        ("auto", 0.0, 0.3): 4 + 4,  # SAM: weights need no losses
        ("auto", 0.8, 0.0): 4,  # ERM
    }
    pieces = of_one_domain(4)
    for (mode, variance_weight, rho), forwards in expected.items():
        calls = 0
        disam = disam_for(model, variance_weight=variance_weight, rho=rho)
        disam.backward_accumulated([counted(p) for p in pieces], [DOMAINS[p] for p in pieces], mode=mode)
        assert calls == forwards, (mode, variance_weight, rho)


def test_auto_keeps_gradients_per_domain_where_they_fit(monkeypatch):
    model, loss_of = problem()
    disam = disam_for(model)
    assert accumulated(disam, loss_of, mixed(4)).mode == "two_phase"
    assert accumulated(disam, loss_of, of_one_domain(6)).mode == "per_domain"
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(passes, "MAX_STORED_GRADIENT_BYTES", 3 * num_bytes)
    assert accumulated(disam, loss_of, of_one_domain(6)).mode == "per_domain"
    monkeypatch.setattr(passes, "MAX_STORED_GRADIENT_BYTES", 3 * num_bytes - 1)
    assert accumulated(disam, loss_of, of_one_domain(6)).mode == "two_phase"


@pytest.mark.parametrize("mode", ["auto", "two_phase", "per_domain"])
@pytest.mark.parametrize(("rho", "variance_weight"), [(0.0, 0.8), (0.3, 0.0)])
def test_row_25_erm_and_sam_in_micro_batches(mode, rho, variance_weight):
    model, loss_of = problem()
    disam_for(model, rho=rho, variance_weight=variance_weight).backward(loss_of(torch.arange(BATCH)), DOMAINS)
    expected = gradients(model)
    accumulated(disam_for(model, rho=rho, variance_weight=variance_weight), loss_of, of_one_domain(6), mode)
    assert (gradients(model) - expected).abs().max() <= 1e-12


def test_one_micro_batch_is_the_plain_step_bit_for_bit():
    model, loss_of = problem(torch.float32)
    everything = torch.arange(BATCH)
    disam_for(model).backward(loss_of(everything), DOMAINS)
    expected = gradients(model)
    accumulated(disam_for(model), loss_of, [everything])
    assert torch.equal(gradients(model), expected)


@pytest.mark.parametrize("mode", ["two_phase", "per_domain"])
def test_masked_samples_count_nowhere(mode):
    """Padding, of any domain and with a loss of any size, and a micro-batch that is empty."""
    model, loss_of = problem()
    pieces = of_one_domain(6)
    disam_for(model).backward(loss_of(torch.arange(BATCH)), DOMAINS)
    expected = gradients(model)
    padded, masks, domains = [], [], []
    for k, piece in enumerate([*pieces, torch.arange(0)]):

        def call(piece=piece):
            loss_B = loss_of(piece)()
            return torch.cat([loss_B[:1] * 1e6, loss_B]) if len(loss_B) else loss_B

        padded.append(call)
        masks.append(torch.arange(len(piece) + 1) > 0 if len(piece) else None)
        domains.append(torch.cat([torch.tensor([k % 3]), DOMAINS[piece]]) if len(piece) else DOMAINS[piece])
    report = disam_for(model).backward_accumulated(padded, domains, masks, mode=mode)
    assert report.domain_counts.sum() == BATCH
    assert (gradients(model) - expected).abs().max() <= 1e-12
    report = disam_for(model).backward(padded[0], domains[0], masks[0])
    assert report.loss.item() == pytest.approx(loss_of(pieces[0])().mean().item(), abs=1e-12)


def test_parameters_of_one_domain_alone_are_weighted_too():
    """Domain 1 has a parameter that domain 0 does not touch, and one is touched by none."""
    model, loss_of = problem()
    only_1, unused = nn.Parameter(torch.ones((), dtype=torch.float64)), nn.Parameter(torch.ones(2))
    pieces = [torch.eq(DOMAINS, d).nonzero()[:, 0] for d in range(3)]
    calls = [lambda p=p, d=d: loss_of(p)() * (only_1 if d == 1 else 1.0) for d, p in enumerate(pieces)]
    params = [*model.parameters(), only_1, unused]
    found = []
    for mode in ("two_phase", "per_domain"):
        DISAM(params, 0.3, 0.8).backward_accumulated(calls, [DOMAINS[p] for p in pieces], mode=mode)
        found.append(torch.cat([gradients(model), only_1.grad.reshape(1)]))
        assert unused.grad is None
    assert (found[0] - found[1]).abs().max() <= 1e-12


def test_an_autocast_around_all_micro_batches_is_one_per_forward():
    """Casts made in the pass without a graph have none: served to pass 1, they would cut it off from the weights."""
    model, loss_of = problem(torch.float32)

    def inside(piece):
        def call():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss_of(piece)()

        return call

    disam = disam_for(model)
    pieces = mixed(4)
    disam.backward_accumulated([inside(p) for p in pieces], [DOMAINS[p] for p in pieces])
    expected = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulated(disam, loss_of, pieces)
    assert torch.equal(gradients(model), expected)


@pytest.mark.parametrize(
    ("mode", "stop_at"), [*(("two_phase", k) for k in range(1, 12)), *(("per_domain", k) for k in range(1, 9))]
)
def test_weights_are_restored_when_any_forward_raises(mode, stop_at):
    model, loss_of = problem()
    before, calls = [p.detach().clone() for p in model.parameters()], 0

    def failing(piece):
        def call():
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            return loss_of(piece)()

        return call

    pieces = of_one_domain(4)
    with pytest.raises(KeyboardInterrupt):
        disam_for(model).backward_accumulated([failing(p) for p in pieces], [DOMAINS[p] for p in pieces], mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_former_name_of_mode_still_works():
    model, loss_of = problem()
    pieces = of_one_domain(6)
    calls, domains = [loss_of(p) for p in pieces], [DOMAINS[p] for p in pieces]
    with pytest.warns(DeprecationWarning, match=r"now called mode=.*goes away in 0\.3"):
        report = disam_for(model).backward_accumulated(calls, domains, way="two_phase")
    with pytest.warns(DeprecationWarning, match=r"StepReport\.way is now called mode; it goes away in 0\.3"):
        assert report.mode == report.way == "two_phase", "auto would keep a gradient for each domain"


def test_arguments_that_do_not_fit_are_errors():
    model, loss_of = problem()
    disam = disam_for(model)
    piece, everything = torch.arange(3), torch.arange(BATCH)
    for call, message in (
        (lambda: disam.backward_accumulated([loss_of(piece)], []), "1 losses, 0 tensors of domains"),
        (lambda: accumulated(disam, loss_of, [piece], masks=[]), "0 masks"),
        (lambda: accumulated(disam, loss_of, [everything], "per_domain"), "1 micro-batches .* several domains"),
        (lambda: accumulated(disam, loss_of, [everything], "fastest"), "auto, two_phase, per_domain, not 'fastest'"),
        (lambda: accumulated(disam, loss_of, [piece], masks=[torch.ones(3)]), "a mask must be bool"),
        (lambda: disam.backward_accumulated([], []), "the batch is empty"),
        (lambda: disam.backward(loss_of(piece), DOMAINS[piece].reshape(1, 3)), "one id per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_host_knows_of_domains_what_the_device_would_say():
    """Handed over on the host the domains are counted there; with masks, or ids of any value, on the device."""
    pieces = [torch.tensor(ids) for ids in ([2, 2], [0, 2], [], [1], [0, 0, 1], [0])]
    params = [torch.zeros(1, requires_grad=True)]

    def batch(masks, num_domains):
        calls = [lambda: None] * len(pieces)
        return EffectiveBatch.of(
            calls,
            pieces,
            masks,
            num_domains=num_domains,
            params=params,
            ranks=Ranks.of(None, False),
            objective=DomainObjective(),
        )

    on_host = batch(None, 3)
    assert on_host.index_on_host_MB is not None
    assert on_host.single_domains() == [2, SEVERAL, 0, 1, SEVERAL, 0]
    for other in (batch(None, None), batch([None] * len(pieces), 3)):
        assert other.index_on_host_MB is None
        assert other.single_domains() == on_host.single_domains()
    one_counts = [None, torch.tensor([False, True]), None, None, torch.tensor([True, True, False]), None]
    assert batch(one_counts, 3).single_domains() == [2, 2, 0, 1, 0, 0]
