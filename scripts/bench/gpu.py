"""On a GPU, in mixed precision: images a second, memory and share of the device's matrix rate, ours and the peers'.

What is finished is printed to stderr and saved at once, so that neither a failure nor the end of a lease takes it away.
Batches of images are on the device already; stored features come from pinned memory, as in the training loop.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from .flops import copy_rates, matrix_rate
from .gpu_case import OUT_OF_MEMORY, Result, agreement, attempt, measure, release
from .gpu_models import Case, Model, cases, compiled_cases
from .gpu_table import Section, line, save
from .measure import machine
from .models import write_clip
from .pair import Pair

SMALLER = 4
"""Out of memory, a case is tried again with half the batch and with a quarter."""


class Budget:
    """Minutes after which nothing new is started; None: no end."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._start = time.monotonic()

    @property
    def spent(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


@dataclass
class Run:
    """The section while it is measured.

    Attributes:
        sections: by the model's name.
    """

    device: torch.device
    batch: int
    rounds: int
    budget: Budget
    json: Path | None
    backend: str
    facts: dict[str, Any]
    sections: dict[str, Section] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def section(self, model: Model) -> Section:
        if model.name not in self.sections:
            self.sections[model.name] = Section(model.name, matrix_rate(self.device))
        return self.sections[model.name]

    def say(self, text: str) -> None:
        typer.echo(f"[{self.budget.seconds:.0f} s] {text}", err=True)

    def keep(self) -> None:
        if self.json is not None:
            save(self.json, self.facts, list(self.sections.values()))
            self.json.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")

    def markdown(self) -> str:
        return "\n\n".join([_facts_line(self.facts), *(section.markdown() for section in self.sections.values())])


def measure_all(
    models: Sequence[Model],
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    minutes: float | None = None,
    with_compiled: bool = False,
    json: Path | None = None,
    backend: str = "inductor",
) -> str:
    """Every case of every model in order of importance, as Markdown.

    Args:
        minutes: after which no new case is started.
        with_compiled: the same steps with compiled blocks as well, after all else.
        json: where all raw numbers are kept, case by case; the tables beside it, in a file of that name with .md.
        backend: of torch.compile.
    """
    facts = {"device": machine(device), "batch": batch, "rounds": rounds, "copy_rates": copy_rates(device)}
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    run = Run(device, batch, rounds, Budget(minutes), json, backend, facts)
    run.say(_facts_line(facts))
    with ExitStack() as stack:
        for model, case in _in_order(models, with_compiled):
            try:
                _measure_or_leave_out(run, model, case, stack)
            except Exception as error:  # around a case: a full disk, a device that is gone
                run.say(f"{model.name}, {case.name}: {type(error).__name__}: {error}")
        run.keep()
    return run.markdown()


def _measure_or_leave_out(run: Run, model: Model, case: Case, stack: ExitStack) -> None:
    section = run.section(model)
    if run.budget.spent:
        section.left_out.append(case.name)
        run.say(f"left out: {model.name}, {case.name}")
        return
    if model.name not in run.folders:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_clip(folder, model.config)
        run.folders[model.name] = folder
    _measure_case(run, section, case, run.folders[model.name])


def _in_order(models: Sequence[Model], with_compiled: bool) -> Iterator[tuple[Model, Case]]:
    for model in models:
        for case in cases(model):
            yield model, case
    if with_compiled:
        by_model = [[(model, case) for case in compiled_cases(model)] for model in models]
        for side_by_side in zip(*by_model, strict=True):
            yield from side_by_side


def _measure_case(run: Run, section: Section, case: Case, folder: Path) -> None:
    run.say(f"{section.model}, {case.name} ...")
    whole = [Result(case.name, "all", run.batch)]
    pair = attempt(whole, lambda: case.build(folder, run.device), run.device)
    if pair is None:
        _add(run, section, whole)
    else:
        _compare_gradients(run, section, case, pair)
        _measure_batches(run, section, case, pair)
    del pair
    release(run.device)


def _compare_gradients(run: Run, section: Section, case: Case, pair: Pair) -> None:
    if case.compiled:
        return  # the case has an eager twin
    entry = Result(case.name, "gradients", run.batch)
    found = attempt([entry], lambda: agreement(case, pair, run.device), run.device)
    if found is None:
        _add(run, section, [entry])
    else:
        section.agreements.append(found)
        run.say(f"gradients: float32 {found.wide:.0e}, bf16 {found.mixed:.0e} (rounding {found.rounding:.0e})")


def _measure_batches(run: Run, section: Section, case: Case, pair: Pair) -> None:
    """At the batch asked for; at half and a quarter of it too, as long as a variant does not fit."""
    batch = run.batch
    while True:
        whole = [Result(case.name, "all", batch)]
        measured = partial(measure, case, pair, batch, run.rounds, run.device, run.backend)
        results = attempt(whole, measured, run.device) or whole
        _add(run, section, results)
        all_fit = all(result.problem != OUT_OF_MEMORY for result in results)
        batch //= 2
        if all_fit or batch * SMALLER < run.batch:
            return
        if run.budget.spent:
            section.left_out.append(f"{case.name}, batch {batch}")
            return


def _add(run: Run, section: Section, results: Sequence[Result]) -> None:
    section.results += results
    for result in results:
        run.say(line(result, section.matrix_rate))
    run.keep()


def _facts_line(facts: dict[str, Any]) -> str:
    parts = [facts["device"]]
    if "memory_bytes" in facts:
        parts.append(f"{facts['memory_bytes'] / 1e9:.0f} GB")
    copies = ", ".join(f"{way} {rate / 1e9:.3g} GB/s" for way, rate in facts["copy_rates"].items())
    return f"{', '.join(parts)}; copies: {copies}; float32 weights under bf16 autocast"
