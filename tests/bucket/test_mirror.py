"""Run folders in a bucket: what is there is whole, and any disk can go on from it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import small_folder

from flax_asr import errors, inventory, run_folder, seals
from flax_asr.bucket import follower, lease, mirror, store
from flax_asr.record import runlog


@pytest.fixture
def disks(tmp_path):
    """Makes run folders on different machines, so to speak."""

    def disk(name: str) -> pathlib.Path:
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / run_folder.LOCK).touch()
        return folder

    return disk


@pytest.fixture
def attach(url):
    """Opens mirrors, and closes those that are left."""
    opened = []

    def attach(folder, keep: int = 3, restart: bool = False) -> mirror.Mirror:
        opened.append(mirror.Mirror(url, folder, keep, restart))
        return opened[-1]

    yield attach
    for one in opened:
        kill(one)


def kill(mirrored: mirror.Mirror) -> None:
    """As far as the store can tell."""
    mirrored._closing.set()
    mirrored._thread.join()
    mirrored._lease.stop()


@pytest.fixture
def begun(attach):
    """Opens a mirror that looks only when it is told to; then fills the folder as a run does."""

    def begun(folder, keep: int = 3, **what) -> mirror.Mirror:
        mirrored = attach(folder, keep)
        kill(mirrored)
        fill(folder, **what)
        return mirrored

    return begun


def fill(folder: pathlib.Path, steps=(2, 4), finished: bool = False) -> None:
    small_folder.run(folder, small_folder.configuration(folder), steps, finished)
    log(folder, max(steps))


def log(folder: pathlib.Path, events: int) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(events)]
    (folder / runlog.FILE).write_text("".join(lines))


def save(folder: pathlib.Path, step: int, score: float | None = None) -> None:
    metrics = {} if score is None else {"eval_cer": score}
    small_folder.save(folder, small_folder.configuration(folder), step, metrics=metrics)


def names(url: str) -> set[str]:
    return set(store.Store(url).list()) - {lease.FILE}


def sealed(url: str) -> list[int]:
    return sorted(int(n.split("/")[1]) for n in names(url) if n.endswith(seals.FILE))


def content(folder: pathlib.Path, under: str = "") -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in (folder / under).rglob("*")
        if path.is_file() and path.name != run_folder.LOCK
    }


def test_the_store_becomes_like_the_folder(url, disks, begun):
    folder = disks("one")
    mirrored = begun(folder, finished=True)
    (folder / ".half.unfinished").write_text("x")
    (folder / inventory.FOLDER / ".unfinished-6").mkdir()
    (folder / inventory.FOLDER / ".unfinished-6" / "half").write_text("x")
    mirrored.wait()
    wanted = {n: c for n, c in content(folder).items() if "unfinished" not in n}
    assert run_folder.FINISHED in wanted
    there = store.Store(url)
    assert {name: there.read(name) for name in names(url)} == wanted


def test_changes_go_by_themselves(url, disks, attach):
    folder = disks("one")
    mirrored = attach(folder)
    fill(folder, steps=(2,))
    save(folder, 4)
    (folder / "README.md").write_text("card")
    for _ in range(200):
        if "README.md" in names(url) and sealed(url) == [2, 4]:
            break
        time.sleep(0.05)
    assert sealed(url) == [2, 4]
    assert store.Store(url).read("README.md") == b"card"
    mirrored.check()


def test_the_log_comes_before_and_the_seal_after_the_files(url, disks, begun, monkeypatch):
    written = []
    for method in ("write", "upload"):
        plain = getattr(store.Store, method)

        def noted(place, first, *rest, plain=plain):
            plain(place, first, *rest)
            written.extend([first] if isinstance(first, str) else first)

        monkeypatch.setattr(store.Store, method, noted)
    folder = disks("one")
    begun(folder, finished=True).wait()
    order = {name: place for place, name in enumerate(written)}
    for step in (2, 4):
        files = [n for n in order if n.startswith(f"checkpoints/{step}/")]
        assert max(files, key=order.get) == f"checkpoints/{step}/{seals.FILE}"
        assert order[runlog.FILE] < min(order[name] for name in files)
    assert max(order.keys() - {lease.FILE}, key=order.get) == run_folder.FINISHED
    # The newest first: it is what would be lost.
    assert order[f"checkpoints/4/{seals.FILE}"] < order[f"checkpoints/2/{inventory.META}"]


def test_half_a_line_of_the_log_is_not_sent(url, disks, begun):
    folder = disks("one")
    mirrored = begun(folder)
    with open(folder / runlog.FILE, "a") as file:
        file.write('{"step": 5, "lo')
    mirrored.wait()
    assert store.Store(url).read(runlog.FILE).endswith(b'{"step": 3, "loss": 1.0}\n')


def test_what_the_run_does_not_keep_goes_from_the_store_too(url, disks, begun):
    folder = disks("one")
    mirrored = begun(folder, keep=1, steps=(2,))
    save(folder, 4, score=0.1)
    save(folder, 6, score=0.2)
    mirrored.wait()
    assert sealed(url) == [4, 6]
    assert not any(name.startswith("checkpoints/2/") for name in names(url))
    # A local folder that lost them takes nothing along.
    shutil.rmtree(folder / inventory.FOLDER)
    save(folder, 8)
    mirrored.wait()
    assert sealed(url) == [4, 8]


def test_what_a_kill_kept_from_being_removed_is_not_sent(url, disks, begun, monkeypatch):
    sent, write = [], store.Store.write

    def noted(place, name, content):
        sent.append(name)
        write(place, name, content)

    monkeypatch.setattr(store.Store, "write", noted)
    mirrored = begun(disks("one"), keep=1, steps=(2, 4, 6))
    mirrored.wait()
    mirrored.wait()
    assert [name for name in sent if name.endswith(seals.FILE)] == [f"checkpoints/6/{seals.FILE}"]
    assert sealed(url) == [6]


def test_a_checkpoint_that_goes_while_it_is_sent_leaves_nothing(url, disks, begun, monkeypatch):
    folder, upload = disks("one"), store.Store.upload

    def removed_in_mid_upload(place, files):
        for path in files.values():
            if path.name == "arrays" and "4" in path.parts:
                shutil.rmtree(folder / inventory.FOLDER / "4")
        upload(place, files)

    monkeypatch.setattr(store.Store, "upload", removed_in_mid_upload)
    begun(folder).wait()
    assert sealed(url) == [2]
    assert not any(name.startswith("checkpoints/4/") for name in names(url))


def test_an_empty_disk_gets_what_it_needs(url, disks, attach, begun):
    one, other = disks("one"), disks("other")
    mirrored = begun(one, finished=True)
    (one / run_folder.COMPILED).mkdir()
    (one / run_folder.COMPILED / "program").write_bytes(b"code")
    (one / "export" / "model.safetensors").write_bytes(b"weights")
    mirrored.wait()
    mirrored.close()
    attach(other)
    there, here = content(one), content(other)
    assert there.keys() - here.keys() == {"export/model.safetensors"}
    assert here == {name: there[name] for name in here}
    assert inventory.newest_sound(other) == 4


def test_a_half_upload_is_no_checkpoint(url, disks, attach, begun):
    one, other = disks("one"), disks("other")
    mirrored = begun(one)
    mirrored.wait()
    kill(mirrored)
    store.Store(url).remove([f"checkpoints/4/{seals.FILE}"])
    attach(other)
    assert inventory.steps(other) == [2]
    assert not any(name.startswith("checkpoints/4/") for name in names(url))


def test_a_step_saved_again_is_no_checkpoint_while_it_is_replaced(url, disks, begun, monkeypatch):
    folder = disks("one")
    mirrored = begun(folder)
    mirrored.wait()
    shutil.rmtree(folder / inventory.FOLDER / "4")
    save(folder, 4, score=0.5)
    seen, upload = [], store.Store.upload

    def watched(place, files):
        seen.append(sealed(url))
        upload(place, files)

    monkeypatch.setattr(store.Store, "upload", watched)
    mirrored.wait()
    assert [2] in seen
    assert sealed(url) == [2, 4]
    seal = folder / inventory.FOLDER / "4" / seals.FILE
    assert store.Store(url).read(f"checkpoints/4/{seals.FILE}") == seal.read_bytes()


def test_the_disk_that_wrote_last_goes_on_with_what_it_has(url, disks, attach, begun):
    """Killed between the save and the upload."""
    folder = disks("one")
    mirrored = begun(folder)
    mirrored.wait()
    kill(mirrored)
    save(folder, 6)
    log(folder, 6)
    before = content(folder)
    attach(folder).wait()
    assert content(folder) == before
    assert sealed(url) == [2, 4, 6]
    assert store.Store(url).read(runlog.FILE) == before[runlog.FILE]


def test_a_disk_whose_run_went_on_elsewhere_is_put_aside(url, disks, attach, begun):
    one, other = disks("one"), disks("other")
    mirrored = begun(one)
    mirrored.wait()
    kill(mirrored)
    save(one, 6)  # never uploaded
    moved = attach(other)
    save(other, 8)
    moved.wait()
    moved.close()
    attach(one)
    assert content(one, inventory.FOLDER) == content(other, inventory.FOLDER)
    (aside,) = [path for path in one.parent.iterdir() if path != one]
    assert inventory.steps(aside) == [6, 4, 2]


def test_a_copy_that_was_not_complete_is_made_again(url, disks, attach, begun, monkeypatch):
    one, other = disks("one"), disks("other")
    mirrored = begun(one)
    mirrored.wait()
    mirrored.close()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(follower, "fetch_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            attach(other)
    assert inventory.steps(other) == []
    attach(other)
    assert inventory.steps(other) == [4, 2]
    assert [path.name for path in other.parent.iterdir()] == ["run"]


def test_what_is_damaged_in_the_store_is_passed_over(url, disks, attach, begun, caplog):
    one, other, third = disks("one"), disks("other"), disks("third")
    mirrored = begun(one)
    mirrored.wait()
    mirrored.close()
    there = store.Store(url)
    there.write("checkpoints/4/state/arrays", b"else")
    moved = attach(other)
    assert inventory.steps(other) == [2]
    assert "the checkpoint of step 4 is not used" in caplog.text
    assert sealed(url) == [2]
    moved.close()
    there.write("checkpoints/2/state/arrays", b"else")
    with pytest.raises(errors.CheckpointError, match=r"no checkpoint in gs://.* is sound: .*state"):
        attach(third)
    assert sealed(url) == [2]


def test_what_is_damaged_on_the_disk_comes_from_the_store(url, disks, attach, begun):
    folder = disks("one")
    mirrored = begun(folder)
    before = content(folder)
    mirrored.wait()
    kill(mirrored)
    (folder / inventory.FOLDER / "4" / "state" / "arrays").write_bytes(b"else")
    log(folder, 1)
    attach(folder)
    assert content(folder) == before


def test_a_second_run_is_refused(url, disks, attach):
    one, other = disks("one"), disks("other")
    mirrored = attach(one)
    with pytest.raises(errors.CheckpointError, match="another run is at work in gs://"):
        attach(other)
    mirrored.check()
    mirrored.wait()


def test_after_a_kill_another_disk_takes_over_and_the_first_would_notice(url, disks, attach, begun):
    one, other = disks("one"), disks("other")
    mirrored = begun(one)
    mirrored.wait()
    kill(mirrored)
    attach(other).wait()
    save(one, 6)
    with pytest.raises(errors.TrainingError, match="belongs to another run now"):
        mirrored.wait()
    assert sealed(url) == [2, 4]


def test_a_strange_owner_file_is_named(url, disks, attach):
    store.Store(url).write(lease.FILE, b"mine!")
    with pytest.raises(errors.TrainingError, match=r"owner\.json was not written by a run"):
        attach(disks("one"))


def test_a_restart_keeps_the_old_run_under_a_dated_name(url, disks, attach, begun):
    folder = disks("one")
    mirrored = begun(folder)
    mirrored.wait()
    mirrored.close()
    old = names(url)
    attach(folder, restart=True)
    assert names(url) == set()
    assert content(folder) == {}
    above = store.Store(url.rpartition("/")[0])
    moved = {name.partition("/")[2] for name in above.list() if name.startswith("run-2")}
    assert moved == old
    (aside,) = [path for path in folder.parent.iterdir() if path != folder]
    assert inventory.steps(aside) == [4, 2]


def fails(monkeypatch, method: str, fault: int | Exception, times: int) -> list[Exception]:
    """Lets calls of the file system fail; gives those that did.

    Args:
        fault: an exception, or an HTTP status, as gcsfs raises it when its own tries are used up.
    """
    from gcsfs import retry

    files, failed = store._file_system(), []
    plain = getattr(files, method)

    def failing(*arguments, **options):
        if len(failed) == times:
            return plain(*arguments, **options)
        failed.append(fault)
        if isinstance(fault, Exception):
            raise fault
        return retry.validate_response(fault, b'{"error": {"message": "so it is"}}', "b/x")

    monkeypatch.setattr(files, method, failing)
    return failed


@pytest.mark.parametrize("fault", [503, 429, TimeoutError(), ConnectionResetError()])
def test_what_passes_is_tried_again(url, disks, begun, monkeypatch, fault):
    folder = disks("one")
    mirrored = begun(folder)
    failed = fails(monkeypatch, "put_file", fault, times=2)
    mirrored.wait()
    assert len(failed) == 2
    assert sealed(url) == [2, 4]


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        (503, 3, "503.* try again later"),
        (403, 1, "access is denied.*Storage Object User"),
        (404, 1, "no bucket some-bucket.*buckets create"),
        (TimeoutError(), 3, "TimeoutError.* try again later"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_does_not_pass_is_one_clear_message(url, monkeypatch, fault, tries, message):
    failed = fails(monkeypatch, "find", fault, times=99)
    with pytest.raises(errors.StoreError, match=f"cannot list {url}: .*{message}"):
        store.Store(url).list()
    assert len(failed) == tries


def test_a_failed_upload_is_told_and_tried_again(url, disks, attach, monkeypatch):
    folder = disks("one")
    mirrored = attach(folder)
    with monkeypatch.context() as patch:
        fails(patch, "put_file", 403, times=10**6)
        fill(folder)
        for _ in range(200):
            if mirrored._failure is not None:
                break
            time.sleep(0.05)
        with pytest.raises(errors.StoreError, match="access is denied") as refusal:
            mirrored.check()
        with pytest.raises(errors.StoreError, match="access is denied"):
            mirrored.wait()
    assert f"What was not uploaded is in {folder}" in str(refusal.value)
    mirrored.wait()
    mirrored.check()
    assert sealed(url) == [2, 4]


def test_a_missing_bucket_is_one_clear_message(url, disks):
    with pytest.raises(errors.StoreError, match="no bucket no-such-bucket"):
        mirror.Mirror("gs://no-such-bucket/run", disks("one"), 3)


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs://bucket", "gs://b/run", "gs://bkt/../x"])
def test_other_urls_are_refused(place):
    with pytest.raises(errors.ConfigError, match="neither a folder nor gs://BUCKET/PATH"):
        store.local_folder(place, kind="runs")


def test_local_copies_lie_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = store.local_folder("gs://bucket/runs/cy/", kind="runs")
    assert folder == tmp_path / "flax_asr" / "runs" / "bucket" / "runs" / "cy"
    assert store.local_folder("runs/cy", kind="runs") == pathlib.Path("runs/cy")


def refused(statement: str, **environment: str) -> str:
    """The message of a fresh process that opens a store."""
    code = (
        f"{statement}\nfrom flax_asr import errors\nfrom flax_asr.bucket import store\n"
        "try: store.Store('gs://bucket/run').list()\n"
        "except errors.StoreError as error: print(error)"
    )
    kept = {n: v for n, v in os.environ.items() if n != "STORAGE_EMULATOR_HOST"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_without_gcsfs_it_is_named():
    message = refused("import sys; sys.modules['gcsfs'] = None")
    assert message == "gs:// needs the package gcsfs: pip install gcsfs.\n"


def test_without_credentials_the_ways_to_them_are_named(tmp_path):
    # NO_GCE_CHECK: do not ask the network whether this is a machine of Google's.
    message = refused("", HOME=str(tmp_path), NO_GCE_CHECK="true", CLOUDSDK_CONFIG=str(tmp_path))
    assert "there are no Google credentials" in message
    assert "gcloud auth application-default login" in message


@pytest.mark.parametrize("content", [b"", b"a\r", b"a\n", b"a\r\n", b"\n\n\r", b"\0\xff"])
def test_a_file_is_read_as_it_was_written(url, tmp_path, content):
    there, file = store.Store(url), tmp_path / "file"
    file.write_bytes(content)
    there.upload({"uploaded": file})
    there.write("written", content)
    assert there.read("uploaded") == there.read("written") == content
    there.download({"uploaded": tmp_path / "back"})
    assert (tmp_path / "back").read_bytes() == content


def test_a_disk_that_takes_no_copy_is_named(url, tmp_path):
    there, file = store.Store(url), tmp_path / "file"
    there.write("object", b"content")
    file.write_bytes(b"")
    with pytest.raises(errors.StoreError, match=r"cannot copy gs://.*/object to .*file/x: "):
        there.download({"object": file / "x"})
