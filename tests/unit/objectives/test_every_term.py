"""The cases that tests/matrix trains are all terms there are; and what a batch without some images makes of each."""

from __future__ import annotations

from disam_peft.objectives.objective import ANCHORS, LOSSES, PENALTIES
from tests.helpers.terms import CASES


def test_every_class_and_every_word_of_a_setting_is_a_case() -> None:
    """Members of the tables are those of the unions (``test_contract.py``), and each has its name."""
    terms = [(*[case.objective.loss], *case.objective.penalties, *case.objective.anchors) for case in CASES.values()]
    classes = {type(term) for of_case in terms for term in of_case}
    assert classes == {*LOSSES, *PENALTIES, *ANCHORS}
    assert {config.model_fields["kind"].default for config in classes} <= set(CASES), "each alone, too"
    assert {
        *("mixup of=images", "mixup of=features", "groupdro variant=sagawa", "irm variant=v1", "logits distance=l1"),
        *(f"image_features distance={word}" for word in ("squared", "cosine")),
        *(f"class_features distance={word}" for word in ("l1", "cosine")),
        *(f"{loss} class_weights={word}" for loss in ("focal", "sigmoid") for word in ("balanced", "effective_number")),
    } <= set(CASES)
    alone = [str(case) for name, case in CASES.items() if name != "cross_entropy"]
    assert len(set(alone)) == len(alone)
