"""Loss scalers, autocast and overflow: what half precision does to a step, and what it must not."""

import copy

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from tests.helpers.overflow import Overflow

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y, domains = torch.randn(12, 6), torch.randint(0, 4, (12,)), torch.arange(12) % 3
    return model.to(device), x.to(device), y.to(device), domains.to(device)


def bits(tensors):
    return [t.detach().clone() for t in tensors]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def state_tensors(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def scaled_disam(model, scaler, **options):
    options = {"rho": 0.1, "variance_weight": 0.8, **options}
    return DISAM(model.parameters(), backward=lambda loss: scaler.scale(loss).backward(), **options)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**16])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_loss_scaler_changes_no_bit_in_float32(scale, pieces, adaptive):
    """20 steps of AdamW, against unscaled arithmetic; clipping between unscale and step."""
    model, x, y, domains = problem()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def train(model, disam, step):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(20):
            parts = torch.arange(12).tensor_split(pieces)
            calls = [lambda p=p: nn.functional.cross_entropy(model(x[p]), y[p], reduction="none") for p in parts]
            report = disam.backward_accumulated(calls, [domains[p] for p in parts])
            step(optimizer, model)
        return report

    def scaled_step(optimizer, model):
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

    def plain_step(optimizer, model):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    start = bits(model.parameters())
    ours = train(model, scaled_disam(model, scaler, adaptive=adaptive), scaled_step)
    theirs = train(twin, DISAM(twin.parameters(), 0.1, 0.8, adaptive), plain_step)
    assert scaler.get_scale() == scale
    assert same_bits(model.parameters(), twin.parameters())
    assert not same_bits(start, model.parameters())
    assert ours.ascent_norm.item() == theirs.ascent_norm.item()


@pytest.mark.parametrize("bad_call", [1, 2], ids=["pass 1", "pass 2"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_row_29_an_overflow_changes_nothing_but_the_scale(bad_call, where):
    model, x, y, domains = problem()
    params = list(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.AdamW(params, lr=0.01)
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        loss_B = nn.functional.cross_entropy(model(x), y, reduction="none")
        if calls != bad_at:
            return loss_B
        return loss_B * torch.inf if where == "loss" else Overflow.apply(loss_B)

    disam = scaled_disam(model, scaler)
    for step in range(5):
        calls, bad_at = 0, bad_call if step == 3 else 0
        before, state_before, scale = bits(params), bits(state_tensors(optimizer)), scaler.get_scale()
        report = disam.backward(loss, domains)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert same_bits(before, params)
            assert len(state_before) > 0
            assert same_bits(state_before, state_tensors(optimizer))
            assert scaler.get_scale() == scale / 2, "halved once, not once per pass"
            if where == "loss" or bad_call == 1:
                assert not bool(report.is_finite)
        else:
            assert bool(report.is_finite)
            assert not same_bits(before, params)
            assert scaler.get_scale() == scale


def test_bfloat16_autocast_recasts_the_weights_in_pass_2():
    """20 steps against two passes by hand, without any cache of casts: bit for bit."""
    model, x, y, domains = problem()
    twin = copy.deepcopy(model)
    params = list(twin.parameters())

    def loss_of(model, cache_enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), y, reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    disam = DISAM(model.parameters(), rho=0.3, variance_weight=0.0)
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # one around both passes, at that
            disam.backward(lambda: loss_of(model, True), domains)
        optimizer.step()

    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    stale = 0.0
    for _ in range(20):
        first = torch.autograd.grad(loss_of(twin, False).mean(), params)
        norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in first]))
        before = bits(params)
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p.add_(g * (0.3 / norm))
        second = torch.autograd.grad(loss_of(twin, False).mean(), params)
        stale = max(stale, max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)))
        with torch.no_grad():
            for p, value, g in zip(params, before, second, strict=True):
                p.copy_(value)
                p.grad = g
        optimizer.step()
    assert same_bits(model.parameters(), params)
    assert stale > 1e-2, "on old casts pass 2 would give another gradient"


# -- row 31 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad_call", [1, 2], ids=["pass 1", "pass 2"])
def test_row_31_out_of_memory_restores_and_suggests_a_micro_batch(bad_call):
    model, x, y, domains = problem()
    before, calls = bits(model.parameters()), 0

    def loss():
        nonlocal calls
        calls += 1
        if calls == bad_call:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate") as caught:
        DISAM(model.parameters(), 0.3).backward(loss, domains)
    assert same_bits(before, model.parameters())
    assert all(p.grad is None for p in model.parameters())
    [note] = caught.value.__notes__
    assert "up to 12 samples at once" in note
    assert "micro-batches of at most 6" in note


def test_row_31_of_micro_batches_the_largest_counts_and_one_sample_cannot_be_split():
    def loss():
        raise torch.OutOfMemoryError("no")

    w = torch.ones(1, requires_grad=True)
    for sizes, words in (((2, 9, 3), "at most 4 samples"), ((1, 1), "smaller model or image size")):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            DISAM([w]).backward_accumulated([loss] * len(sizes), [torch.zeros(n).long() for n in sizes])
        assert words in caught.value.__notes__[0]


# -- on a device -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_device_stays_near_float32(dtype):
    """Restore bit for bit, and a direction that half precision hardly turns."""
    model, x, y, domains = problem("cuda")
    before = bits(model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)

    def loss(enabled):
        with torch.autocast("cuda", dtype=dtype, enabled=enabled):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), y, reduction="none")

    found = []
    for enabled in (False, True):
        scaled_disam(model, scaler).backward(lambda enabled=enabled: loss(enabled), domains)
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert same_bits(before, model.parameters())
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.999


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("bad_call", [1, 2])
def test_row_29_accelerate_skips_an_overflow_on_a_device(bad_call):
    from accelerate import Accelerator

    model, x, y, domains = problem("cuda")
    params = list(model.parameters())
    accelerator = Accelerator(mixed_precision="fp16")
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(params, lr=0.01))
    disam = DISAM(params, 0.1, 0.8, num_domains=3, backward=accelerator.backward)
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        with accelerator.autocast():
            logits = model(x)
        loss_B = nn.functional.cross_entropy(logits.float(), y, reduction="none")
        return loss_B * torch.inf if calls == bad_at else loss_B

    for step in range(8):
        calls, bad_at = 0, bad_call if step == 6 else 0
        before, scale = bits(params), accelerator.scaler.get_scale()
        disam.backward(loss, domains)
        accelerator.clip_grad_norm_(params, 1.0)
        optimizer.step()
        assert optimizer.step_was_skipped == same_bits(before, params)
        if step == 6:
            assert optimizer.step_was_skipped
            assert accelerator.scaler.get_scale() == scale / 2
    assert not optimizer.step_was_skipped


@pytest.mark.gpu
@cuda
def test_micro_batches_and_their_dropout_on_a_device():
    model, x, y, domains = problem("cuda")
    model = nn.Sequential(model[0], nn.Dropout(0.5), model[2]).double()
    x, seen = x.double(), []
    parts = torch.arange(12, device="cuda").tensor_split(3)

    def call(p):
        loss_B = nn.functional.cross_entropy(model(x[p]), y[p], reduction="none")
        seen.append(loss_B.detach())
        return loss_B

    disam = DISAM(model.parameters(), 1e-12, 0.8, num_domains=3)
    disam.backward_accumulated([lambda p=p: call(p) for p in parts], [domains[p] for p in parts], mode="two_phase")
    values, again = torch.cat(seen[:3]), torch.cat([*seen[3:5], seen[2]])
    assert torch.allclose(values, again, atol=1e-9)
    assert torch.allclose(values, torch.cat(seen[5:]), atol=1e-9)
