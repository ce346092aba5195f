"""Signals, full disks, second processes and lost ranks: an orderly end each, and nothing is lost."""

import json
import os
import shutil
import signal
import socket
import threading
import time

import pytest

from disam_peft.common.locks import locked
from disam_peft.data.loading import loader
from disam_peft.disam.disam import DISAM
from disam_peft.disam.perturbation import AscentDirection
from disam_peft.errors import Notice, Stopped, UserError
from disam_peft.experiments import run
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training.checkpoint import signals
from disam_peft.training.checkpoint import storage as checkpoints
from disam_peft.training.checkpoint.signals import StopSignals
from tests.helpers.interrupted import ended, ends_itself, forked, result, saved
from tests.helpers.losses import replace_loss

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="processes are forked and signalled as POSIX systems do it"),
    pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice"),
]


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """A shell starts what it runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# -- row 32: signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_row_32_a_signal_ends_the_step_saves_and_exits(finished, make_recipe, start, capfd, number, code):
    expected, recipe = finished(), make_recipe()
    # in the middle of step 5, while the weights are perturbed
    assert ended(start(recipe, ends_itself(AscentDirection, "add_", 5, number=number))) == code
    assert saved(recipe) == ["step-000004", "step-000005"]
    err = capfd.readouterr().err
    assert f"{number.name}: this step, a checkpoint, then the end; again: at once" in err
    assert "stopped by a signal after step 5 of 12. The last checkpoint is" in err
    assert "step-000005; to go on from there, give the same command with --resume" in err
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_row_32_a_second_signal_stops_at_once_and_saves_nothing(finished, make_recipe, start, number, code):
    expected, recipe = finished(), make_recipe()

    def at_once():
        signals.SAME_WISH_SECONDS = 0.0
        ends_itself(AscentDirection, "add_", 5, number=number)()
        ends_itself(AscentDirection, "add_", 5, number=number)()  # around the first: both in step 5, both perturbed

    assert ended(start(recipe, at_once)) == code
    assert saved(recipe) == ["step-000002", "step-000004"], "nothing of step 5, whose weights were perturbed"
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected


def test_row_32_the_same_wish_sent_twice_is_one(make_recipe, start):
    """As by a terminal to all processes, and by a launcher that passes it on."""
    recipe = make_recipe()

    def twice():
        for _ in range(2):
            ends_itself(AscentDirection, "add_", 5, number=signal.SIGINT)()

    assert ended(start(recipe, twice)) == 130
    assert saved(recipe) == ["step-000004", "step-000005"]


def test_row_32_a_signal_to_the_workers_too(make_recipe, start):
    """As many schedulers send it: to every process of the group."""
    recipe = make_recipe(train={"workers": 2})

    def alone():
        os.setpgrp()
        real = AscentDirection.add_

        def add_(self, rho, calls=[]):  # noqa: B006  (counts)
            real(self, rho)
            calls.append(1)
            if len(calls) == 5:
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.3)  # a worker that dies of it would end the main process with an error

        AscentDirection.add_ = add_

    assert ended(start(recipe, alone)) == 143
    assert saved(recipe) == ["step-000004", "step-000005"]


def test_row_32_a_worker_outlives_a_signal_for_a_while():
    def work():
        loader.WORKER_GRACE_SECONDS = 1
        options = loader._options([], 1, False, None, reused=False)
        options["worker_init_fn"](0)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.01)

    assert ended(forked(work)) == -signal.SIGALRM, "not of the signals themselves, and not never"


def test_row_32_handlers_are_put_back_and_ignored_signals_stay_so():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received is None, "this process was started to ignore it"
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
    seen = []

    def elsewhere():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[signal.SIGINT]], "Python handles signals on the main thread only"


def test_a_stop_is_no_exception_that_a_loop_over_runs_would_swallow():
    assert not issubclass(Stopped, Exception)
    assert Stopped("", signal.SIGTERM).exit_code == 143


# -- rows 34 and 15: the disk, the files ---------------------------------------------------------------------


def test_row_34_a_full_disk_ends_the_run_with_an_error_and_loses_nothing(finished, make_recipe, start, capfd):
    expected, recipe = finished(), make_recipe()

    def full():
        real, calls = checkpoints.write_through, []

        def write(path, content):
            calls.append(1)
            if len(calls) == 8:  # the second of three files of the third save
                raise OSError(28, "No space left on device")
            real(path, content)

        checkpoints.write_through = write

    assert ended(start(recipe, full)) == 2
    err = capfd.readouterr().err
    assert (
        "step-000006 could not be saved: No space left on device; step-000004, the one before it, is untouched" in err
    )
    assert sorted(os.listdir(recipe.folder("photo") / "checkpoints")) == ["step-000002", "step-000004"]
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected


def test_row_34_a_full_disk_elsewhere_in_training(make_recipe, start, capfd):
    recipe = make_recipe()

    def full():
        real = run.append_event

        def append(path, event, **values):
            if values.get("step") == 7:
                raise OSError(28, "No space left on device")
            real(path, event, **values)

        run.append_event = append

    assert ended(start(recipe, full)) == 2
    err = capfd.readouterr().err
    assert "the disk is full: [Errno 28] No space left on device" in err
    assert "step-000006; to go on from there" in err


def test_row_15_a_file_that_vanishes_stops_the_run_with_the_last_checkpoint_named(
    make_recipe, start, domains_folder, tmp_path, capfd
):
    images = tmp_path / "images"
    shutil.copytree(domains_folder, images)
    recipe = make_recipe(data={"root": images})

    def vanish():
        real = run.append_event

        def append(path, event, **values):
            real(path, event, **values)
            if values.get("step") == 5:
                (images / "art").rename(images.parent / "away")

        run.append_event = append

    assert ended(start(recipe, vanish)) == 2
    err = capfd.readouterr().err
    assert "cannot be read (No such file or directory)" in err
    assert "step-000004; to go on from there, give the same command with --resume" in err
    (images.parent / "away").rename(images / "art")
    assert ended(start(recipe)) == 0


# -- row 36: the lock ----------------------------------------------------------------------------------------


def test_row_36_the_second_process_on_a_folder_is_told_who_is_there(make_recipe, start, tmp_path):
    recipe = make_recipe()
    go = tmp_path / "go"

    def slow():
        real = AscentDirection.add_

        def add_(self, rho):
            real(self, rho)
            while not go.exists():
                time.sleep(0.01)

        AscentDirection.add_ = add_

    pid = start(recipe, slow)
    folder = recipe.folder("photo")
    while not (folder / "metrics.jsonl").exists() and not (folder / "recipe.yaml").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"photo is in use by process {pid} on {socket.gethostname()}, since 20"):
        run.train(recipe, resume=True)
    go.touch()
    assert ended(pid) == 0
    assert [outcome.fit for outcome in run.train(recipe, resume=True)] == [None], "finished: kept"


def test_row_36_a_stale_lock_is_taken_over_with_a_notice(tmp_path):
    folder = tmp_path / "photo"

    def die():
        with locked(folder):
            os.kill(os.getpid(), signal.SIGKILL)

    pid = forked(die)
    assert ended(pid) == -signal.SIGKILL
    with (
        pytest.warns(Notice, match=rf"in use by process {pid} .* which is gone: its lock is taken over"),
        locked(folder),
    ):
        owner = json.loads((tmp_path / ".photo.owner.json").read_text())
        assert owner["pid"] == os.getpid()
        assert ended(forked(lambda: locked(folder).__enter__())) == 2
    assert not (tmp_path / ".photo.owner.json").exists()
    with locked(folder):
        pass


def test_row_36_orphans_of_a_killed_process_are_waited_for(tmp_path):
    """Workers may be forked with the lock in their hands, and outlive the one who took it."""
    import fcntl

    gone = forked(lambda: None)
    assert ended(gone) == 0
    owner = {"pid": gone, "host": socket.gethostname(), "since": "yesterday"}
    (tmp_path / ".photo.owner.json").write_text(json.dumps(owner))
    with open(tmp_path / ".photo.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        orphan = forked(lambda: time.sleep(1.0))
    start = time.monotonic()
    with pytest.warns(Notice, match="taken over"), locked(tmp_path / "photo"):
        assert time.monotonic() - start > 0.2, "it was held"
    assert ended(orphan) == 0


# -- row 39, and whatever else two processes must agree on ---------------------------------------------------


@pytest.mark.slow
def test_row_33_and_39_one_of_two_ranks_is_killed(finished, make_recipe, start_two, capfd):
    """The other ends with an error, soon; resumed, both come to the bits of an uninterrupted pair."""
    swad = {"kind": "swad", "n_converge": 1, "n_tolerance": 2, "tolerance_ratio": 2.0}
    penalties = [{"kind": "groupdro", "eta": 0.5}, {"kind": "fishr", "weight": 1e6, "anneal": 5}, {"kind": "irm"}]
    averages = ["bma", "ema", {"kind": "swa", "start": 0.25}, swad, {**swad, "variant": "published"}]
    changes = {"average": averages, "objective": {"penalties": penalties}}
    expected, recipe = finished(start_two, **changes), make_recipe(**changes)
    pids = start_two(recipe, lambda rank: rank == 1 and ends_itself(AscentDirection, "add_", 6)())
    assert ended(pids[1]) == -signal.SIGKILL
    assert ended(pids[0], within=60) == 1
    assert saved(recipe) == ["step-000002", "step-000004"]
    assert "The last checkpoint is" in capfd.readouterr().err
    assert [ended(pid) for pid in start_two(recipe)] == [0, 0]
    assert result(recipe) == expected


@pytest.mark.slow
def test_row_39_one_of_two_ranks_hangs(make_recipe, start_two):
    recipe = make_recipe(train={"timeout_minutes": 0.1})

    def hang(rank):
        if rank == 1:
            setattr(DISAM, "backward", lambda *arguments, **options: time.sleep(600))  # noqa: B010

    pids = start_two(recipe, hang)
    assert ended(pids[0], within=60) == 1
    os.kill(pids[1], signal.SIGKILL)
    assert ended(pids[1]) == -signal.SIGKILL


def test_row_32_a_signal_to_one_rank_stops_both(make_recipe, start_two, start, capfd):
    recipe = make_recipe()
    stop = ends_itself(AscentDirection, "add_", 5, number=signal.SIGTERM)
    pids = start_two(recipe, lambda rank: rank == 1 and stop())
    assert [ended(pid) for pid in pids] == [143, 143]
    assert saved(recipe) == ["step-000004", "step-000005"]
    assert ended(start(recipe)) == 2, "one process cannot go on where two were"
    assert "was saved by 2 process(es), this run has 1" in capfd.readouterr().err


def test_row_11_nan_on_one_of_two_ranks_is_skipped_by_both(make_recipe, start_two):
    recipe = make_recipe()

    def poison(rank):
        calls = []

        def sometimes_nan(logits, labels):
            calls.append(1)
            return cross_entropy(logits, labels) * (
                float("nan") if rank == 1 and len(calls) == 5 else 1.0
            )  # pass 1 of step 3

        replace_loss(sometimes_nan)

    assert [ended(pid, within=60) for pid in start_two(recipe, poison)] == [0, 0]
    lines = (recipe.folder("photo") / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["step"] for e in events if e["event"] == "step" and e["skipped"]] == [3]
    assert events[-1]["skipped_steps"] == 1


def test_a_failing_main_process_leaves_no_other_waiting(make_recipe, start_two):
    recipe = make_recipe()
    with locked(recipe.folder("photo")):
        assert [ended(pid, within=60) for pid in start_two(recipe)] == [2, 2], "both are told: it is in use"
