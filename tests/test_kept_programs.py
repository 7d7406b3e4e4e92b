"""What a start finds of compiled programs after a kill in the middle of writing one."""

import logging
import subprocess
import sys
import zlib

import pytest

from flax_asr import kept_programs

WHOLE = zlib.compress(bytes(range(256)) * 1000)


def flipped(entry: bytes) -> bytes:
    middle = len(entry) // 2
    return entry[:middle] + bytes([entry[middle] ^ 4]) + entry[middle + 1 :]


DAMAGED = {"cut-cache": WHOLE[:-1], "flipped-cache": flipped(WHOLE), "empty-cache": b""}


@pytest.fixture
def folder(tmp_path):
    there = DAMAGED | {
        "whole-cache": WHOLE,
        "packed-otherwise-cache": b"\x28\xb5\x2f\xfd...",
        "another file": b"",
    }
    for name, content in there.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_half_written_and_changed_programs_go_and_whole_ones_stay(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="flax_asr"), kept_programs.kept(folder):
        assert names(folder) == {"whole-cache", "packed-otherwise-cache", "another file"}
    assert f"3 of 5 compiled programs in {folder} were damaged or half written" in caplog.text


def test_nothing_is_said_where_all_is_whole(folder, tmp_path, caplog):
    with kept_programs.kept(folder):
        pass
    (tmp_path / "new").mkdir()
    caplog.clear()
    for place in (folder, tmp_path / "new"):
        with kept_programs.kept(place):
            pass
    assert not caplog.records
    assert names(tmp_path / "new") == set()


A_PROGRAM = """
import contextlib, pathlib, sys
import jax
from flax_asr import kept_programs
own, *runs = map(pathlib.Path, sys.argv[1:])
jax.config.update("jax_compilation_cache_dir", str(own))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for number, place in enumerate([own, *runs, own]):
    with contextlib.suppress(KeyError):
        with kept_programs.kept(place) if place in runs else contextlib.nullcontext():
            before = set(own.glob("*-cache"))
            jax.jit(lambda x: x * number + 1)(1.0)
            print(len(set(own.glob("*-cache")) - before), len(list(place.glob("*-cache"))))
            raise KeyError
"""


def test_every_run_of_a_process_keeps_its_programs_in_its_own_folder_and_only_these(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", A_PROGRAM, *(tmp_path / name for name in ("own", "one", "two"))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n") == ["1 1", "0 1", "0 1", "1 2", ""]
