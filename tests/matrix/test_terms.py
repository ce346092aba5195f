"""What every loss, penalty and anchor promises in training, in each of its variants and together.

The gradient does not depend on how a batch is divided, nor on where its images come from; a run that is cut goes on to
the same bits. Values are the business of ``tests/unit/objectives``.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disam_peft.config.anchors import ClassFeaturesAnchorConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.training.compiled_blocks import CompiledBlocks
from tests.helpers import terms
from tests.helpers.paths import environment
from tests.helpers.terms import BATCH, CASES, METHODS, ON_RANKS, PLAIN, Case, Workplace
from tests.unit.training.test_compiled_blocks import Counting

every_case = pytest.mark.parametrize("name", CASES)
UNEVEN = 5  # micro-batches of 1 and 2 of the seven images
FOLLOWED = Callable[[str, object], None]


@pytest.fixture(scope="module")
def uneven_folder(domains_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of unequal size, or class weights would be ones."""
    folder = tmp_path_factory.mktemp("uneven") / "domains"
    shutil.copytree(domains_folder, folder)
    for number, file in enumerate(sorted(folder.glob("*/red/*"))):
        if number % 3:
            file.unlink()
    return folder


@pytest.fixture(scope="module")
def made(twins: tuple[str, str], uneven_folder: Path) -> Callable[..., Workplace]:
    """A workplace of each precision, made once. Accelerate has one state for a process, so the last one asked for is
    the one that counts."""
    found: dict[Any, Workplace] = {}

    def of(precision: str = "no", *, wide: bool = True) -> Workplace:
        if (precision, wide) not in found:
            found[precision, wide] = Workplace(twins, uneven_folder, precision, wide=wide)
        return found[precision, wide]

    return of


@pytest.fixture(scope="module")
def place(made: Callable[..., Workplace]) -> Workplace:
    return made()


@pytest.fixture(scope="module")
def whole(place: Workplace) -> Callable[..., dict[str, Any]]:
    """What a case comes to from images, in one piece, on one process."""
    found: dict[Any, dict[str, Any]] = {}

    def of(name: str, method: str = "disam") -> dict[str, Any]:
        if (name, method) not in found:
            found[name, method] = place.train(CASES[name], method)
        return found[name, method]

    return of


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest one, of weights, values of the objective and states; relative where they are above 1."""
    assert found["state"].keys() == wanted["state"].keys()
    pairs = [(found["weights"], wanted["weights"])]
    pairs += [(torch.tensor(of["values"], dtype=torch.float64) for of in (found, wanted))]
    pairs += [(found["state"][key].double(), wanted["state"][key].double()) for key in wanted["state"]]
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)


def same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    states = found["state"].keys() == wanted["state"].keys()
    states = states and all(torch.equal(found["state"][key], value) for key, value in wanted["state"].items())
    return states and torch.equal(found["weights"], wanted["weights"]) and found["values"] == wanted["values"]


@every_case
def test_it_acts(name: str, place: Workplace, whole: Callable[..., dict[str, Any]]) -> None:
    """Or everything below would hold for nothing."""
    if name == "cross_entropy":
        return
    plain = place.train(Case(PLAIN.objective, CASES[name].adapter))
    assert (whole(name)["weights"] - plain["weights"]).abs().max() > 1e-4


@every_case
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_the_whole(
    name: str, method: str, place: Workplace, whole: Callable[..., dict[str, Any]], record_property: FOLLOWED
) -> None:
    for pieces in (2, 3, UNEVEN) if method == "disam" else (3,):
        largest = difference(place.train(CASES[name], method, pieces), whole(name, method))
        record_property("largest_difference", f"{largest:.1e}")
        assert largest <= 1e-12, pieces


@every_case
def test_what_is_saved_goes_on_to_the_same_bits(
    name: str, place: Workplace, whole: Callable[..., dict[str, Any]]
) -> None:
    assert same_bits(place.resumed(CASES[name], "disam_gsam"), whole(name, "disam_gsam"))


@every_case
@pytest.mark.parametrize("source", ["feature store", "pixel store"])
def test_stores_are_images(
    name: str, source: str, place: Workplace, whole: Callable[..., dict[str, Any]], record_property: FOLLOWED
) -> None:
    if name == "mixup of=features" or (name == "mixup of=images" and source == "feature store"):
        return  # ``fit`` refuses to mix what is not read
    largest = difference(place.train(CASES[name], source=source), whole(name))
    record_property("largest_difference", f"{largest:.1e}")
    assert largest <= 1e-12


@every_case
def test_a_loss_scaler_changes_no_more_than_rounding(
    name: str, place: Workplace, whole: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two, in float64: what fp16 asks of the step, shown on a CPU."""
    wanted = whole(name)
    monkeypatch.setattr(place.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert difference(place.train(CASES[name], pieces=2), wanted) <= 1e-12


@every_case
def test_under_autocast_it_comes_to_the_same_up_to_its_rounding(name: str, made: Callable[..., Workplace]) -> None:
    """The objective of the first step; and none is skipped."""
    wide = made("no", wide=False).train(CASES[name])
    narrow = made("bf16", wide=False).train(CASES[name])
    assert narrow["values"][0] == pytest.approx(wide["values"][0], rel=0.1)
    assert not torch.equal(narrow["weights"], wide["weights"])


@every_case
def test_compiled_blocks_change_no_more_than_rounding(
    name: str, place: Workplace, whole: Callable[..., dict[str, Any]], compiled: Callable[..., CompiledBlocks]
) -> None:
    assert difference(place.train(CASES[name], around=compiled), whole(name)) <= 1e-12


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., CompiledBlocks]]:
    """Compiles the blocks of each classifier once."""
    torch.compiler.reset()
    counting, found = Counting(), dict[int, CompiledBlocks]()

    def of(classifier: Any) -> CompiledBlocks:
        blocks = classifier.backbone.blocks("image") + classifier.backbone.blocks("text")
        return found.setdefault(id(classifier), CompiledBlocks(blocks, counting.backend))

    yield of
    assert counting.ran > 0
    torch.compiler.reset()


@pytest.fixture(scope="module")
def ranks(twins: tuple[str, str], uneven_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What each rank has found, by the number of ranks."""
    found: dict[int, list[dict[str, Any]]] = {}

    def of(size: int) -> list[dict[str, Any]]:
        if size not in found:
            folder = tmp_path_factory.mktemp("ranks")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            words = [sys.executable, terms.__file__, port, size, *twins, uneven_folder, folder]
            done = subprocess.run(
                [str(word) for word in words], env=environment(), capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            found[size] = [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        return found[size]

    return of


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between forks is tested on POSIX systems")
@pytest.mark.parametrize(("name", "method"), [(name, method) for name, method, _ in ON_RANKS])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_are_one_process(
    name: str,
    method: str,
    size: int,
    ranks: Callable[[int], list[dict[str, Any]]],
    whole: Callable[..., dict[str, Any]],
    record_property: FOLLOWED,
) -> None:
    """Parts of unequal size, and on four ranks domains that a rank lacks."""
    on_rank = ranks(size)
    parts = [[len(domains) for domains in of["domains"]] for of in on_rank]
    assert len({tuple(lengths) for lengths in parts}) > 1
    assert [sum(lengths) for lengths in zip(*parts, strict=True)] == [BATCH] * terms.STEPS
    if size == 4:
        assert any(len(domains.unique()) < 3 for of in on_rank for domains in of["domains"])
    first = on_rank[0][f"{name}/{method}"]
    assert all(same_bits(of[f"{name}/{method}"], first) for of in on_rank)
    largest = difference(first, whole(name, method))
    record_property("largest_difference", f"{largest:.1e}")
    assert largest <= 1e-12


def test_what_is_not_climbed_is_descended(place: Workplace) -> None:
    """``in_ascent`` of an anchor in training: ERM is the same, SAM is not."""

    def weights(method: str, in_ascent: bool) -> torch.Tensor:
        anchor = ClassFeaturesAnchorConfig(in_ascent=in_ascent)
        found: torch.Tensor = place.train(Case(ObjectiveConfig(anchors=[anchor])), method)["weights"]
        return found

    assert torch.equal(weights("erm", True), weights("erm", False))
    assert (weights("sam", True) - weights("sam", False)).abs().max() > 1e-4
