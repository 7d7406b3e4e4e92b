"""Models and prepared data in a bucket: what is needed is copied, once, and verified."""

import fcntl
import os
import pathlib
import re

import pytest
import small_folder
import small_saved

from flax_asr import errors, inventory, seals
from flax_asr.bucket import copies, store
from flax_asr.data import remote, shards


@pytest.fixture
def run(url, tmp_path):
    """A run folder on the disk; `put` brings it into the bucket."""
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = small_folder.configuration(folder)
    small_folder.run(folder, cfg, steps=(), finished=False)
    for step, score in ((2, 0.1), (4, 0.3), (6, None)):
        small_folder.save(folder, cfg, step, metrics={} if score is None else {"eval_cer": score})
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    put(folder, url)
    return folder


def put(folder: pathlib.Path, url: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    store.Store(url).upload({path.relative_to(folder).as_posix(): path for path in files})


def arrays(folder: pathlib.Path) -> list[int]:
    """The steps whose arrays are there."""
    return sorted(int(p.parts[-3]) for p in folder.glob("checkpoints/*/state/arrays"))


@pytest.fixture
def downloads(monkeypatch):
    """The names of all objects that are copied."""
    names, download = [], store.Store.download

    def noted(place, files):
        names.extend(files)
        download(place, files)

    monkeypatch.setattr(store.Store, "download", noted)
    return names


def test_of_a_run_the_best_checkpoint_is_copied_once(url, run, downloads):
    local = copies.model(url)
    assert inventory.is_run(local)
    assert arrays(local) == [2]
    assert inventory.by_merit(inventory.scores(local)) == [2, 4, 6]
    assert downloads.count("checkpoints/2/state/arrays") == 1
    assert copies.model(url) == local
    assert downloads.count("checkpoints/2/state/arrays") == 1


@pytest.mark.parametrize("by_url", [False, True])
def test_a_step_is_copied_where_it_is_asked_for(url, run, by_url):
    local = copies.model(f"{url}/checkpoints/6") if by_url else copies.model(url, 6)
    assert arrays(copies.store.local_folder(url, kind="models")) == [6]
    assert local.name == ("6" if by_url else "run")


def test_a_damaged_best_one_gives_way_to_the_next(url, run, caplog):
    store.Store(url).write("checkpoints/2/state/arrays", b"else")
    assert 4 in arrays(copies.model(url))
    assert "the checkpoint of step 2 in gs://" in caplog.text


def test_a_run_that_went_on_is_copied_anew(url, run):
    local = copies.model(url)
    store.Store(url).remove([f"checkpoints/2/{seals.FILE}"])
    small_folder.save(run, small_folder.configuration(run), 8, metrics={"eval_cer": 0.05})
    put(run / "checkpoints" / "8", f"{url}/checkpoints/8")
    copies.model(url)
    assert arrays(local) == [8]


def test_another_folder_is_copied_whole_and_follows_changes(url, run, downloads):
    local = copies.model(f"{url}/export")
    assert [path.name for path in local.iterdir()] == ["config.json"]
    copies.model(f"{url}/export")
    assert downloads == ["config.json"]
    place = store.Store(f"{url}/export")
    place.write("config.json", b"[]")
    place.write("vocab.json", b"{}")
    assert copies.pretrained(url) == local
    assert (local / "config.json").read_bytes() == b"[]"
    place.remove(["vocab.json"])
    copies.model(f"{url}/export")
    assert [path.name for path in local.iterdir()] == ["config.json"]


@pytest.mark.parametrize("place", ["export/", "checkpoints/2/"])
def test_what_a_kill_left_goes_and_what_is_at_work_stays(url, run, place):
    """On another machine, say, that sees the same home."""
    of = f"{url}/export" if place == "export/" else url
    left, at_work = (copies.model(url) / place / f".x.{n}.unfinished" for n in (0, 1))
    for path in (left, at_work):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    os.utime(left, (0, 0))
    copies.model(of)
    assert [left.exists(), at_work.exists()] == [False, True]


def test_a_second_process_waits_for_the_copy_of_the_first(url, run, downloads, monkeypatch):
    folder = store.local_folder(f"{url}/export", kind="models")
    flock, calls = fcntl.flock, []

    def first_finishes_meanwhile(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            raise BlockingIOError
        if len(calls) == 2:
            assert list(folder.iterdir()) == []
            copies.model(f"{url}/export")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", first_finishes_meanwhile)
    local = copies.model(f"{url}/export")
    assert len(calls) == 3
    assert downloads == ["config.json"]
    assert local == folder
    assert (local / "config.json").is_file()


def test_where_no_copy_can_be_made_the_folder_is_named(url, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(run / "config.yaml"))
    with pytest.raises(errors.StoreError, match=r"cannot be made: Not a directory.*XDG_CACHE_HOME"):
        copies.model(url)


def test_a_url_with_nothing_behind_it_is_refused(url):
    with pytest.raises(errors.ModelError, match=f"there is nothing in {re.escape(url)}"):
        copies.model(url)


@pytest.fixture
def prepared(url, tmp_path):
    """A prepared split, on the disk and in the bucket."""
    folder = tmp_path / "made" / "train"
    small_saved.split(folder, ["ab", "ba"])
    remote.send(folder, url)
    return folder


def test_prepared_data_are_copied_once_and_verified(url, prepared, tmp_path, downloads):
    local = tmp_path / "copy" / "train"
    local.mkdir(parents=True)
    remote.fetch(url, local)
    assert {p.name: p.read_bytes() for p in local.iterdir()} == {
        p.name: p.read_bytes() for p in prepared.iterdir() if p.is_file()
    }
    before = len(downloads)
    remote.fetch(url, local)
    remote.send(local, url)
    assert len(downloads) == before


def test_damaged_prepared_data_are_refused(url, prepared, tmp_path):
    (audio,) = [name for name in store.Store(url).list() if name.startswith("audio")]
    content = bytearray(store.Store(url).read(audio))
    content[-1] ^= 1
    store.Store(url).write(audio, bytes(content))
    local = tmp_path / "copy" / "train"
    local.mkdir(parents=True)
    with pytest.raises(errors.DataError, match="is damaged, or was while it was copied"):
        remote.fetch(url, local)
    assert not shards.is_finished(local)


def test_half_sent_prepared_data_are_none(url, prepared, tmp_path):
    store.Store(url).remove([shards.MANIFEST])
    local = tmp_path / "copy" / "train"
    local.mkdir(parents=True)
    remote.fetch(url, local)
    assert list(local.iterdir()) == []
