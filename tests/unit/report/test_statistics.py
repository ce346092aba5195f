"""The verdicts: closed forms, scipy directly, and the cases in which there is nothing to say."""

import numpy as np
import pytest
from scipy import stats

from disam_peft.report.statistics import bootstrap_interval, holm, judged, paired, seed_differences, t_test, wilcoxon

DOMAINS = ("art", "sketch")


def arm(by_seed, domains=DOMAINS):
    """The same number in every domain."""
    return {(domain, seed): value for seed, value in enumerate(by_seed) for domain in domains}


def verdicts(values, pairs, *, higher_is_better=True, held_out=DOMAINS):
    return judged(
        [paired(first, second, values, held_out) for first, second in pairs], higher_is_better=higher_is_better
    )


def test_the_seed_is_the_unit():
    first = {("art", 0): 0.9, ("sketch", 0): 0.5, ("art", 1): 0.7, ("sketch", 1): 0.5}
    second = {("art", 0): 0.5, ("sketch", 0): 0.7, ("art", 1): 0.5, ("sketch", 1): 0.1}
    # seed 0: (0.4 - 0.2) / 2; seed 1: (0.2 + 0.4) / 2
    assert seed_differences(first, second, DOMAINS) == pytest.approx([0.1, 0.3])
    result = paired("a", "b", {"a": first, "b": second}, DOMAINS)
    assert (result.seeds, result.pairs) == (2, 4)
    assert result.mean == pytest.approx(0.2)
    assert result.deviation == pytest.approx(0.2 / 2**0.5)
    # means of two seeds drawn from two: 0.1, 0.2, 0.2, 0.3
    assert (result.low, result.high) == pytest.approx((0.1, 0.3))


def test_a_seed_without_all_domains_is_left_out():
    first, second = arm([0.9, 0.9]), arm([0.5, 0.5])
    del second["sketch", 1]
    assert seed_differences(first, second, DOMAINS) == pytest.approx([0.4])


def test_p_values_by_hand():
    differences = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    # mean 3.5, deviation sqrt(3.5): t = 3.5 / sqrt(3.5 / 6)
    assert t_test(differences) == pytest.approx(2 * stats.t.sf(3.5 / (3.5 / 6) ** 0.5, 5))
    assert wilcoxon(differences) == pytest.approx(2 * 0.5**6)
    assert wilcoxon([*differences, 0.0]) == pytest.approx(2 * 0.5**6), "a zero says nothing about the sign"
    assert wilcoxon([1.0, -2.0, 3.0]) == pytest.approx(0.75)  # rank sum of the negatives 2: 3 of 8 signs, twice


def test_the_interval_is_scipys():
    differences = list(np.random.default_rng(3).normal(0.5, 1.0, 12))
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(differences) == pytest.approx((expected.low, expected.high))
    assert bootstrap_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def test_holm_by_hand():
    # in order 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.5 x 1
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06]), "an adjusted p does not fall behind a smaller one"
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_identical_arms_are_not_distinguishable():
    [result] = verdicts({"a": arm([0.5, 0.6, 0.7, 0.8]), "b": arm([0.5, 0.6, 0.7, 0.8])}, [("a", "b")])
    assert (result.mean, result.low, result.high, result.p) == (0.0, 0.0, 0.0, 1.0)
    assert result.words == "not distinguishable"


def test_a_constant_difference_is():
    values = {"a": arm([0.5, 0.625, 0.75, 0.875]), "b": arm([0.25, 0.375, 0.5, 0.625])}
    [result] = verdicts(values, [("a", "b")])
    assert (result.mean, result.low, result.high) == (0.25, 0.25, 0.25)
    assert result.words == "a better"
    [loss] = verdicts(values, [("a", "b")], higher_is_better=False)
    assert loss.words == "b better"


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_few_seeds_give_no_verdict(seeds):
    values = {"a": arm([0.75] * seeds), "b": arm([0.25] * seeds)}
    [result] = verdicts(values, [("a", "b")])
    assert result.words == "no verdict"
    assert result.mean == (0.5 if seeds else None)


def test_the_test_is_wilcoxons_only_where_so_many_seeds_could_pass():
    values = {name: arm([shift + 0.01 * seed for seed in range(6)]) for shift, name in enumerate("abc")}
    assert verdicts(values, [("a", "b")])[0].test == "wilcoxon"  # 2^-5 = 0.031
    assert {r.test for r in verdicts(values, [("a", "b"), ("b", "c")])} == {"t"}  # 0.0625


def test_many_comparisons_cost_certainty():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, 5)
    values = {"a": arm(base), "b": arm(base + 1 + 0.55 * np.array([-1, -0.5, 0, 0.5, 1.2]))}
    [alone] = verdicts(values, [("b", "a")])
    assert alone.words == "b better"
    values |= {f"x{i}": arm(rng.permutation(base)) for i in range(12)}
    among = verdicts(values, [("b", "a"), *((f"x{i}", "a") for i in range(12))])
    assert among[0].p == pytest.approx(13 * alone.p)
    assert among[0].words == "not distinguishable"


@pytest.mark.slow
def test_a_family_of_nothing_but_chance_is_rarely_wrong():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(40):
        values = {name: arm(rng.normal(0, 1, 5)) for name in "abcde"}
        found = verdicts(values, [(name, "a") for name in "bcde"])
        wrong += any(result.verdict != "not distinguishable" for result in found)
    assert wrong <= 5  # at most 5 % of families are expected to be; 6 of 40 would come by chance in 1.4 % of cases


def test_no_verdict_rests_on_ranks_alone():
    """Eleven of twelve seeds are a little better and one is much worse: Wilcoxon's test, which sees ranks, passes, and
    the interval of the mean has 0 in it."""
    by_seed = [0.010 + 0.001 * seed for seed in range(11)] + [-0.2]
    [found] = verdicts({"a": arm(by_seed), "b": arm([0.0] * 12)}, [("a", "b")])
    assert found.test == "wilcoxon" and found.p < 0.05
    assert found.low < 0 < found.high
    assert found.verdict == "not distinguishable"
