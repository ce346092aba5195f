"""Mixup between domains: who is mixed with whom, on any number of processes, from whatever batches are made of."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig, MixupConfig, require_mixable
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.data.loading.batches import make_sampler, training_batches
from disam_peft.data.loading.mixup import MixedBatches, draw_partners, mixed
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureKey, open_or_build
from disam_peft.data.stores.pixels import open_or_build as open_pixels
from disam_peft.data.transforms.augment import TrainTransform
from disam_peft.data.transforms.batch_augment import BatchAugment
from disam_peft.errors import UserError

SEEN = Preprocessing((8, 8), (0.5,) * 3, (0.25,) * 3, "bicubic")
CPU = torch.device("cpu")
DOMAINS = np.repeat([2, 5, 9], 4)
MIXUP = AugmentConfig(flip=0, mixup=MixupConfig(alpha=0.5))


@pytest.fixture
def root(tree):
    return tree(["a", "b", "c"], ["x", "y"], 3)


# -- partners and shares -------------------------------------------------------------------------------------


def test_each_domain_is_mixed_with_the_next_of_a_circle():
    circles = Counter()
    for step in range(300):
        partner, share = draw_partners(DOMAINS, 0.2, 7, step)
        following = {int(DOMAINS[place]): int(DOMAINS[partner[place]]) for place in range(12)}
        assert sorted(following.values()) == [2, 5, 9] and all(a != b for a, b in following.items())
        assert (partner % 4 == np.arange(12) % 4).all(), "the k-th image of a domain with the k-th one of the next"
        assert sorted(partner) == list(range(12)), "each image is the smaller part once"
        assert ((share >= 0.5) & (share <= 1)).all()
        assert all(len(set(share[domain == DOMAINS])) == 1 for domain in (2, 5, 9)), "one share for a pair of domains"
        assert len(set(share)) == 3
        circles[following[2]] += 1
    assert 100 < circles[5] < 200, "both directions"


def test_a_mixture_has_the_distribution_of_domainbed():
    """There the share is drawn from Beta(alpha, alpha) for an ordered pair. Here the larger part goes to the first, and
    the order is random: of the mixtures of domains 2 and 5, the share of 2 has that distribution again."""
    shares = []
    for step in range(3000):
        partner, share = draw_partners(DOMAINS, 0.4, 1, step)
        if DOMAINS[partner[0]] == 5:
            shares.append(share[0])
        elif DOMAINS[partner[4]] == 2:
            shares.append(1 - share[4])
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert len(shares) == 3000


def test_partners_follow_from_seed_and_step_alone():
    first = draw_partners(DOMAINS, 0.2, 7, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, draw_partners(DOMAINS, 0.2, 7, 3), strict=True))
    for seed, step in ((7, 4), (8, 3)):
        assert not np.array_equal(first[1], draw_partners(DOMAINS, 0.2, seed, step)[1])


def test_a_smaller_domain_is_taken_again_and_a_single_one_is_left_alone():
    partner, _ = draw_partners(np.array([0, 0, 0, 0, 0, 3, 3]), 0.2, 0, 0)
    assert partner.tolist() == [5, 6, 5, 6, 5, 0, 1]
    partner, share = draw_partners(np.array([4, 4, 4]), 0.2, 0, 0)
    assert partner.tolist() == [0, 1, 2] and share.tolist() == [1, 1, 1]


# -- processes and restarts ----------------------------------------------------------------------------------

IDS = np.random.default_rng(0).permutation([2] * 4 + [5] * 10 + [9] * 30)


@pytest.mark.parametrize("sampling", ["balanced", "proportional"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_a_process_loads_its_samples_and_their_partners(sampling, world_size):
    plain = DomainBatches(IDS, 7, 4, 9, sampling=sampling)
    whole = MixedBatches(IDS, 7, 4, 9, sampling=sampling)
    for rank in range(world_size):
        part = MixedBatches(IDS, 7, 4, 9, sampling=sampling, rank=rank, world_size=world_size)
        for step, draws in enumerate(part):
            found, of_all = part.mixtures(step), whole.mixtures(step)
            assert found.draws == draws and len(set(draws)) == len(draws), "nothing is loaded twice"
            own = plain.global_batch(step)[rank::world_size]
            assert draws[: len(own)] == own
            partners = [of_all.draws[place] for place in of_all.partner_B[rank::world_size]]
            assert [draws[row] for row in found.partner_B] == partners
            assert set(draws) == {*own, *partners}
            assert np.array_equal(found.share_B, of_all.share_B[rank::world_size])


def test_a_restart_goes_on_with_the_same_mixtures():
    whole = MixedBatches(IDS, 7, 4, 9)
    rest = MixedBatches(IDS, 7, 4, 9, first_step=5)
    assert list(rest) == list(whole)[5:] and len(rest) == 4
    assert np.array_equal(rest.mixtures(6).share_B, whole.mixtures(6).share_B)
    batches = [{"pixels": torch.zeros(7, 1), "labels": torch.arange(7)} for _ in range(4)]
    for step, batch in enumerate(mixed(batches, rest), start=5):
        assert batch["shares"].tolist() == pytest.approx(whole.mixtures(step).share_B.tolist(), abs=1e-7)


# -- batches -------------------------------------------------------------------------------------------------


def expected_of(dataset, sampler, step, view):
    """The batch of a step as its definition says; ``view`` gives what an image becomes."""
    batch = sampler.global_batch(step)
    domain_P = dataset.domain_ids[[index for index, _ in batch]]
    partner_P, share_P = draw_partners(domain_P, 0.5, 5, step)
    views = [view(index, epoch) for index, epoch in batch]
    places = range(sampler.rank, len(batch), sampler.world_size)
    found = [float(share_P[p]) * views[p] + (1 - float(share_P[p])) * views[partner_P[p]] for p in places]
    own, others = ([batch[p][0] for p in which] for which in (places, partner_P[list(places)]))
    return torch.stack(found), own, others, share_P[list(places)]


def require_mixtures(dataset, sampler, batches, view, name="pixels"):
    batches = list(batches)
    assert len(batches) == 7
    for step, batch in enumerate(batches):
        wanted, own, others, shares = expected_of(dataset, sampler, step, view)
        assert torch.allclose(batch[name], wanted, atol=1e-5)
        assert not torch.allclose(
            batch[name], torch.stack([view(*pair) for pair in sampler.mixtures(step).draws[: len(own)]])
        )
        assert batch["indices"].tolist() == own
        assert batch["labels"].tolist() == dataset.labels[own].tolist()
        assert batch["domains"].tolist() == dataset.domain_ids[own].tolist()
        assert batch["other_labels"].tolist() == dataset.labels[others].tolist()
        assert batch["shares"].dtype == torch.float32
        assert batch["shares"].tolist() == pytest.approx(shares.tolist(), abs=1e-7)


def sampler_for(dataset, **options):
    return make_sampler(dataset, TrainConfig(batch_size=7, steps=7), 5, mixup=MIXUP.mixup, **options)


@pytest.mark.parametrize("images_on", ["device", "host"])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_images_are_mixed_after_their_augmentation(root, images_on, rank, world_size):
    dataset = load(DataConfig(root=root))
    transform = TrainTransform(SEEN, MIXUP, seed=3)
    sampler = sampler_for(dataset, rank=rank, world_size=world_size)
    batches = training_batches(dataset, sampler, transform, CPU, workers=0, images_on=images_on)
    require_mixtures(dataset, sampler, batches, lambda index, epoch: transform(dataset.image(index), index, epoch))


def test_stored_pixels_are_mixed(root):
    dataset = load(DataConfig(root=root, pixel_store=16))
    store, augment = open_pixels(dataset.pixel_plan.whole, 16, "bicubic"), BatchAugment(SEEN, MIXUP, 3)

    def view(index, epoch):
        images, sizes_B2 = store.read([index])
        return augment(images, [index], [epoch], sizes_B2)[0]

    sampler = sampler_for(dataset)
    batches = training_batches(dataset, sampler, TrainTransform(SEEN, MIXUP, seed=3), CPU, workers=0)
    require_mixtures(dataset, sampler, batches, view)


def test_stored_features_are_mixed(root, tmp_path):
    dataset = load(DataConfig(root=root))
    transform = TrainTransform(SEEN, MIXUP, seed=3)
    key = FeatureKey("backbone", None, "float32/no", "transform", "data", views=2)
    store = open_or_build(
        key, dataset, transform, lambda pixels: pixels.mean((2, 3)), folder=tmp_path / "features", workers=0
    )
    sampler = sampler_for(dataset, rank=1, world_size=2)
    batches = training_batches(dataset, sampler, store, CPU)
    require_mixtures(dataset, sampler, batches, lambda index, epoch: store.rows([index], epoch)[0], "frozen")


def test_half_precision_is_mixed_in_float32():
    sampler = MixedBatches([0, 1], 2, 0, 1, alpha=1.0)
    features = torch.tensor([[1.0, 256.0], [2.0, -255.0]], dtype=torch.bfloat16)
    labels = torch.tensor([0, 1])
    (batch,) = mixed([{"frozen": features, "labels": labels}], sampler)
    share = batch["shares"][:, None]
    assert batch["frozen"].dtype == torch.bfloat16
    assert torch.equal(batch["frozen"], (share * features.float() + (1 - share) * features.float().flip(0)).bfloat16())


def test_a_sampler_that_pairs_nothing_is_refused(root):
    dataset = load(DataConfig(root=root))
    sampler = DomainBatches(dataset.domain_ids, 7, 5, 7)
    with pytest.raises(UserError, match="the augmentation has mixup, and the sampler pairs no samples"):
        training_batches(dataset, sampler, TrainTransform(SEEN, MIXUP, seed=3), CPU)


def test_one_domain_is_said(root):
    dataset = load(DataConfig(root=root)).with_domains(["b"])
    with pytest.warns(UserWarning, match=r"mixup with one source domain \('b'\): .*nothing is mixed"):
        sampler_for(dataset)


# -- settings ------------------------------------------------------------------------------------------------


def test_what_is_mixed_must_be_what_is_read():
    images, features = (AugmentConfig(kind="none", mixup=MixupConfig(of=of)) for of in ("images", "features"))
    require_mixable(AugmentConfig(), FeatureConfig(store=True))
    require_mixable(images, FeatureConfig())
    require_mixable(features, FeatureConfig(store=True))
    with pytest.raises(UserError, match=r"with features.store training reads none; set augment.mixup.of=features"):
        require_mixable(images, FeatureConfig(store=True))
    with pytest.raises(UserError, match=r"features.store is off; set features.store=true"):
        require_mixable(features, FeatureConfig())
    with pytest.raises(UserError, match=r"the contrastive loss compares each image with one caption; leave out"):
        require_mixable(images, FeatureConfig(), "contrastive")
