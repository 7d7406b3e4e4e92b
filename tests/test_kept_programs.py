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


@pytest.fixture
def read(monkeypatch):
    """What is there for JAX to read, folder by folder."""
    found = []
    monkeypatch.setattr(
        kept_programs,
        "_tell_jax",
        lambda folder: found.append({path.name for path in folder.iterdir()}),
    )
    return found


def test_half_written_and_changed_programs_go_and_whole_ones_stay(folder, read, caplog):
    with caplog.at_level(logging.WARNING, logger="flax_asr"):
        kept_programs.keep(folder)
    assert read == [{"whole-cache", "packed-otherwise-cache", "another file"}]
    assert f"3 of 5 compiled programs in {folder} were damaged or half written" in caplog.text


def test_nothing_is_said_where_all_is_whole(folder, read, tmp_path, caplog):
    kept_programs.keep(folder)
    (tmp_path / "new").mkdir()
    caplog.clear()
    kept_programs.keep(folder)
    kept_programs.keep(tmp_path / "new")
    assert not caplog.records
    assert read[2] == set()


TWO_RUNS = """
import pathlib, sys
import jax
from flax_asr import kept_programs
for number, place in enumerate(map(pathlib.Path, sys.argv[1:])):
    kept_programs.keep(place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x * number + 1)(1.0)
    print(len(list(place.glob("*-cache"))) > 0)
"""


def test_a_second_run_of_a_process_keeps_its_programs_in_its_own_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, tmp_path / "one", tmp_path / "two"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "True"]
