"""Trackers: the list of them, where each of them writes, and that a run's numbers are in no other run's files."""

import json
import struct
import time
import warnings
from types import SimpleNamespace
from typing import get_args

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from pydantic import ValidationError

from disam_peft.config.trackers import JsonLinesConfig, NoTrackerConfig, TensorBoardConfig, TrackerConfig, WandbConfig
from disam_peft.config.training import TrainConfig
from disam_peft.errors import Notice, UserError
from disam_peft.training.trackers.base import TrackedRun
from disam_peft.training.trackers.json_lines import JsonLinesTracker
from disam_peft.training.trackers.tracking import TRACKERS, require_tracker, tracking

SETTINGS = {"seed": 3, "adapter": {"kind": "lora"}}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def runs(tmp_path):
    """Two runs of one recipe."""
    folders = [tmp_path / "name" / domain for domain in ("art", "photo")]
    for folder in folders:
        folder.mkdir(parents=True)
    return [TrackedRun(folder, SETTINGS) for folder in folders]


def track_both(config, runs, accelerator):
    """Two steps in the first run, one in the second."""
    with pytest.warns(Notice, match=f"{config.kind} writes to "):
        with tracking(config, runs[0], accelerator):
            accelerator.log({"loss": 0.5, "domain_loss/art": 0.25}, step=1)
            accelerator.log({"validation/mean_top1": 0.75}, step=1)
            accelerator.log({"loss": 0.375}, step=3)
        with tracking(config, runs[1], accelerator):
            accelerator.log({"loss": 2.0}, step=1)
    assert accelerator.trackers == []


def test_the_configs_are_the_list_of_trackers():
    union = get_args(get_args(TrackerConfig)[0])
    kinds = {get_args(config.model_fields["kind"].annotation)[0]: config for config in union}
    assert kinds.pop("none") is NoTrackerConfig
    assert {kind: get_args(vars(tracker)["__orig_bases__"][0])[0] for kind, tracker in TRACKERS.items()} == kinds
    assert len(kinds) >= 3


def test_a_name_is_short_for_its_kind():
    assert TrainConfig().tracker == NoTrackerConfig()
    for name in ("none", "tensorboard", "json_lines", "wandb"):
        short = TrainConfig.model_validate({"tracker": name})
        assert short == TrainConfig.model_validate({"tracker": {"kind": name}})
        assert TrainConfig.model_validate(short.model_dump(mode="json")) == short
    given = TrainConfig.model_validate({"tracker": {"kind": "wandb", "project": "pacs"}})
    assert given.tracker == WandbConfig(project="pacs")
    with pytest.raises(ValidationError, match=r"'tensorbord' .* 'none', 'tensorboard', 'json_lines', 'wandb'"):
        TrainConfig.model_validate({"tracker": "tensorbord"})
    with pytest.raises(ValidationError, match="projct"):
        TrainConfig.model_validate({"tracker": {"kind": "wandb", "projct": "pacs"}})


def test_none_writes_nothing(runs, accelerator, tmp_path):
    require_tracker(NoTrackerConfig())
    with tracking(NoTrackerConfig(), runs[0], accelerator):
        accelerator.log({"loss": 0.5}, step=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_json_lines(runs, accelerator):
    track_both(JsonLinesConfig(), runs, accelerator)
    first, second = ((run.folder / "tracking.jsonl").read_text().splitlines() for run in runs)
    assert list(map(json.loads, first)) == [
        {"step": 1, "loss": 0.5, "domain_loss/art": 0.25},
        {"step": 1, "validation/mean_top1": 0.75},
        {"step": 3, "loss": 0.375},
    ]
    assert list(map(json.loads, second)) == [{"step": 1, "loss": 2.0}]


def test_json_lines_have_every_step_once_after_a_resume(tmp_path):
    path = tmp_path / "tracking.jsonl"
    before = JsonLinesTracker(path)
    for step in (1, 2, 3):
        before.log({"loss": float(step)}, step=step)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    resumed = JsonLinesTracker(path)
    for step, loss in ((2, 20.0), (3, float("inf")), (4, 40.0)):
        resumed.log({"loss": loss}, step=step)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 20.0},
        {"step": 3, "loss": None},
        {"step": 4, "loss": 40.0},
    ]
    assert list(tmp_path.iterdir()) == [path]


CUT_INSIDE_A_CHARACTER = '{"step": 2, "domain_loss/café'.encode()[:-1]
NO_NEWLINE = b'{"step": 2, "loss": 2.0}'


@pytest.mark.parametrize("end", [CUT_INSIDE_A_CHARACTER, NO_NEWLINE])
@pytest.mark.parametrize("name", ["loss", "domain_loss/a\u2028b", "domain_loss/a\x85b"])
def test_json_lines_keep_earlier_steps_whatever_the_names_and_the_cut(tmp_path, end, name):
    path = tmp_path / "tracking.jsonl"
    JsonLinesTracker(path).log({name: 1.0}, step=1)
    path.write_bytes(path.read_bytes() + end)
    JsonLinesTracker(path).log({name: 3.0}, step=3)
    JsonLinesTracker(path).log({name: 4.0}, step=4)
    whole = [{"step": 2, "loss": 2.0}] if end == NO_NEWLINE else []
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == [
        {"step": 1, name: 1.0},
        *whole,
        {"step": 3, name: 3.0},
        {"step": 4, name: 4.0},
    ]


class CountingTracker(GeneralTracker):
    """A tracker that, as that of wandb, does not leave it to Accelerate on which process it starts."""

    name = "counting"
    requires_logging_directory = False
    main_process_only = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("is_main_process", [True, False])
@pytest.mark.parametrize("kind", sorted(TRACKERS))
def test_the_main_process_alone_opens_a_tracker(kind, is_main_process, runs, tmp_path, monkeypatch):
    opened = []

    def open_counting(self, run):
        opened.append(CountingTracker())
        return opened[-1]

    monkeypatch.setattr(TRACKERS[kind], "open", open_counting)
    monkeypatch.setattr(TRACKERS[kind], "require_installed", lambda self: None)
    accelerator = SimpleNamespace(is_main_process=is_main_process, trackers=[])
    config = TrainConfig.model_validate({"tracker": kind}).tracker
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with tracking(config, runs[0], accelerator):
            assert accelerator.trackers == opened
    assert [tracker.calls for tracker in opened] == ([["start", "finish"]] if is_main_process else [])
    assert accelerator.trackers == []
    assert [w.category for w in told] == ([Notice] if is_main_process else [])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_tensorboard(runs, accelerator, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="an extra")
    track_both(TensorBoardConfig(), runs, accelerator)
    found = []
    for run in runs:
        events = accumulator.EventAccumulator(str(tmp_path / "name/tensorboard" / run.folder.name))
        events.Reload()
        found.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert found == [
        {"loss": [(1, 0.5), (3, 0.375)], "domain_loss/art": [(1, 0.25)], "validation/mean_top1": [(1, 0.75)]},
        {"loss": [(1, 2.0)]},
    ]


@pytest.mark.slow
def test_wandb_offline(runs, accelerator, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an extra")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    track_both(WandbConfig(project="pacs"), runs, accelerator)
    folders = sorted(path for path in (tmp_path / "name/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    named = {}
    for folder in folders:
        [file] = folder.glob("*.wandb")
        records = complete_wandb_records(file)
        [about] = [record.run for record in records if record.HasField("run")]
        assert about.project == "pacs"
        settings = {item.key: json.loads(item.value_json) for item in about.config.update}
        assert {key: settings[key] for key in SETTINGS} == SETTINGS
        steps = [record.history for record in records if record.HasField("history")]
        named[about.display_name] = [
            (
                step.step.num,
                {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in step.item
                    if not "".join([*item.nested_key, item.key]).startswith("_")
                },
            )
            for step in steps
        ]
    assert named == {
        "name/art": [(1, {"loss": 0.5, "domain_loss/art": 0.25, "validation/mean_top1": 0.75}), (3, {"loss": 0.375})],
        "name/photo": [(1, {"loss": 2.0})],
    }


def complete_wandb_records(file):
    """The records of a run that has ended; wandb's own process writes the last of them after ``finish`` returns."""
    deadline = time.monotonic() + 30
    records = []
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, f"{len(records)} records in {file}, and none says that the run ended"
        time.sleep(0.1)
        records = list(wandb_records(file.read_bytes()))
    return records


def wandb_records(data):
    """The records of a ``.wandb`` file, which is a log as LevelDB writes it: blocks of 32 KB with records that may be
    spread over several, after 7 bytes that name the format."""
    from wandb.proto import wandb_internal_pb2

    position, whole = 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + length]
        position += 7 + length
        whole = part if kind in (1, 2) else whole + part  # 1: all of it, 2: its beginning
        if kind in (1, 4):  # 4: its end
            yield wandb_internal_pb2.Record.FromString(whole)  # type: ignore[attr-defined]  # made by protobuf


@pytest.mark.parametrize("config", [TensorBoardConfig(), WandbConfig()])
def test_a_missing_package_is_named_with_the_command(config, runs, accelerator, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (require_tracker, lambda config: tracking(config, runs[0], accelerator).__enter__()):
        with pytest.raises(UserError, match=rf'pip install "disam_peft\[{config.kind}\]"'):
            use(config)
    require_tracker(JsonLinesConfig())


def test_the_user_is_told_where_to_look(runs, accelerator):
    for config, place in (
        (TensorBoardConfig(), r"tensorboard.art; tensorboard --logdir .*tensorboard shows it$"),
        (JsonLinesConfig(), r"art.tracking.jsonl; pandas.read_json"),
    ):
        with pytest.warns(Notice, match=place), tracking(config, runs[0], accelerator):
            pass
