"""Disks that are full, read only or gone in the middle of a run, where one can be mounted."""

import pathlib
import re
import subprocess

import pytest
import small_training

from flax_asr import inventory, seals
from flax_asr.record import runlog

pytestmark = pytest.mark.slow
OPTIONS = (
    "--train.max_steps=300",
    "--train.save_steps=20",
    "--train.save_total_limit=20",
    "--data.test_splits=[]",
)


def mount(*arguments) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """A disk with room for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=1100k", "tmpfs", folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {getattr(error, 'stderr', error)}")
    yield folder
    for place in (folder / "run", folder):
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


@pytest.fixture
def start(place, disk, tmp_path):
    """Starts the run on that disk; what it prints goes elsewhere."""

    def start(*more):
        arguments = place.command(disk / "run", *OPTIONS, *more)
        return small_training.Process(arguments, tmp_path / "output.txt", place.cache)

    return start


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """The same run where nothing happens to its disk; each test process makes its own."""
    run = tmp_path_factory.mktemp("undisturbed")
    place.finish(run, *OPTIONS)
    return run


def stopped_with(process: small_training.Process, reason: str) -> None:
    """The run ends with an error that the user can fix."""
    assert process.end() == 2
    last = process.output.splitlines()[-1]
    # Which file was due first, a checkpoint, the log or predictions, is a matter of the moment.
    assert re.match(r"flax-asr: .*(cannot write|cannot be written)", last)
    assert reason in last
    assert "Traceback" not in process.output


def check_sound(run: pathlib.Path) -> None:
    """There are checkpoints, all of them whole, and nothing else beside them."""
    steps = inventory.steps(run)
    assert steps
    for step in steps:
        seals.verify(run / inventory.FOLDER / str(step))
    assert len(list((run / inventory.FOLDER).iterdir())) == len(steps)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(start, disk, undisturbed):
    stopped_with(start(), "No space left on device")
    check_sound(disk / "run")
    assert inventory.steps(disk / "run")[0] < 300
    mount("-o", "remount,size=64m", disk)
    assert start().end() == 0
    small_training.assert_same(disk / "run", undisturbed)


def test_a_full_disk_costs_the_saves_of_its_time_on_request(start, disk, undisturbed):
    process = start("--train.on_save_error=continue")
    process.wait_for(lambda: "cannot write a checkpoint" in process.output)
    mount("-o", "remount,size=64m", disk)
    assert process.end() == 0, process.output
    assert "the run goes on" in process.output
    check_sound(disk / "run")
    assert runlog.read(disk / "run")[-2]["failed_saves"] > 0
    ends = [small_training.state(run, 300) for run in (disk / "run", undisturbed)]
    assert ends[0] == ends[1]


def test_a_disk_that_turns_read_only_stops_the_run(start, disk, undisturbed):
    run, process = disk / "run", start()
    process.wait_for(lambda: inventory.steps(run))
    mount("--bind", run, run)
    mount("-o", "remount,bind,ro", run)
    stopped_with(process, "Read-only file system")
    subprocess.run(["umount", "--lazy", run], check=True)
    mount("-o", "remount,size=64m", disk)
    assert start().end() == 0
    small_training.assert_same(run, undisturbed)


def test_a_disk_that_goes_stops_the_run_and_nothing_is_written_in_its_place(start, disk):
    process = start()
    process.wait_for(lambda: inventory.steps(disk / "run"))
    subprocess.run(["umount", "--lazy", disk], check=True)
    stopped_with(process, "No such file or directory")
    assert list(disk.iterdir()) == []
