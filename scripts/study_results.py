"""Write recipes/studies/RESULTS.md, and what README and manual show of the studies, from their records.

    disam-peft compare recipes/studies/c_methods.yaml --output studies/c_methods
    cp studies/c_methods/records.csv recipes/studies/records/c_methods.csv
    python scripts/study_results.py

Nothing is run. The answer of each study is the comment in its file that begins with ``# Answer``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from study_manual import write_pages

from disam_peft.experiments.collect import collected, key_of, recorded
from disam_peft.experiments.study import load_plan
from disam_peft.report.comparison import NONE, Comparison, TextTable, diagnostics_table, value_tables
from disam_peft.report.comparison import verdict_table as verdicts
from disam_peft.report.comparison_page import about
from disam_peft.report.gains import gains_table

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "recipes/studies"
WIDEST = 7
HEAD = """# What the studies found

On DomainShapes with the CLIP that ships with the package: a synthetic benchmark and a very small model. What is found
here says how the methods behave in it, and nothing about photographs. Written by `python scripts/study_results.py`
from the records in `recipes/studies/records/`, with which `disam-peft compare` makes the pages again without a run."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write recipes/studies/RESULTS.md and the numbers of the manual.")
    parser.add_argument("--output", type=Path, default=ROOT, help="stands for the root of the repository")
    given = parser.parse_args()
    parts, found = [HEAD], {}
    for path, comparison, planned in comparisons():
        if len(parts) == 1:
            parts.append(about(replace(comparison, recorded=0)))
        parts += section(path, comparison, planned)
        found[path.stem] = comparison
    write_pages(found, ROOT, given.output)
    page = given.output / STUDIES.relative_to(ROOT) / "RESULTS.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def comparisons() -> Iterator[tuple[Path, Comparison, int]]:
    """The studies that have records: file, comparison of what is recorded, number of planned runs."""
    for path in sorted(STUDIES.glob("[a-z]_*.yaml")):
        plan = load_plan(path, output=Path("studies") / path.stem)
        before = recorded(plan)
        done = replace(plan, cells=[cell for cell in plan.cells if key_of(cell) in before.cells])
        if done.cells:
            yield path, collected(done, Path("studies"), {}, before)[0], len(plan.cells)


def section(path: Path, comparison: Comparison, planned: int) -> list[str]:
    """Question, answer and tables of one study."""
    done = comparison.recorded
    runs = f"{done} runs" if done == planned else f"{done} of {planned} runs"
    about_runs = f"({runs}, {len(comparison.seeds)} seeds; held out: {held_out(comparison)})"
    parts = [f"## {path.stem}", f"{comparison.question} {about_runs}", answer(path)]
    tables = [table for name in comparison.conditions if (table := gains_table(comparison, name)) is not None]
    for metric in comparison.metrics:
        values = value_tables(comparison, metric)[0]
        tables.append(values.transposed() if len(values.columns) > WIDEST else values)
        tables.append(shortened(verdicts(comparison, metric)))
    tables.append(diagnostics_table(comparison))
    return [part for part in (*parts, *(table.markdown() for table in tables)) if part]


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
