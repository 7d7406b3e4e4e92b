"""Two hosts with their run folder in a bucket, each on a disk of its own that vanishes."""

import pathlib
import shutil
import signal

import pytest
import small_training
from small_hosts import Pair, finish

from flax_asr import checkpoint, inventory, run_folder
from flax_asr.bucket import store
from flax_asr.record import runlog

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(place, emulator, url, tmp_path):
    """Starts the training command on two machines with these disks."""

    def start(*more: str, disks=("disk0", "disk1"), **own) -> Pair:
        words = [place.command(url, *more, *own.get(name, ())) for name in ("first", "second")]
        variables = [emulator | {"XDG_CACHE_HOME": str(tmp_path / disk)} for disk in disks]
        return Pair(place, words, tmp_path / "output", environments=variables)

    return start


def local(url: str, disk: pathlib.Path) -> pathlib.Path:
    return disk / "flax_asr" / "runs" / url.removeprefix("gs://")


def assert_as_uninterrupted(url: str, whole: pathlib.Path, folder: pathlib.Path) -> None:
    there = store.Store(url)
    there.download({name: folder / name for name in there.list()})
    small_training.assert_same(folder, whole)
    assert inventory.steps(folder) == inventory.steps(whole)
    weights = pathlib.Path("export") / "model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    assert (folder / run_folder.FINISHED).is_file()


def test_both_killed_and_both_disks_gone_changes_nothing(pair, url, whole, tmp_path):
    with pair() as two:
        there = store.Store(url)
        two.hosts[0].wait_for(lambda: there.read("checkpoints/3/seal.json") is not None)
        for host in two.hosts:
            host.kill()
    for disk in ("disk0", "disk1"):
        shutil.rmtree(tmp_path / disk)
    output = finish(pair())
    # The first host, which logs, and the store agree on where to go on.
    assert "going on after update" in output
    assert "Traceback" not in output
    assert_as_uninterrupted(url, whole, tmp_path / "downloaded")
    # The other host had nothing but what it needed.
    here = local(url, tmp_path / "disk1")
    assert inventory.steps(here) == [checkpoint.load_model(tmp_path / "downloaded").step]
    assert not (here / "export").exists()
    assert f"{url} is finished" in finish(pair(disks=("disk2", "disk3")))


def test_a_signal_saves_in_the_bucket_and_the_hosts_may_change_places(pair, url, whole, tmp_path):
    with pair() as two:
        folder = local(url, tmp_path / "disk0")
        two.hosts[1].wait_for(lambda: any("loss" in event for event in runlog.read(folder)))
        two.hosts[1].signal(signal.SIGTERM)
        assert two.end() == [75, 75], two.output
        assert "watching" not in two.output
    newest = inventory.steps(folder)[0]
    output = finish(pair(disks=("disk1", "disk0")))
    assert f"going on after update {newest}" in output
    # What the second host had written, as the first, is kept.
    assert inventory.steps(next(folder.parent.glob("run-*")))[0] == newest
    assert_as_uninterrupted(url, whole, tmp_path / "downloaded")


def test_one_host_prepares_for_all_in_a_bucket(pair, url, whole, tmp_path):
    prepared, nowhere = f"--data.prepared_dir={url}-prepared", tmp_path / "nowhere"
    output = finish(pair(prepared, second=[f"--data.source={nowhere}"]))
    assert output.count("preparing train: 16/16 clips") == 1
    assert_as_uninterrupted(url, whole, tmp_path / "downloaded")


def test_hosts_that_see_one_disk_have_one_local_folder(pair, url, whole, tmp_path):
    finish(pair(disks=("disk", "disk")))
    assert_as_uninterrupted(url, whole, tmp_path / "downloaded")
    assert inventory.steps(local(url, tmp_path / "disk")) == inventory.steps(whole)


def test_a_bucket_on_one_host_only_is_refused(pair, url, tmp_path):
    with pair(second=[f"--output_dir={tmp_path / 'run'}"]) as two:
        assert two.end() == [2, 2], two.output
        for host in two.hosts:
            assert "the hosts do not have the same bucket:" in host.output
            assert f"output_dir: '{url}' on host 0, None on host 1" in host.output
