"""Rules of selection: named, pure, of source domains alone; what a validation may return."""

import math
from typing import get_args

import pytest

from disam_peft.config.selection import SelectionConfig
from disam_peft.evaluation.protocols import Score
from disam_peft.training.selection import RULES, Validation, validation

# a: the better mean, b: the better worst domain; in likelihood the other way round
A = {"art": {"top1": 0.9, "nll": 0.9}, "photo": {"top1": 0.5, "nll": 0.2}, "sketch": {"top1": 0.9, "nll": 1.3}}
B = {"art": {"top1": 0.6, "nll": 0.5}, "photo": {"top1": 0.6, "nll": 0.5}, "sketch": {"top1": 0.6, "nll": 1.2}}


def test_every_rule_that_a_recipe_may_name_is_there():
    names = get_args(SelectionConfig.model_fields["rule"].annotation)
    assert set(names) == set(RULES)


@pytest.mark.parametrize(
    ("rule", "metric", "of_a", "of_b"),
    [
        ("source_validation", "accuracy", (2.3 / 3, -0.8), (0.6, -2.2 / 3)),
        ("source_validation", "nll", (-0.8, 2.3 / 3), (-2.2 / 3, 0.6)),
        ("worst_source", "accuracy", (0.5, -1.3), (0.6, -1.2)),
        ("worst_source", "nll", (-1.3, 0.5), (-1.2, 0.6)),
    ],
)
def test_what_each_rule_prefers(rule, metric, of_a, of_b):
    found = [validation(SelectionConfig(rule=rule, metric=metric), metrics).score for metrics in (A, B)]
    assert found == [pytest.approx(of_a, abs=1e-15), pytest.approx(of_b, abs=1e-15)]
    assert (found[0] > found[1]) == (rule == "source_validation" and metric == "accuracy")


def test_what_is_recorded_is_the_score_and_the_usual_numbers():
    for rule in RULES:
        judged = validation(SelectionConfig(rule=rule, metric="nll"), A)
        assert judged.numbers == {
            "score": judged.score[0],
            "mean_top1": pytest.approx(2.3 / 3),
            "negative_nll": pytest.approx(-0.8),
            "worst_top1": 0.5,
            "worst_negative_nll": -1.3,
        }


def test_what_a_users_validate_may_return():
    assert Validation.of(0.5) == Validation((0.5,), {"score": 0.5})
    assert Validation.of((1, 2.0)) == Validation((1.0, 2.0), {"score_0": 1.0, "score_1": 2.0})
    assert Validation.of([1, 2.0]) == Validation.of((1, 2.0))
    assert Validation.of(Score(0.5, -1.0)).numbers == {"mean_top1": 0.5, "negative_nll": -1.0}
    kept = Validation((0.1,), {"anything": 3.0})
    assert Validation.of(kept) is kept


def test_a_score_that_is_no_number_is_worse_than_any_other():
    from disam_peft.training.selection import is_better

    assert is_better((0.1,), (math.nan,)) and not is_better((math.nan,), (-math.inf,))
    assert is_better((0.5, 1.0), (0.5, math.nan)) and not is_better((0.5,), (0.5,))
