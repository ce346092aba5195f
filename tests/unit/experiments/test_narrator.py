"""What a run says of itself."""

from __future__ import annotations

import re
import warnings

import pytest

from disam_peft.common import progress
from disam_peft.common.records import METRICS, append_event, read_events
from disam_peft.config.recipe import Recipe
from disam_peft.config.wording import objective_in_words
from disam_peft.errors import Notice
from disam_peft.experiments import narrator as narration
from disam_peft.experiments import run
from disam_peft.experiments.narrator import Narrator
from disam_peft.experiments.outcome import Outcome


@pytest.fixture
def make_recipe(domains_folder, openclip_name, tmp_path):
    def make(**changes):
        values = {
            "name": "told",
            "output": tmp_path / "runs",
            "backbone": {"name": openclip_name},
            "adapter": {"kind": "lora", "rank": 2, "blocks": {"last": 1}},
            "data": {"root": domains_folder},
            "protocol": {"held_out": "photo"},
            "augment": {"kind": "none"},
            "train": {"steps": 4, "batch_size": 6, "workers": 0, "validate_every": 2, "log_every": 1},
            "evaluation": {"workers": 0, "example_errors": 0},
        }
        return Recipe.model_validate({**values, **changes})

    return make


def told(recipe, *, verbose=False):
    lines = []
    run.train(recipe, narrator=Narrator(lines.append, verbose=verbose))
    return lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"objective": {"loss": {"label_smoothing": 0.1}}}, "cross_entropy (label_smoothing 0.1)"),
        (
            {
                "objective": {
                    "loss": {"kind": "margin_softmax", "margin": 0.2},
                    "penalties": [{"kind": "coral"}, {"kind": "fishr", "ema": 0.5}],
                    "anchors": [{"kind": "logits", "weight": 0.5}],
                }
            },
            "margin_softmax (margin 0.2) + coral (weight 1) + fishr (weight 1000 from step 1,501 on, ema 0.5) + "
            "logits anchor (weight 0.5), averaged over domains",
        ),
        ({"augment": {"mixup": {}}}, "cross_entropy, of mixtures of two domains' images (mixup, alpha 0.2)"),
    ],
)
def test_what_a_step_descends_is_said_where_it_is_not_the_plain_cross_entropy(make_recipe, changes, words):
    assert objective_in_words(make_recipe(**changes)) == words


@pytest.mark.slow
def test_a_run_says_its_objective_and_its_averages(make_recipe):
    lines = told(make_recipe(objective={"loss": "margin_softmax"}, average=["ema", {"kind": "bma", "beta": 0.5}]))
    place = next(i for i, line in enumerate(lines) if line.startswith("  training: "))
    assert lines[place + 1 : place + 3] == [
        "  objective: margin_softmax",
        "  averages of the weights: ema, bma (beta 0.5)",
    ]


def test_a_run_says_what_it_found_splits_trains_and_validates(make_recipe, tmp_path):
    lines = told(make_recipe(method={"name": "erm", "rho": 0.3}))
    assert re.match(r"data: .*: 96 images of 4 classes in 3 domains \(art 32, cartoon 32, photo 32\)$", lines[0]), (
        lines[0]
    )
    assert lines[1] == f"run: without photo, in {tmp_path / 'runs/told/photo'}"
    assert lines[2] == "  images: 52 train, 12 validate, 32 are held out"
    assert re.fullmatch(r"  trained: lora on local-dir:.*, 256 of [\d,]+ parameters \(0\.0\d+ %\)", lines[3])
    assert lines[4] == (
        "  frozen: the first 2 of 3 blocks of the image tower, which run once per batch; the whole text tower, which "
        "runs once"
    )
    assert lines[5] == (
        "  training: erm, 4 steps of 6 images (0.462 times through the training images), validated every 2 steps; "
        "float32 on the CPU"
    )
    assert lines[6] == "  without effect: method.rho=0.3 (erm perturbs no weights)"
    validations = lines[7:]
    assert len(validations) == 2
    assert re.fullmatch(
        r"  step 2 of 4: validation accuracy [\d.]+ %, NLL \d\.\d{4}, [\d.]+ s left, the best so far", validations[0]
    ), validations[0]
    assert re.match(r"  step 4 of 4: validation accuracy [\d.]+ %, NLL \d\.\d{4}", validations[1])
    assert "left" not in validations[1]
    recorded = read_events(tmp_path / "runs/told/photo" / METRICS, "validation")
    for line, event in zip(validations, recorded, strict=True):
        assert f"NLL {-event['negative_nll']:.4f}" in line


def test_a_validation_says_the_numbers_of_the_weights_that_were_validated():
    lines = []
    narrator = Narrator(lines.append)
    narrator._steps = 4
    narrator.event("step", step=1, loss=9.0, learning_rate=0.1)
    numbers = {"score": 0.5, "mean_top1": 0.75, "negative_nll": -0.25, "worst_top1": 0.5, "worst_negative_nll": -0.5}
    narrator.event("validation", step=4, weights="bma", **numbers, is_best=True)
    assert lines == ["  step 4 of 4: validation (bma) accuracy 75.0 %, NLL 0.2500, the best so far"]
    narrator._rule = "worst_source"
    narrator.event("validation", step=4, **numbers)
    assert lines[1] == (
        "  step 4 of 4: validation accuracy 75.0 %, NLL 0.2500, of the worst domain accuracy 50.0 %, NLL 0.5000"
    )


def test_the_training_loss_of_a_run_is_a_mean_over_several_steps_or_not_said(tmp_path):
    outcome = Outcome(tmp_path, None, [], None)
    for step in range(1, 8):
        append_event(tmp_path / METRICS, "step", step=step, loss=10.0 - step, skipped=step == 2)
    append_event(tmp_path / METRICS, "step", step=8, loss=float("nan"), skipped=False)
    assert outcome.training_loss() is None, "six losses: means of single batches"
    append_event(tmp_path / METRICS, "step", step=9, loss=3.0, skipped=False)
    append_event(tmp_path / METRICS, "step", step=10, loss=2.0, skipped=False)
    assert outcome.training_loss() == ((9 + 7) / 2, (3 + 2) / 2, 2)


def test_verbose_says_every_record_and_every_trained_tensor(make_recipe):
    lines = told(make_recipe(), verbose=True)
    assert sum(bool(re.match(r"  step \d of 4: loss", line)) for line in lines) == 4
    assert sum("lora_A" in line for line in lines) == 2
    assert "    art: 26 train, 6 validate" in lines


@pytest.mark.slow
def test_a_run_on_all_domains_and_one_of_several_say_which_they_are(make_recipe):
    lines = told(make_recipe(protocol="all"))
    assert lines[1].startswith("run: on all domains, in ")
    assert lines[2] == "  images: 78 train, 18 validate"
    lines = told(make_recipe(protocol={"held_out": "all"}, name="each"))
    runs = [line.split(",")[0] for line in lines if line.startswith("run ")]
    assert runs == ["run 1 of 3: without art", "run 2 of 3: without cartoon", "run 3 of 3: without photo"]


def test_what_was_passed_over_is_said(make_recipe, domains_folder, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(domains_folder, root)
    (root / "art/red/notes.txt").write_text("x")
    (root / "art/blue/notes.txt").write_text("x")
    lines = told(make_recipe(data={"root": root}))
    assert lines[1] == "  passed over: 2 .txt"


def parameters(lines: list[str]) -> tuple[int, int]:
    """How many are trained, and how many there are."""
    [(trained, every)] = re.findall(r"([\d,]+) of ([\d,]+) parameters", "\n".join(lines))
    return int(trained.replace(",", "")), int(every.replace(",", ""))


@pytest.mark.slow
def test_where_the_frozen_part_ends_is_said_for_other_adapters(make_recipe):
    probe = told(make_recipe(adapter={"kind": "linear_probe"}, name="probe"))
    assert (
        "  frozen: the whole image tower, which runs once per image of a batch; the whole text tower, which runs once"
        in probe
    )
    full = told(make_recipe(adapter={"kind": "full", "towers": ["image", "text"]}, name="full"))
    assert (
        "  frozen: nothing of the image tower, whose first layers are trained; nothing of the text tower, whose first "
        "layers are trained"
    ) in full
    (_, of_full), (head, of_probe) = parameters(full), parameters(probe)
    assert of_full == of_probe - head, "weights that trained ones replace are not counted twice"
    lora = told(make_recipe(adapter={"kind": "lora", "rank": 2, "towers": ["image", "text"]}, name="lora"))
    assert (
        "  frozen: what comes before the blocks of the image tower, which runs once per batch; what comes before the "
        "blocks of the text tower, which runs once"
    ) in lora
    coop = told(make_recipe(adapter={"kind": "coop", "context_tokens": 2}, name="coop"))
    assert any(
        "the weights of the text tower, which runs in every pass because its prompts are trained" in x for x in coop
    )


@pytest.mark.slow
def test_inferred_domains_are_said(make_recipe):
    lines = told(make_recipe(domains={"infer": "kmeans", "k": 2}))
    [line] = [line for line in lines if line.startswith("  domains for training: 2 were inferred (cluster 0 ")]
    assert sum(map(int, re.findall(r"cluster \d+ (\d+)", line))) == 52
    assert not any("were inferred" in line for line in told(make_recipe(name="plain")))


def test_only_the_main_process_speaks(monkeypatch):
    lines = []
    monkeypatch.setattr(narration, "is_main", lambda: False)
    Narrator(lines.append).say("hello")
    assert lines == []


def test_a_sentence_puts_the_next_plain_line_off(monkeypatch):
    monkeypatch.setattr(progress, "_last_line", 0.0)
    Narrator(lambda text: None).say("hello")
    assert progress._last_line > 0


def test_a_batch_larger_than_the_data_gets_a_note(make_recipe):
    with pytest.warns(Notice, match=r"train.batch_size=60 is more than the 52 training images.*use at most 52"):
        told(make_recipe(train={"steps": 1, "batch_size": 60, "workers": 0}))


def test_very_many_passes_through_the_images_get_a_note_and_usual_ones_do_not(make_recipe):
    from disam_peft.data.load import load
    from disam_peft.experiments.split_data import checked_split

    recipe = make_recipe(train={"steps": 100_000, "batch_size": 26})
    with pytest.warns(Notice, match=r"train.steps=100000 of 26 images go 50,000 times.*train.steps=200 would be 100"):
        checked_split(recipe, load(recipe.data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_split(make_recipe(train={"steps": 2000, "batch_size": 26}), load(recipe.data))
