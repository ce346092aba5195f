"""What tells one of many recipes from most of the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from disam_peft.config.wording import SPEAKING, UNSET

_CAUSES = {"adapter": "adapter.kind", "method": "method.name", "objective.mean_over": "objective.penalties"}
"""Settings, or groups of them -> the setting by whose value they are compared: defaults of adapters are not alike."""
_SPEAKING = frozenset(key.split(".")[-1] for key in SPEAKING)


def uncommon_settings(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Of each row the settings whose value is not that of most rows, in their order. Where no value is that of more
    than half, all rows say theirs; but having no penalty or no average needs no word then.

    Two rows that differ in a setting which both have never get the same.

    Args:
        rows: key, or its last part -> value in words. A setting that has no effect in a row is not in it.
    """
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        for key, text in row.items():
            counts[_compared(row, key)][text] += 1
    return [{key: text for key, text in row.items() if _tells(key, text, counts[_compared(row, key)])} for row in rows]


def setting_in_a_name(title: str, text: str) -> str:
    """What a name says of a setting: ``rank=4``; or ``coral`` or ``no penalties``, without its title.

    Args:
        title: what the setting is called there: its key, or the last part of it.
    """
    last = title.split(".")[-1]
    if last in _SPEAKING:
        return f"no {last}" if text == UNSET else text
    return f"{title}={text}"


def _compared(row: Mapping[str, str], key: str) -> tuple[str, str]:
    cause = _CAUSES.get(key) or _CAUSES.get(key.partition(".")[0], "")
    return key, row.get(cause, "") if cause != key else ""


def _tells(key: str, text: str, counted: Counter[str]) -> bool:
    if len(counted) == 1:
        return False
    [(most, count), *_] = counted.most_common(1)
    if 2 * count > counted.total():
        return text != most
    return not (text == UNSET and key.split(".")[-1] in _SPEAKING)
