"""What the data of a run are: its images by content, and where two looks at the data differ."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING

from disam_peft.common.run_images import Part, RunImages, size_as_content
from disam_peft.data.splits import without_test_part

if TYPE_CHECKING:
    from disam_peft.data.dataset import DomainDataset
    from disam_peft.experiments.build import SplitData


def images_of(data: SplitData) -> RunImages:
    """The images of a run and what it uses each of them for. The given test part of the held-out domain is ``test``,
    although the whole domain is judged."""
    parts: list[tuple[Part, DomainDataset]] = [
        ("training", data.training),
        ("validation", data.validation),
    ]
    if data.target is not None:
        parts.append(("held_out", data.target if data.test is None else without_test_part(data.target)))
    if data.test is not None:
        parts.append(("test", data.test))
    key: list[str] = []
    content: list[str] = []
    domain: list[str] = []
    class_name: list[str] = []
    part: list[Part] = []
    size: list[int] = []
    for name, dataset in parts:
        sizes = dataset.sizes_and_times[0].tolist()
        key += dataset.keys
        content += dataset.hashes if dataset.hashes is not None else map(size_as_content, sizes)
        domain += [dataset.domains[number] for number in dataset.domain_ids]
        class_name += [dataset.classes[number] for number in dataset.labels]
        part += [name] * len(dataset)
        size += sizes
    return RunImages(
        tuple(key),
        tuple(content),
        tuple(domain),
        tuple(class_name),
        tuple(part),
        tuple(size),
        dict(zip(data.training.classes, data.training.prompt_names, strict=True)),
    )


def content_by_cell(dataset: DomainDataset) -> dict[str, str]:
    """How many images each class has in each domain, and a hash over their names, given parts and contents (sizes in
    place of contents, where the data check was left out): enough to say where two looks at the same data differ."""
    contents = dataset.hashes if dataset.hashes is not None else [str(size) for size in dataset.sizes_and_times[0]]
    cells: defaultdict[str, list[str]] = defaultdict(list)
    for i, key in enumerate(dataset.keys):
        cell = f"images of {dataset.domains[dataset.domain_ids[i]]}/{dataset.classes[dataset.labels[i]]}"
        cells[cell] += [key if dataset.given_parts is None else f"{key}\0{dataset.given_parts[i]}", contents[i]]
    found = {cell: f"{len(parts) // 2} (sha256 {_digest(parts)})" for cell, parts in sorted(cells.items())}
    return {"class names": f"{len(dataset.prompt_names)} (sha256 {_digest(dataset.prompt_names)})", **found}


def _digest(parts: list[str] | tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
