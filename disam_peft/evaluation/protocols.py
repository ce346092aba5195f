"""Which domains are held out, one run each, and the usual score of a state by source validation."""

from __future__ import annotations

from typing import NamedTuple

from disam_peft.config.protocol import ALL, DOMAIN_PREFIX
from disam_peft.data.sources.samples import UNNAMED_DOMAIN
from disam_peft.errors import UserError, did_you_mean
from disam_peft.evaluation.metrics import metrics_of_domains, pooled_metrics
from disam_peft.evaluation.predict import Predictions


class Score(NamedTuple):
    """A checkpoint's rank by source validation alone: compares by accuracy, then by likelihood."""

    mean_top1: float
    negative_nll: float


def validation_score(predictions: Predictions) -> Score:
    """Mean over the source domains, so that a large domain does not outvote a small one."""
    mean = pooled_metrics(metrics_of_domains(predictions))["mean"]
    return Score(mean["top1"], -mean["nll"])


def held_out_domains(held_out: str | None, domains: tuple[str, ...]) -> list[str] | list[None]:
    """The domains to hold out, one run each; None where nothing is held out.

    ``all`` is each domain in turn, also where one of them is called ``all``; ``domain:all`` is that domain.

    Raises:
        UserError: no such domain (names the close ones); fewer than two domains where one is to be held out.
    """
    if held_out is None:
        return [None]
    if len(domains) < 2:
        raise UserError(
            f"leaving one domain out needs two domains or more, found {', '.join(domains) or 'none'}"
            + (" (the data do not say which domain an image belongs to)" if domains == (UNNAMED_DOMAIN,) else "")
            + "; protocol=all trains on every domain and holds nothing out"
        )
    if held_out == ALL:
        return list(domains)
    if held_out not in domains:
        held_out = held_out.removeprefix(DOMAIN_PREFIX)
    if held_out not in domains:
        raise UserError(
            f"protocol.held_out={held_out!r} is not a domain of the data{did_you_mean(held_out, [*domains, ALL])} "
            f"(found: {', '.join(domains)}; 'all' takes each in turn)"
        )
    return [held_out]
