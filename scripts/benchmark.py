"""What a training step costs against a naive one: ratios, measured side by side in one process.

    python scripts/benchmark.py                       # everything: about ten minutes on two cores
    python scripts/benchmark.py lora --rounds 11
    python scripts/benchmark.py run --data FOLDER     # whole runs on FOLDER/<domain>/<class>/*: half an hour
    python scripts/benchmark.py gpu --device cuda     # ViT-B/16 and ViT-L/14 in bf16 on a GPU, alone: minutes

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
from bench import (
    accumulation,
    attention,
    averages,
    bookkeeping,
    cocoop,
    coop,
    gpu,
    growth,
    lora,
    memory,
    methods,
    objective_terms,
    probe,
    prompts,
    terms_alone,
    tip_adapter_f,
    whole_run,
)
from bench.gpu_models import Model
from bench.gpu_models import models as gpu_models
from bench.measure import Row, machine, table
from bench.models import vit_b_32, write_clip

Section = Literal[
    "bookkeeping",
    "lora",
    "coop",
    "cocoop",
    "memory",
    "prompts",
    "probe",
    "tip_adapter",
    "growth",
    "accumulation",
    "objective",
    "methods",
    "averages",
    "run",
]
What = Literal["all", "gpu", Section]
BLOCKS = 12


def main(
    what: Annotated[What, typer.Argument()] = "all",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds that count, after a cold one. Unset: 2 to 5, as they last.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=3, help="Images of a step. Unset: 8, 32 for the bookkeeping, 256 on a GPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Unset: torch's choice.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of domains, for whole runs.")] = None,
    held_out: Annotated[str, typer.Option(help="The domain that whole runs leave out.")] = "sketch",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    models: Annotated[str, typer.Option(help="Of gpu, by commas: b16, l14, tiny.")] = "b16,l14",
    minutes: Annotated[float | None, typer.Option(help="Of gpu: starts no new case after so many.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Of gpu: compiled blocks too. Unset: on cuda.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Of gpu: a file for all raw numbers; the tables beside it, as .md.")
    ] = None,
) -> None:
    """What a training step costs against a naive one, as a Markdown table of ratios measured side by side."""
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = torch.device(device)
    if what == "gpu":
        typer.echo(
            gpu.measure_all(
                _named(models),
                batch=batch or 256,
                rounds=rounds or 5,
                device=where,
                minutes=minutes,
                with_compiled=where.type == "cuda" if compiled is None else compiled,
                json=json,
            )
        )
        return
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


def _named(names: str) -> list[Model]:
    known = gpu_models()
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise typer.BadParameter(f"--models has {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


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
        ("cocoop", 2, lambda rounds: cocoop.rows(folder, 65, 4, rounds, device)),
        ("memory", 2, lambda rounds: memory.rows(folder, 1000, batch, rounds, device)),
        ("prompts", 5, lambda rounds: prompts.rows(folder, batch, rounds, device)),
        ("probe", 5, lambda rounds: probe.rows(folder, rounds, device)),
        ("tip_adapter", 2, lambda rounds: tip_adapter_f.rows(folder, rounds, device)),
        ("growth", 5, lambda rounds: growth.rows(folder, rounds, device)),
        ("accumulation", 5, lambda rounds: accumulation.rows(folder, large_batch, rounds, device)),
        ("objective", 5, lambda rounds: objective_terms.rows(folder, batch, rounds, device)),
        ("objective", 50, lambda rounds: terms_alone.rows(large_batch, 7, rounds)),
        ("methods", 5, lambda rounds: methods.rows(folder, batch, rounds, device)),
        ("averages", 5, lambda rounds: averages.rows(folder, batch, rounds, device)),
    ]


if __name__ == "__main__":
    typer.run(main)
