"""Fishr: the variances of the gradients by the classifier's weights, made alike over the domains.

Shapes in this file: B samples of a micro-batch, C classes, E embedding width, F = E, or E + 1 with a bias, D domains in
play, A domains ever seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from disam_peft.config.penalties import FishrConfig
from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums, accumulation_dtype
from disam_peft.objectives.base import Outputs, Penalty
from disam_peft.objectives.domain_state import DomainState
from disam_peft.objectives.whole_batch import outputs_of, whole_batch


def fishr(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    domains: Tensor,
    average: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ema: float = 0.95,
    ids: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of DomainBed's Fishr on a whole batch: ``(penalty, average)`` with the average after the step.

    ``g_i = (p_i - 1_y) [x_i, 1]^T`` is the gradient of the cross entropy of sample i by the weight and the bias of the
    classifier, and v_d the variance (divided by n) of its entries over domain d. With the average
    ``e_d = ema e_d + (1 - ema) v_d``, whose old part is a number, and ``u_d = e_d / (1 - ema)`` the penalty is the mean
    over the domains of the batch and over all entries of ``(u_d - mean over the domains)^2``. Domains that the batch
    lacks keep their average.

    Args:
        features: x, (B, E).
        logits: (B, C), with their graph to features, weight and bias: ``features @ weight.T + bias``.
        labels: (B,).
        domains: (B,) integers; any values.
        average: (D, C, E + 1) for ``ids``, (D, C, E) without a bias; unset: 0, as before the first step.
        bias: of the classifier, (C,); None: it has none, and its gradient does not count.
        ids: the domains that the average belongs to, ascending; unset: those in the batch.

    Returns:
        The penalty, shape (), with a graph, and the average, of float64.
    """
    penalty = Fishr(FishrConfig(ema=ema))
    outputs = replace(outputs_of(logits, labels, features), head_bias_C=bias)
    sums = whole_batch(penalty, outputs, domains, ids)
    if average is not None:
        penalty.load_state_dict({"domain_ids": sums.ids_D, "values": average})
    with torch.no_grad():
        penalty.begin_step(sums)
    return penalty.value(sums), penalty.average_DCF


class Fishr(Penalty):
    """See ``fishr``. The features are the normalised image features, and the classifier's weights are what multiplies
    them: the class features times the logit scale, or a linear probe's weights, with its bias if that is trained. The
    gradients are those of the plain cross entropy, whatever is descended beside the penalty.

    The sums of g and g^2 over a domain are products of matrices: there is never one gradient for each sample.
    """

    config: FishrConfig
    num_statistics = 2

    def __init__(self, config: FishrConfig) -> None:
        super().__init__(config)
        self._average = DomainState()
        self._past_DCF: Tensor | None = None  # of the averages before this step

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        dtype = accumulation_dtype(outputs.logits_BC.device)  # before the squares are taken, whose difference counts
        residual_BC = outputs.logits_BC.to(dtype).softmax(dim=1) - outputs.targets_BC.to(dtype)
        feature_BF = outputs.features.to(dtype)
        if outputs.head_bias_C is not None:
            feature_BF = torch.cat([feature_BF, feature_BF.new_ones(len(feature_BF), 1)], dim=1)
        gradient_DCF = domains.outer_sums(residual_BC, feature_BF)
        return gradient_DCF, domains.outer_sums(residual_BC.square(), feature_BF.square())

    def begin_step(self, sums: DomainSums) -> None:
        variance_DCF, state, ema = _variance(sums), self._average, self.config.ema
        state.bring_into_play(sums.ids_D, torch.zeros_like(variance_DCF))
        self._past_DCF = state.value_D
        moved_DCF = ema * self._past_DCF + (1 - ema) * variance_DCF
        moves_D11 = torch.isfinite(variance_DCF).all() & (sums.present_D > 0)[:, None, None]
        moved_DCF = torch.where(moves_D11, moved_DCF, self._past_DCF)
        state.value_A = state.value_A.index_copy(0, state.where_D, moved_DCF)

    def value(self, sums: DomainSums) -> Tensor:
        past_DCF, ema = self._past_DCF, self.config.ema
        assert past_DCF is not None  # begin_step comes first
        averaged_DCF = ema / (1 - ema) * past_DCF + _variance(sums)
        present_D11 = sums.present_D[:, None, None]
        mean_CF = (averaged_DCF * present_D11).sum(dim=0) / sums.num_present
        return sums.over_domains((averaged_DCF - mean_CF).square().mean(dim=(1, 2)))

    @property
    def average_DCF(self) -> Tensor:
        """The averages of the domains in play, after this step's."""
        return self._average.value_D

    def state_dict(self) -> dict[str, Tensor]:
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._average.load_state_dict(state)


def _variance(sums: DomainSums) -> Tensor:
    """v_d of each domain, (D, C, F); 0 for one that is absent."""
    gradient_DCF, square_DCF = map(sums.mean_of, sums.statistics)
    return square_DCF - gradient_DCF.square()
