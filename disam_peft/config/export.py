"""The forms in which adapters leave for other software; known without importing what writes them."""

from __future__ import annotations

from disam_peft.errors import UserError, did_you_mean

FORMS = ("peft", "merged")
"""``peft``: the adapter alone. ``merged``: a complete checkpoint of its family."""


def check_form(to: str) -> None:
    """Pass if there is such a form.

    Raises:
        UserError: there is none; names the near ones.
    """
    if to not in FORMS:
        raise UserError(f"--to {to!r} is not one of {', '.join(FORMS)}{did_you_mean(to, FORMS)}")
