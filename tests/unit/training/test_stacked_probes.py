"""Probes trained side by side go the way that each would go alone."""

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.errors import UserError
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.protocols import validation_score
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training.fit import fit
from disam_peft.training.stacked_probes import ProbeSetting, ProbeStack, fit_probes, probe_features

SETTINGS = [
    ProbeSetting(learning_rate, rho, variance_weight)
    for learning_rate in (0.3, 0.01)
    for rho in (0.0, 0.05, 0.5)
    for variance_weight in (0.0, 0.1, 1.5)
]


def make_head(*, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    return LinearProbeAdapter(
        LinearProbeConfig(bias=bias), weight, torch.randn(5, generator=generator, dtype=torch.float64)
    )


def draw(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 7, generator=generator, dtype=torch.float64)
    # of unequal sizes, and number 2 is absent
    domains = torch.tensor([0, 0, 0, 1, 3, 3]).repeat(count)[:count]
    return features, torch.randint(5, (count,), generator=generator), domains


def alone(
    setting,
    features,
    labels,
    domains,
    *,
    adaptive=False,
    over="domains",
    bias=True,
    optimizer,
    batches,
    clip=None,
    **options,
):
    """The same by DISAM and autograd."""
    head = make_head(bias=bias)
    params = [p for p in head.parameters() if p.requires_grad]
    disam = DISAM(params, setting.rho, setting.variance_weight, adaptive, num_domains=4, variance_over=over, **options)
    steps = optimizer(params, setting.learning_rate)
    for rows in batches:
        disam.backward(
            lambda rows=rows: cross_entropy(head.logits(features[rows], None, None, None), labels[rows]), domains[rows]
        )
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        steps.step()
    return head.state()


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("clip", "over"), [(None, "domains"), (0.05, "domains"), (None, "samples")])
def test_every_probe_is_where_disam_would_have_taken_it(adaptive, bias, clip, over):
    features, labels, domains = draw(40)
    batches = [torch.arange(start, start + 10) % 40 for start in range(0, 70, 7)]
    stack = ProbeStack(make_head(bias=bias), SETTINGS, adaptive=adaptive, variance_over=over)
    config = TrainConfig(
        steps=len(batches), optimizer="sgd", momentum=0.9, weight_decay=0.02, schedule="constant", clip_norm=clip
    )
    trials = fit_probes(stack, probe_features(features, make_head(bias=bias)), labels, domains, batches, config)

    def sgd(params, rate):
        return torch.optim.SGD(params, rate, momentum=0.9, weight_decay=0.02)

    assert [trial.setting for trial in trials] == SETTINGS
    for setting, trial in zip(SETTINGS, trials, strict=True):
        expected = alone(
            setting,
            features,
            labels,
            domains,
            adaptive=adaptive,
            over=over,
            bias=bias,
            optimizer=sgd,
            batches=batches,
            clip=clip,
        )
        assert trial.state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(trial.state[name], tensor, rtol=0, atol=1e-12)
    # settings differ by far more than that
    assert (trials[4].state["weight"] - trials[8].state["weight"]).abs().max() > 1e-5


@pytest.mark.parametrize("options", [{"variance_scale": "relative"}, {"variance_form": "entropic"}])
def test_every_form_of_the_variance_is_that_of_disam(options):
    features, labels, domains = draw(40)
    batches = [torch.arange(start, start + 10) % 40 for start in range(0, 35, 7)]
    stack = ProbeStack(make_head(), SETTINGS, **options)
    config = TrainConfig(steps=len(batches), optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="constant")
    trials = fit_probes(stack, probe_features(features, make_head()), labels, domains, batches, config)
    plain = fit_probes(
        ProbeStack(make_head(), SETTINGS), probe_features(features, make_head()), labels, domains, batches, config
    )
    differ = 0
    for setting, trial, other in zip(SETTINGS, trials, plain, strict=True):
        about = {"optimizer": torch.optim.SGD, "batches": batches}
        expected = alone(setting, features, labels, domains, **about, **options)
        torch.testing.assert_close(trial.state["weight"], expected["weight"], rtol=0, atol=1e-12)
        differ += not torch.allclose(trial.state["weight"], other.state["weight"], rtol=0, atol=1e-8)
    assert differ == sum(setting.rho > 0 and setting.variance_weight > 0 for setting in SETTINGS) > 0


def test_a_frozen_bias_counts_and_stays():
    head = make_head(bias=False)
    stack = ProbeStack(head, SETTINGS[:2])
    features = probe_features(draw(6)[0], head)
    torch.testing.assert_close(stack.logits(features)[1], features @ head.weight.T + head.bias)


def test_no_settings_is_an_error():
    with pytest.raises(UserError, match="at least one"):
        ProbeStack(make_head(), [])


def test_a_probe_that_diverges_has_no_score_and_leaves_the_others_alone():
    features, labels, domains = draw(12)
    head = make_head()
    settings = [ProbeSetting(0.1, 0.05, 0.1), ProbeSetting(1e308, 0.05, 0.1)]
    config = TrainConfig(steps=4, optimizer="sgd", schedule="constant", validate_every=4)
    scores = lambda logits: [float(x.abs().sum()) for x in logits]  # noqa: E731
    rows = [torch.arange(12)] * 4
    x = probe_features(features, head)
    good, bad = fit_probes(ProbeStack(head, settings), x, labels, domains, rows, config, scores, x)
    assert bad.best_score is None
    [single] = fit_probes(ProbeStack(head, settings[:1]), x, labels, domains, rows, config, scores, x)
    torch.testing.assert_close(good.state["weight"], single.state["weight"], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*domain weights were negative")
def test_it_ends_and_chooses_as_the_training_loop_does(openclip_name, domains_folder):
    dataset = load(DataConfig(root=domains_folder))
    config = TrainConfig(steps=12, batch_size=9, learning_rate=0.5, warmup_steps=3, validate_every=2, workers=0)
    method = MethodConfig(rho=0.3, variance_weight=0.5)

    def classifier():
        backbone = load_backbone(BackboneConfig(name=openclip_name))
        prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
        return ClipClassifier(backbone, build_adapter(LinearProbeConfig(), backbone, prompts), prompts)

    def predictions(logits):
        ids = torch.from_numpy(dataset.domain_ids)
        return Predictions(logits, torch.from_numpy(dataset.labels), ids, dataset.domains)

    by_loop = classifier()
    transform = by_loop.backbone.image_transform
    pixels = torch.stack([transform(dataset.image(i)) for i in range(len(dataset))])
    frozen = by_loop.encode_frozen(pixels)
    result = fit(
        by_loop,
        dataset,
        method=method,
        config=config,
        augment=AugmentConfig(kind="none"),
        validate=lambda: validation_score(predictions(by_loop.logits(frozen).detach())),
    )
    head = classifier().adapter
    x = probe_features(frozen, head)
    rows = [
        torch.tensor([index for index, _ in batch])
        for batch in DomainBatches(dataset.domain_ids, config.batch_size, 0, config.steps)
    ]
    [trial] = fit_probes(
        ProbeStack(head, [ProbeSetting(0.5, 0.3, 0.5)]),
        x,
        torch.from_numpy(dataset.labels),
        torch.from_numpy(dataset.domain_ids),
        rows,
        config,
        lambda logits: [validation_score(predictions(one)) for one in logits],
        x,
    )
    assert trial.best_step == result.best_step
    assert trial.best_score == pytest.approx(result.best_score, abs=1e-5)
    for name, tensor in by_loop.adapter.state().items():
        torch.testing.assert_close(trial.state[name], tensor, rtol=1e-4, atol=1e-4)
