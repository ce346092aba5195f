"""Gather the studies' comparisons into recipes/studies/RESULTS.md, as they were measured.

    python scripts/study_results.py STUDIES          # STUDIES/<study>/comparison.json, from disam-peft compare

The answer of each study is the comment in its file that begins with ``# Answer``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from disam_peft.report.comparison import NONE, Comparison, TextTable, diagnostics_table, read_comparison, value_tables
from disam_peft.report.comparison import verdict_table as verdicts
from disam_peft.report.comparison_page import about

STUDIES = Path(__file__).parents[1] / "recipes/studies"
HEAD = """# What the studies found

On DomainShapes with the CLIP that ships with the package: a synthetic benchmark and a very small model. What is found
here says how the methods behave in it, and nothing about photographs. Written by `python scripts/study_results.py`
from the records; the intervals are rebuilt with them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write recipes/studies/RESULTS.md.")
    parser.add_argument("folder", type=Path, help="of the comparisons, one folder each, named as the study's file")
    parser.add_argument("--output", type=Path, default=STUDIES / "RESULTS.md")
    given = parser.parse_args()
    found = [path for path in sorted(STUDIES.glob("[a-z]_*.yaml")) if (given.folder / path.stem).is_dir()]
    parts = [HEAD.strip()]
    for path in found:
        comparison = read_comparison(given.folder / path.stem)
        if not parts[1:]:
            parts.append(about(comparison))
        parts += section(path, comparison)
    given.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def section(path: Path, comparison: Comparison) -> list[str]:
    """Question, answer and tables of one study."""
    seeds = f"{len(comparison.runs)} runs, {len(comparison.seeds)} seeds"
    parts = [f"## {path.stem}", f"{comparison.question} ({seeds}; held out: {held_out(comparison)})", answer(path)]
    for metric in comparison.metrics:
        values = value_tables(comparison, metric)[0]
        parts.append((values.transposed() if len(values.columns) > 7 else values).markdown())
        parts.append(shortened(verdicts(comparison, metric)).markdown())
    parts.append(diagnostics_table(comparison).markdown())
    return [part for part in parts if part]


def held_out(comparison: Comparison) -> str:
    return ", ".join(dict.fromkeys(domain or NONE for of in comparison.held_out.values() for domain in of))


def shortened(table: TextTable) -> TextTable:
    """Without the columns that only the JSON file needs."""
    kept = [i for i, name in enumerate(table.columns) if name not in ("p, t", "p, Wilcoxon", "seeds")]
    return TextTable(
        table.title,
        tuple(table.columns[i] for i in kept),
        tuple(tuple(line[i] for i in kept) for line in table.lines),
    )


def answer(path: Path) -> str:
    """The comment of a study's file from ``# Answer`` on."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("# Answer")), len(lines))
    text = []
    for line in lines[start:]:
        if not line.startswith("# "):
            break
        text.append(line.removeprefix("# "))
    return " ".join(text)


if __name__ == "__main__":
    main()
