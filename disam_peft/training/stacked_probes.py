"""Many linear probes on the same stored features, trained side by side: a sweep for about the price of one run.

A softmax layer on fixed features has a closed-form gradient, so both passes are matrix products over all probes at
once, and nothing is asked of autograd. Each probe goes the way that ``fit`` would take it, up to rounding.

Shapes in this file: S probes, B batch, C classes, F features (with a constant 1 where a bias is trained), D domains,
N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.common.progress import track
from disam_peft.config.training import TrainConfig
from disam_peft.disam.ascent import VarianceForm, VarianceOver, VarianceScale, ascent_weights, entropic_weights
from disam_peft.errors import UserError
from disam_peft.training.optimizers import build_optimizer, learning_rate_factor


@dataclass(frozen=True)
class ProbeSetting:
    """What one probe is trained with."""

    learning_rate: float
    rho: float
    """0: the plain gradient (ERM)."""
    variance_weight: float
    """lambda; 0: SAM."""


@dataclass(frozen=True)
class ProbeTrial:
    """One trained probe in the best of its states, as ``fit`` chooses it.

    Attributes:
        best_score: None where the probe diverged before its first validation.
        state: for ``LinearProbeAdapter.load_state``.
    """

    setting: ProbeSetting
    best_step: int
    best_score: Any
    state: dict[str, Tensor]


class ProbeStack:
    """S linear probes that start alike, and the two-pass gradient of all of them.

    Args:
        head: where they start; its trained parameters and its precision are theirs.
        settings: one for each probe.
        adaptive, variance_over, variance_scale, variance_form: as in ``DISAM``.
    """

    def __init__(
        self,
        head: LinearProbeAdapter,
        settings: Sequence[ProbeSetting],
        *,
        adaptive: bool = False,
        variance_over: VarianceOver = "domains",
        variance_scale: VarianceScale = "absolute",
        variance_form: VarianceForm = "variance",
    ) -> None:
        if not settings:
            raise UserError("no settings to train probes with; give at least one")
        self._trains_bias = isinstance(head.bias, nn.Parameter)
        weight_CF = head.weight.detach()
        if self._trains_bias:
            weight_CF = torch.cat([weight_CF, head.bias.detach()[:, None]], dim=1)
        self._fixed_bias_C = None if self._trains_bias else head.bias.detach()
        self.settings, self.adaptive, self.variance_over = tuple(settings), adaptive, variance_over
        self.variance_scale, self.variance_form = variance_scale, variance_form
        # equal learning rates side by side: each is one parameter of the optimizer, and a slice of one tensor
        self._order = sorted(range(len(settings)), key=lambda s: settings[s].learning_rate)
        ordered = [settings[s] for s in self._order]
        self.weights_SCF = weight_CF.expand(len(settings), -1, -1).clone()
        self.gradients_SCF = torch.zeros_like(self.weights_SCF)
        like = weight_CF.new_tensor
        self._rho_S11 = like([s.rho for s in ordered])[:, None, None]
        self._variance_weight_S1 = like([s.variance_weight for s in ordered])[:, None]
        self._perturbs = any(s.rho > 0 for s in settings)
        self._pulls = any(s.variance_weight > 0 and s.rho > 0 for s in settings)

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer: a parameter group of its own for each learning rate."""
        groups = []
        rates = [self.settings[s].learning_rate for s in self._order]
        for rate in dict.fromkeys(rates):
            chosen = slice(rates.index(rate), rates.index(rate) + rates.count(rate))
            parameter = nn.Parameter(self.weights_SCF[chosen])
            parameter.grad = self.gradients_SCF[chosen]
            groups.append({"params": [parameter], "lr": rate})
        return groups

    @torch.no_grad()
    def gradient(self, features_BF: Tensor, labels_B: Tensor, domain_BD: Tensor) -> Tensor:
        """Put every probe's gradient where ``groups`` has it; returns the mean losses at w, (S,).

        Args:
            features_BF: from ``probe_features``.
            domain_BD: one-hot rows.
        """
        weights_SCF, batch = self.weights_SCF, len(features_BF)
        surplus_BSC, losses_BS = self._surplus(features_BF, labels_B, weights_SCF)
        if self._perturbs:
            if self._pulls:
                count_D = domain_BD.sum(dim=0)
                mean_SD = losses_BS.T @ domain_BD / count_D
                weight_SD = self._ascent_weights(mean_SD, count_D)
                surplus_BSC.mul_((domain_BD @ weight_SD.T)[..., None])
            ascent_SCF = self._product(surplus_BSC, features_BF)  # at any scale: only its direction counts
            weights_SCF = self._perturbed(ascent_SCF)
            surplus_BSC, _ = self._surplus(features_BF, labels_B, weights_SCF)
        self._product(surplus_BSC.mul_(1.0 / batch), features_BF)
        return losses_BS.mean(dim=0)

    def _ascent_weights(self, mean_SD: Tensor, count_D: Tensor) -> Tensor:
        if self.variance_form == "entropic":
            return entropic_weights(mean_SD, count_D, self._variance_weight_S1)
        return ascent_weights(
            mean_SD,
            count_D,
            self._variance_weight_S1,
            variance_over=self.variance_over,
            variance_scale=self.variance_scale,
        )

    def _surplus(self, features_BF: Tensor, labels_B: Tensor, weights_SCF: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of each sample's loss by its logits, (B, S, C), and the losses (B, S)."""
        S = len(weights_SCF)
        log_p_BSC = self._logits(features_BF, weights_SCF).log_softmax(dim=-1)
        place_BS1 = labels_B[:, None, None].expand(-1, S, 1)
        losses_BS = -log_p_BSC.gather(2, place_BS1)[..., 0]
        surplus_BSC = log_p_BSC.exp_()
        surplus_BSC.scatter_add_(2, place_BS1, -torch.ones_like(losses_BS)[..., None])
        return surplus_BSC, losses_BS

    def _product(self, surplus_BSC: Tensor, features_BF: Tensor) -> Tensor:
        """Into the gradients' place, where an optimizer finds it."""
        out = self.gradients_SCF.view(-1, features_BF.shape[1])
        torch.mm(surplus_BSC.flatten(1).T, features_BF, out=out)
        return self.gradients_SCF

    def _logits(self, features_NF: Tensor, weights_SCF: Tensor) -> Tensor:
        S, C, F = weights_SCF.shape
        logits_NSC = (features_NF @ weights_SCF.reshape(S * C, F).T).view(-1, S, C)
        return logits_NSC if self._fixed_bias_C is None else logits_NSC + self._fixed_bias_C

    def _perturbed(self, gradient_SCF: Tensor) -> Tensor:
        """w + rho g / ||g|| of each probe; w where the norm is zero."""
        if self.adaptive:
            gradient_SCF = gradient_SCF * self.weights_SCF
        norm_S11 = torch.linalg.vector_norm(gradient_SCF, dim=(1, 2), keepdim=True)
        size_S11 = torch.where(norm_S11 > 0, self._rho_S11 / norm_S11, torch.zeros_like(norm_S11))
        if self.adaptive:
            gradient_SCF = gradient_SCF.mul_(self.weights_SCF)
        return torch.addcmul(self.weights_SCF, gradient_SCF, size_S11)

    def clip_(self, limit: float) -> None:
        """Each probe's gradient to a norm of at most ``limit``, as ``clip_grad_norm_`` does."""
        norm_S = torch.linalg.vector_norm(self.gradients_SCF.flatten(1), dim=1)
        self.gradients_SCF.mul_((limit / (norm_S + 1e-6)).clamp(max=1.0)[:, None, None])

    def states(self) -> list[dict[str, Tensor]]:
        """What each probe has learnt, in the order of ``settings``."""
        states: list[dict[str, Tensor]] = [{} for _ in self.settings]
        for place, number in enumerate(self._order):
            weight_CF = self.weights_SCF[place].clone()
            states[number]["weight"] = weight_CF[:, :-1] if self._trains_bias else weight_CF
            if self._trains_bias:
                states[number]["bias"] = weight_CF[:, -1]
        return states

    def logits(self, features_NF: Tensor) -> list[Tensor]:
        """(N, C) of each probe, in the order of ``settings``."""
        logits_NSC = self._logits(features_NF, self.weights_SCF)
        place_of = {number: place for place, number in enumerate(self._order)}
        return [logits_NSC[:, place_of[number]] for number in range(len(self.settings))]


def probe_features(features_NE: Tensor, head: LinearProbeAdapter) -> Tensor:
    """Image features as a probe reads them, (N, F): normalised, in its precision, with a 1 where it trains a bias."""
    normalised_NE = nn.functional.normalize(features_NE.to(head.weight), dim=-1)
    if not isinstance(head.bias, nn.Parameter):
        return normalised_NE
    return nn.functional.pad(normalised_NE, (0, 1), value=1.0)


def fit_probes(
    stack: ProbeStack,
    features_NF: Tensor,
    labels_N: Tensor,
    domains_N: Tensor,
    batches: Iterable[Tensor],
    config: TrainConfig,
    validate: Callable[[list[Tensor]], list[Any]] | None = None,
    validation_features_MF: Tensor | None = None,
) -> list[ProbeTrial]:
    """Train every probe of ``stack`` on the same batches.

    Args:
        features_NF: from ``probe_features``.
        domains_N: ids from 0.
        batches: rows of ``features_NF``, one tensor of indices a step, ``config.steps`` of them.
        config: all but its learning rate, which each probe has its own of.
        validate: scores of the probes from their logits on ``validation_features_MF``, when ``fit`` would validate.
            Unset: the last state of each is kept.
    """
    fused = stack.weights_SCF.device.type in ("cpu", "cuda")
    optimizer = build_optimizer(stack.groups(), config, fused=fused)
    rates = [group["lr"] for group in optimizer.param_groups]
    one_hot_ND = nn.functional.one_hot(domains_N).to(features_NF)
    best: list[ProbeTrial | None] = [None] * len(stack.settings)
    for step, rows_B in enumerate(track(batches, "training probes", total=config.steps), start=1):
        stack.gradient(*(of_all.index_select(0, rows_B) for of_all in (features_NF, labels_N, one_hot_ND)))
        if config.clip_norm is not None:
            stack.clip_(config.clip_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_factor(config, step - 1)
        optimizer.step()
        if validate is not None and (step % config.validation_interval == 0 or step == config.steps):
            assert validation_features_MF is not None
            _keep_better(best, stack, step, validate(stack.logits(validation_features_MF)))
    last = [
        ProbeTrial(setting, config.steps, None, state)
        for setting, state in zip(stack.settings, stack.states(), strict=True)
    ]
    return [kept or final for kept, final in zip(best, last, strict=True)]


def _keep_better(best: list[ProbeTrial | None], stack: ProbeStack, step: int, scores: Sequence[Any]) -> None:
    states = stack.states()
    for number, (setting, score, state) in enumerate(zip(stack.settings, scores, states, strict=True)):
        before = best[number]
        diverged = not all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
        if not diverged and (before is None or score > before.best_score):
            best[number] = ProbeTrial(setting, step, score, state)
