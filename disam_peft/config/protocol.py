"""Which domain is kept away from training, if any, and how the rest is split."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from disam_peft.config.base import Config

ALL = "all"
DOMAIN_PREFIX = "domain:"
"""Before the name of a domain in ``held_out``: a domain and nothing else is meant, even if it is called ``all``."""


def as_held_out(domain: str) -> str:
    """What ``held_out`` has to say so that this one domain is held out, whatever it is called."""
    return f"{DOMAIN_PREFIX}{domain}" if domain == ALL or domain.startswith(DOMAIN_PREFIX) else domain


def named_domain(held_out: str, domains: Collection[str] | None = None) -> str:
    """The name of the domain that ``held_out`` means where it means one: the reverse of ``as_held_out``.

    Runs of earlier versions wrote the plain name, also where the domain is called ``all``; it is its own name here.

    Args:
        domains: of the data, where they are known: a domain may be meant whose own name begins with ``domain:``.
    """
    name = held_out.removeprefix(DOMAIN_PREFIX)
    return held_out if domains is not None and name not in domains and held_out in domains else name


class ProtocolConfig(Config):
    """What a run may train on, and on what it is judged. The state that is kept is chosen on a part of the domains that
    are trained on ("training-domain validation")."""

    kind: Literal["leave_one_domain_out", "all"] = "leave_one_domain_out"
    """``leave_one_domain_out``: one domain is kept away from training, and the adapter is judged there. ``all``:
    training has every domain and nothing is held out, which gives the adapter to use on other data. ``protocol: all``
    is short for ``protocol: {kind: all}``."""
    held_out: str | None = None
    """The domain that training never sees; needed with ``leave_one_domain_out`` and refused with ``all``. The word
    ``all`` stands for a run for each domain in turn; ``domain:all`` is the one domain that is called all."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the images of every domain that is trained on which is kept for validation."""

    @property
    def domain(self) -> str | None:
        """The name of the domain that one run holds out, for recipes of one run; None where it holds nothing out."""
        return None if self.held_out is None else named_domain(self.held_out)

    @model_validator(mode="after")
    def _consistent(self) -> ProtocolConfig:
        if self.kind == "all" and self.held_out is not None:
            raise ValueError(
                f"held_out={self.held_out!r} has no meaning with kind 'all', which holds nothing out; remove it. On "
                f"the command line protocol=all replaces both, and protocol={{held_out: {self.held_out}}} holds it out"
            )
        if self.kind != "all" and self.held_out is None:
            raise ValueError(
                "held_out is missing: name the domain that training must not see, or 'all' for a run for each domain "
                "in turn; protocol=all trains on every domain"
            )
        return self


def _with_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Protocol = Annotated[ProtocolConfig, BeforeValidator(_with_kind)]
"""The protocol of a recipe. ``all`` is short for ``{kind: all}``."""
