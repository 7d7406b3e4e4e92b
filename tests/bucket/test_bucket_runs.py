"""Whole runs with their folder in a bucket, on machines that vanish with their disks."""

import json
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest
import small_training

from flax_asr import __main__, export, inventory, run_folder
from flax_asr.bucket import store
from flax_asr.record import runlog

pytestmark = pytest.mark.slow


class Cloud:
    """A corpus, a bucket, and machines that see both."""

    def __init__(self, folder: pathlib.Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.source = small_training.corpus(folder)
        self.whole = folder / "whole"
        assert self._process(self.whole, bucket={}).end() == 0

    def start(self, url: str, disk: pathlib.Path, *more: str) -> small_training.Process:
        """The training command on a machine with this disk."""
        return self._process(url, *more, bucket=self.environment | {"XDG_CACHE_HOME": str(disk)})

    def local(self, url: str, disk: pathlib.Path) -> pathlib.Path:
        """Where the run works on that disk."""
        return disk / "flax_asr" / "runs" / url.removeprefix("gs://")

    def _process(self, run, *more: str, bucket):
        return small_training.Process(
            small_training.command(self.source, run, *more),
            self.folder / "output.txt",
            self.folder / "compiled",
            environment=bucket,
        )


@pytest.fixture(scope="module")
def cloud(emulator, tmp_path_factory):
    return Cloud(tmp_path_factory.mktemp("cloud"), emulator)


def downloaded(url: str, folder: pathlib.Path) -> pathlib.Path:
    there = store.Store(url)
    there.download({name: folder / name for name in there.list()})
    return folder


def assert_as_uninterrupted(cloud: Cloud, url: str, tmp_path: pathlib.Path) -> None:
    found = downloaded(url, tmp_path / "downloaded")
    small_training.assert_same(found, cloud.whole)
    assert inventory.steps(found) == inventory.steps(cloud.whole)
    for name in (path.relative_to(cloud.whole) for path in cloud.whole.rglob("*")):
        if (cloud.whole / name).is_file() and name.parts[0] not in ("tensorboard", "checkpoints"):
            assert (found / name).is_file() or name.name == run_folder.LOCK, name
    weights = pathlib.Path("export") / "model.safetensors"
    assert (found / weights).read_bytes() == (cloud.whole / weights).read_bytes()


def test_kills_with_the_disk_gone_change_nothing(cloud, url, tmp_path):
    rng = np.random.default_rng(0)
    times = [event["time"] for event in runlog.read(cloud.whole) if "time" in event]
    hits, fetched = 0, 0
    for number in range(8):
        disk = tmp_path / f"disk{number}"
        process = cloud.start(url, disk)
        if process.wait_until_compiled():
            time.sleep(rng.uniform(0, 3 * (times[-1] - times[0])))
        hits += process.alive
        process.kill()
        fetched += "fetching the checkpoint of step" in process.output
        shutil.rmtree(disk)
    process = cloud.start(url, tmp_path / "last")
    assert process.end() == 0, process.output
    assert hits > 2
    assert fetched > 1
    assert_as_uninterrupted(cloud, url, tmp_path)


def test_kills_with_the_disk_kept_change_nothing(cloud, url, tmp_path):
    """The disk is then ahead of the store."""
    disk = tmp_path / "disk"
    for step in (3, 4, 6):
        process = cloud.start(url, disk)
        saved = cloud.local(url, disk) / inventory.FOLDER / str(step)
        process.wait_for(saved.is_dir)
        process.kill()
    process = cloud.start(url, disk)
    assert process.end() == 0, process.output
    assert "going on after update 6" in process.output
    assert "watching" not in process.output
    assert_as_uninterrupted(cloud, url, tmp_path)
    process = cloud.start(url, tmp_path / "other")
    assert process.end() == 0
    assert f"{url} is finished: 8 updates. Nothing to do." in process.output


def test_sigterm_saves_in_the_bucket_and_another_machine_goes_on(cloud, url, tmp_path):
    disk = tmp_path / "disk"
    process = cloud.start(url, disk)
    process.wait_for(lambda: any("loss" in e for e in runlog.read(cloud.local(url, disk))))
    process.signal(signal.SIGTERM)
    assert process.end() == 75, process.output
    assert f"everything is saved in {url}." in process.output
    newest = inventory.steps(cloud.local(url, disk))[0]
    shutil.rmtree(disk)
    process = cloud.start(url, disk)
    assert process.end() == 0, process.output
    assert f"going on after update {newest}" in process.output
    assert "watching" not in process.output
    assert_as_uninterrupted(cloud, url, tmp_path)


def test_a_run_that_another_machine_is_at_is_refused(cloud, url, tmp_path):
    first = cloud.start(url, tmp_path / "one")
    first.wait_for(lambda: "is mirrored to" in first.output)
    first.wait_for(lambda: store.Store(url).list() != {})
    second = cloud.start(url, tmp_path / "other")
    assert second.end() == 2
    assert f"another run is at work in {url}" in second.output
    first.kill()


def test_other_commands_and_another_machine_s_data_come_from_the_bucket(
    cloud, url, tmp_path, monkeypatch
):
    prepared = f"--data.prepared_dir={url}-prepared"
    process = cloud.start(url, tmp_path / "one", prepared)
    assert process.end() == 0, process.output
    nowhere = f"--data.source={tmp_path / 'nowhere'}"
    process = cloud.start(url, tmp_path / "two", prepared, nowhere, "--train.max_steps=9")
    assert process.end() == 0, process.output
    assert "going on after update 8" in process.output

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "_torch_is_installed", lambda: False)
    run = downloaded(url, tmp_path / "run")
    assert __main__.main(["evaluate", "--model", url, "--json", "scores.jsonl", prepared]) == 0
    tested = [event for event in runlog.read(run) if "test_cer" in event]
    scores = json.loads(pathlib.Path("scores.jsonl").read_text())
    assert scores["eval_cer"] == tested[-1]["test_cer"]

    assert __main__.main(["export", url, "model"]) == 0
    exported = (run / "export" / "model.safetensors").read_bytes()
    assert pathlib.Path("model", "model.safetensors").read_bytes() == exported
    clip = str(next((cloud.source / "cy" / "clips").iterdir()))
    texts = set()
    for model in (url, f"{url}/export", "model"):
        assert __main__.main(["transcribe", "--model", model, "--json", "said.jsonl", clip]) == 0
        texts.add(json.loads(pathlib.Path("said.jsonl").read_text())["text"])
    assert len(texts) == 1
    assert __main__.main(["transcribe", "--model", f"{url}/checkpoints/8", clip]) == 0
