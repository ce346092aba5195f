"""Which samples train, validate and test: the held-out domain, the validation part of the sources, and leaks."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np

from disam_peft.config.protocol import ALL, named_domain
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.duplicates import same_content
from disam_peft.data.sources.samples import UNNAMED_DOMAIN
from disam_peft.errors import UserError, did_you_mean

FEW_VALIDATION_SAMPLES = 5


def require_two_classes(dataset: DomainDataset) -> None:
    """Pass if there is something to tell apart.

    Raises:
        UserError: there is one class only; says why, as far as the data show it.
    """
    if len(dataset.classes) < 2:
        found = ", ".join(map(repr, dataset.classes)) or "none"
        raise UserError(
            f"{dataset.origin} has one class, {found}: a classifier needs two or more. Expected are folders "
            "root/<domain>/<class>/*.jpg; where data.classes is intersection, data.classes=union keeps every class"
        )


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
            "no domain can be held out: leaving one domain out needs two domains or more, "
            f"found {', '.join(domains) or 'none'}"
            + (" (the data do not say which domain an image belongs to)" if domains == (UNNAMED_DOMAIN,) else "")
            + "; protocol=all trains on every domain and holds nothing out"
        )
    if held_out == ALL:
        return list(domains)
    held_out = named_domain(held_out, domains)
    if held_out not in domains:
        raise UserError(
            f"protocol.held_out={held_out!r} is not a domain of the data{did_you_mean(held_out, [*domains, ALL])} "
            f"(found: {', '.join(domains)}; 'all' takes each in turn)"
        )
    return [held_out]


def leave_out(dataset: DomainDataset, held_out: str) -> tuple[DomainDataset, DomainDataset]:
    """``(sources, target)``: every domain but ``held_out``, and ``held_out``. Classes and domains keep their numbers.

    Raises:
        UserError: fewer than two domains; no such domain, or one without samples (names the close ones).
    """
    number = dataset.domain_id(held_out)
    if len(dataset.present_domains) < 2:
        raise UserError(
            f"{dataset.origin} has one domain, {held_out!r}: nothing is left to train on when it is held out; "
            "add a domain, or set protocol=all to train on all of it"
        )
    is_target_N = dataset.domain_ids == number
    return dataset.select(np.flatnonzero(~is_target_N)), dataset.select(np.flatnonzero(is_target_N))


def without_test_part(dataset: DomainDataset) -> DomainDataset:
    """The samples that may train or validate: all but those that the source itself gives as a test part."""
    return dataset if dataset.given_parts is None else dataset.in_parts(("train", "validation"))


def given_test_part(dataset: DomainDataset) -> DomainDataset | None:
    """The samples that the source itself gives as a test part; None where there are none."""
    found = dataset.in_parts(("test",))
    return found if len(found) else None


def split_train_validation(sources: DomainDataset, fraction: float, seed: int) -> tuple[DomainDataset, DomainDataset]:
    """``(train, validation)``: the given parts of each domain, or else a share of the domain validates.

    Where the source gives a validation part of a domain, that part validates, and the given training part trains. Of
    other domains, a share of the samples validates; a given test part is in neither. To draw the share, the samples of
    a domain are ordered by ``sha256(seed/key)``, and the first ``round(fraction * n)`` of the n samples, at least one,
    validate. So a file that is added or removed moves at most one other file to the other part.

    Args:
        fraction: share of each domain that validates, between 0 and 1.

    Raises:
        UserError: ``fraction`` out of range; a domain too small to give a sample to both parts; given parts that leave
            nothing to train on.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation fraction {fraction} must lie between 0 and 1, for example 0.2")
    is_validation_N = np.zeros(len(sources), dtype=bool)
    is_training_N = np.zeros(len(sources), dtype=bool)
    parts_N = np.asarray(sources.given_parts or ["train"] * len(sources), dtype=object)
    few, unused = [], []
    for name in sources.present_domains:
        in_domain_N = sources.domain_ids == sources.domains.index(name)
        given_N = in_domain_N & (parts_N == "validation")
        members = np.flatnonzero(in_domain_N & (parts_N == "train"))
        if not len(members) and not given_N.any():
            unused.append(name)
            continue
        if given_N.any():
            is_validation_N |= given_N
            is_training_N[members] = True
            count, total = int(given_N.sum()), int(given_N.sum()) + len(members)
        else:
            count, total = max(1, round(fraction * len(members))), len(members)
            if count >= len(members):
                raise UserError(
                    f"domain {name!r} has {len(members)} sample(s), {count} of which would validate and none train "
                    f"(fraction {fraction}); add samples, lower the fraction, or leave the domain out of data.domains"
                )
            members_in_order = sorted(members, key=lambda i: _rank(sources.keys[i], seed))
            is_validation_N[members_in_order[:count]] = True
            is_training_N[members_in_order[count:]] = True
        if count < FEW_VALIDATION_SAMPLES:
            few.append(f"{name!r} ({count} of {total})")
    _warn_of_parts(sources, few, unused)
    if not is_training_N.any():
        raise UserError(
            f"nothing is left to train on: the given splits of {sources.origin} have no training part in "
            f"{', '.join(map(repr, sources.present_domains))}; set data.given_splits to ignore, or add one"
        )
    return sources.select(np.flatnonzero(is_training_N)), sources.select(np.flatnonzero(is_validation_N))


def _warn_of_parts(sources: DomainDataset, few: list[str], unused: list[str]) -> None:
    if few:
        listed = ", ".join(few[:10]) + (f" and {len(few) - 10} more domains" if len(few) > 10 else "")
        action = "add samples" if sources.given_parts is not None else "add samples or raise the fraction"
        warnings.warn(
            f"few validation samples in {listed}: choosing a checkpoint by them is mostly chance; {action}",
            stacklevel=3,
        )
    if unused:
        warnings.warn(
            f"the given splits put every image of {', '.join(map(repr, unused))} into the test part, so it is neither "
            "trained on nor validated by; set data.given_splits to ignore to use it as a source",
            stacklevel=3,
        )


def _rank(key: str, seed: int) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest(), key


def check_no_leak(sources: DomainDataset, target: DomainDataset) -> None:
    """Pass if no domain and no image file, compared by content, is both in the sources and in the target.

    Raises:
        UserError: a leak; lists the files.
    """
    shared = [name for name in target.present_domains if name in sources.present_domains]
    if shared:
        raise UserError(
            f"leak: the held-out domain {', '.join(map(repr, shared))} is also a source; remove it from the sources"
        )
    pairs = same_content(sources, target)
    if pairs:
        lines = [f"  {sources.source(i)}  =  {target.source(j)}" for i, j in pairs[:10]]
        more = f"\n  and {len(pairs) - 10} more" if len(pairs) > 10 else ""
        raise UserError(
            f"leak: {len(pairs)} image file(s) of the held-out domain are also in the sources:\n"
            + "\n".join(lines)
            + more
            + "\nremove them from one side"
        )
