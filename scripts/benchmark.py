"""What a training step costs against a naive one: ratios, measured side by side in one process.

    python scripts/benchmark.py                       # everything: about ten minutes on two cores
    python scripts/benchmark.py lora --rounds 11
    python scripts/benchmark.py run --data FOLDER     # whole runs on FOLDER/<domain>/<class>/*: half an hour

Variants run interleaved (A B A B ...), and the median of the per-round ratios is printed with its range: machines are
noisy, ratios are not. Beside each stands by how much the gradients differ. Weights are random at the sizes of ViT-B/32,
which changes no time. Prints a Markdown table. Needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
import typer
from bench import accumulation, attention, bookkeeping, coop, growth, lora, memory, probe, whole_run
from bench.measure import Row, machine, table
from bench.models import vit_b_32, write_clip

Section = Literal["bookkeeping", "lora", "coop", "memory", "probe", "growth", "accumulation", "run"]
What = Literal["all", Section]
BLOCKS = 12


def main(
    what: Annotated[What, typer.Argument()] = "all",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds that count, after a cold one. Unset: 2 to 5, as they last.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=3, help="Images of a step. Unset: 8, and 32 for the bookkeeping.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Unset: torch's choice.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of domains, for whole runs.")] = None,
    held_out: Annotated[str, typer.Option(help="The domain that whole runs leave out.")] = "sketch",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """What a training step costs against a naive one, as a Markdown table of ratios measured side by side."""
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = torch.device(device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clip(folder, vit_b_32())
        size = 8 if batch is None else batch
        for section, rounds_by_default, measure in _sections(folder, size, batch or 32, where):
            if what in ("all", section):
                typer.echo(f"measuring {section} ...", err=True)
                rows += measure(rounds_by_default if rounds is None else rounds)
        if data is not None and what in ("all", "run"):
            rows += whole_run.rows(folder, data, held_out)
        elif what == "run":
            raise typer.BadParameter("whole runs need --data FOLDER")
    typer.echo(f"{machine(where)}; ViT-B/32, float32, batch {8 if batch is None else batch}\n")
    typer.echo(table(rows))


def _sections(
    folder: Path, batch: int, large_batch: int, device: torch.device
) -> list[tuple[Section, int, Callable[[int], list[Row]]]]:
    """Section, its number of rounds, and what measures it in so many."""
    return [
        ("bookkeeping", 5, lambda rounds: bookkeeping.rows(folder, large_batch, rounds, device)),
        ("lora", 5, lambda rounds: lora.rows(folder, BLOCKS, batch, rounds, device)),
        ("lora", 5, lambda rounds: attention.rows(vit_b_32(), batch, rounds, device)),
        ("coop", 3, lambda rounds: coop.few_classes(folder, 65, batch, rounds, device)),
        ("coop", 2, lambda rounds: coop.many_classes(folder, 345, batch, rounds, device)),
        ("memory", 2, lambda rounds: memory.rows(folder, 1000, batch, rounds, device)),
        ("probe", 5, lambda rounds: probe.rows(folder, rounds, device)),
        ("growth", 5, lambda rounds: growth.rows(folder, rounds, device)),
        ("accumulation", 5, lambda rounds: accumulation.rows(folder, large_batch, rounds, device)),
    ]


if __name__ == "__main__":
    typer.run(main)
