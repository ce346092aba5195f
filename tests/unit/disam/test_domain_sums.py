"""The closed form of the ascent weights against autograd and against numbers worked out by hand."""

import pytest
import torch

from disam_peft.disam.ascent import ascent_weights
from disam_peft.disam.domain_sums import domain_index, domain_sums


def test_weights_equal_autograd_through_the_variance():
    """500 random batches of 1 to 6 domains, some of them missing: at most 1e-12."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    worst, missing = 0.0, 0
    for _ in range(500):
        num_domains, batch = draw(1, 7), draw(1, 40)
        domains_B = torch.randint(0, num_domains, (batch,), generator=generator)
        loss_B = (5 * torch.rand(batch, generator=generator, dtype=torch.float64)).requires_grad_()
        variance_weight = 2.0 * float(torch.rand((), generator=generator))
        present = domains_B.unique()
        missing += len(present) < num_domains
        mean_K = torch.stack([loss_B[domains_B == d].mean() for d in present])
        (loss_B.mean() - variance_weight * mean_K.var(correction=0)).backward()

        ids_D, index_B = domain_index(domains_B, num_domains)
        sums = domain_sums(loss_B, index_B, ids_D)
        weight_B = ascent_weights(sums.mean_D, sums.count_D, variance_weight)[index_B]
        worst = max(worst, float((weight_B - loss_B.grad).abs().max()))
    assert missing > 50
    assert worst <= 1e-12


def test_domain_weights_sum_to_one_and_turn_negative_beyond_the_bound():
    mean_D, count_D = torch.tensor([1.0, 2.0, 6.0]).double(), torch.tensor([2.0, 4.0, 2.0]).double()
    bound = 2 * 3 / (2 * (6 - 3) * 8)  # lambda at which w_2 = n_d/N - (2 lambda/K)(L_d - Lbar) is zero
    for variance_weight, sign in ((0.99 * bound, 1), (1.01 * bound, -1)):
        weights_D = count_D * ascent_weights(mean_D, count_D, variance_weight)
        assert weights_D.sum().item() == pytest.approx(1, abs=1e-15)
        assert weights_D[2].sign() == sign


def test_float32_losses_keep_weights_of_float64():
    ids_D, index_B = domain_index(torch.tensor([0, 0, 1]), None)
    sums = domain_sums(torch.tensor([1.0, 2.0, 4.0]), index_B, ids_D)
    weight_D = ascent_weights(sums.mean_D, sums.count_D, 0.3)
    assert weight_D.dtype == torch.float64
    # 1/3 - (0.6/2) * (1.5 - 2.75)/2 and 1/3 - (0.6/2) * (4 - 2.75)/1
    assert weight_D.tolist() == pytest.approx([1 / 3 + 0.1875, 1 / 3 - 0.375], abs=1e-15)


def test_lambda_zero_gives_one_over_n_even_where_a_loss_is_infinite():
    weight_D = ascent_weights(torch.tensor([1.0, torch.inf]).double(), torch.tensor([2.0, 1.0]).double(), 0.0)
    assert weight_D.tolist() == [1 / 3, 1 / 3]


def test_ids_need_not_be_contiguous():
    ids_D, index_B = domain_index(torch.tensor([-5, 1000, -5, 7]), None)
    assert ids_D.tolist() == [-5, 7, 1000]
    sums = domain_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), index_B, ids_D)
    assert sums.sum_D.tolist() == [5, 8, 2]
    assert sums.count_D.tolist() == [2, 1, 1]
    assert sums.mean.item() == 15 / 4


def test_an_absent_domain_has_no_weight_and_does_not_count_as_a_domain():
    sums = domain_sums(torch.tensor([1.0, 3.0]), torch.tensor([0, 2]), torch.arange(4))
    assert sums.mean_D[[0, 2]].tolist() == [1, 3]
    assert sums.mean_D[[1, 3]].isnan().all()
    # K = 2, Lbar = 2: c = 1/2 -+ (2 * 0.25 / 2) * 1
    assert ascent_weights(sums.mean_D, sums.count_D, 0.25).tolist() == [0.75, 0, 0.25, 0]
