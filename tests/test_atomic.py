"""Files that are written whole or not at all."""

import errno
import os
import pathlib

import pytest

from flax_asr import atomic, run_folder


def write(path: pathlib.Path, text: str, **how) -> None:
    with atomic.replacing(path, **how) as unfinished:
        unfinished.write_text(text)


def fail(path: pathlib.Path, failure: type[BaseException], **how) -> None:
    with atomic.replacing(path, **how) as unfinished:
        unfinished.write_text("ne")
        raise failure


def test_the_content_is_on_the_disk_before_its_name_and_the_name_at_the_end(tmp_path, done):
    write(tmp_path / "a", "new")
    assert done == [".a.unfinished", ".a.unfinished -> a", tmp_path.name]
    done.clear()
    write(tmp_path / "a", "newer", lasting=False)
    assert done == [".a.unfinished -> a"]
    assert (tmp_path / "a").read_text() == "newer"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ended_by", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, shared, ended_by):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ended_by):
        fail(tmp_path / "a", ended_by, shared=shared)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_whoever_may_read_other_files_may_read_it(tmp_path):
    (tmp_path / "other").touch()
    atomic.unfinished(tmp_path / "a").write_text("of a kill")
    atomic.unfinished(tmp_path / "a").chmod(0o600)
    with atomic.replacing(tmp_path / "a") as unfinished:
        assert unfinished.read_text() == ""
        unfinished.chmod(0o600)  # as safetensors does
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_two_that_write_a_shared_file_at_once_do_not_disturb_each_other(tmp_path):
    with atomic.replacing(tmp_path / "a", shared=True) as one, one.open("w") as file:
        file.write("one, wh")
        write(tmp_path / "a", "two", shared=True)
        assert (tmp_path / "a").read_text() == "two"
        file.write("ole")
    assert (tmp_path / "a").read_text() == "one, whole"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_sweeps_what_a_kill_left(tmp_path, shared):
    atomic.unfinished(tmp_path / "a.json", shared=shared).write_text("hal")
    run_folder.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "counts"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders_will_do(tmp_path, monkeypatch, number, counts):
    def sync(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    if counts:
        with pytest.raises(OSError, match="Input/output"):
            write(tmp_path / "a", "new")
    else:
        write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
