"""The forms in which adapters leave for other software; known without importing what writes them."""

from __future__ import annotations

from typing import get_args

from disam_peft.config.backbone import Precision
from disam_peft.config.peft_adapters import MAX_RANK
from disam_peft.errors import UserError, did_you_mean

FORMS = ("peft", "merged", "lora")
"""``peft``: the adapter alone. ``merged``: a complete checkpoint of its family. ``lora``: the nearest LoRA of a
rank."""

RANK = 16
"""That of ``lora`` where none is asked for."""


def check_form(to: str, rank: int | None = None) -> None:
    """Pass if there is such a form, and if it has a rank where one is given.

    Raises:
        UserError: there is none, and names the near ones; or a rank that no LoRA has.
    """
    if to not in FORMS:
        raise UserError(f"--to {to!r} is not one of {', '.join(FORMS)}{did_you_mean(to, FORMS)}")
    if rank is not None and to != "lora":
        raise UserError(f"--rank {rank} is for --to lora, and this is --to {to}; leave it out")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise UserError(f"--rank {rank} is no rank; give a number from 1 to {MAX_RANK}")


def check_precision(precision: str | None) -> Precision | None:
    """
    Raises:
        UserError: there is no such precision; names the near ones.
    """
    known: tuple[Precision, ...] = get_args(Precision)
    found = next((one for one in known if one == precision), None)
    if precision is not None and found is None:
        raise UserError(f"--precision {precision!r} is not one of {', '.join(known)}{did_you_mean(precision, known)}")
    return found
