"""What a start finds of compiled programs after a kill in the middle of writing one."""

import logging
import types
import zlib

import pytest

from flax_asr import assembly, kept_programs, parallel, programs

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


def test_half_written_and_changed_programs_go_and_whole_ones_stay(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="flax_asr"):
        kept_programs.discard_damaged(folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {"whole-cache", "packed-otherwise-cache", "another file"}
    assert f"3 of 5 compiled programs in {folder} were damaged or half written" in caplog.text
    caplog.clear()
    kept_programs.discard_damaged(folder)
    kept_programs.discard_damaged(folder / "not there")
    assert not caplog.records


def test_a_run_removes_them_before_it_compiles(folder, monkeypatch):
    found = set()
    monkeypatch.setattr(programs, "jobs", lambda *_: {})
    monkeypatch.setattr(parallel, "gather_jobs", lambda *_: {})
    monkeypatch.setattr(parallel, "compile_all", lambda *_: {})
    monkeypatch.setattr(
        parallel, "keep_compiled", lambda place: found.update(p.name for p in place.iterdir())
    )
    monkeypatch.setattr(assembly.Assembly, "state_shapes", lambda _: None)
    made = object.__new__(assembly.Assembly)
    made.__dict__.update(
        dict.fromkeys("objective layout _rule _shapes train_shapes eval_shapes past".split()),
        cfg=types.SimpleNamespace(train=types.SimpleNamespace(global_batch_size=8)),
        devices=None,
        plan=types.SimpleNamespace(updates_per_epoch=1),
        updates=1,
    )
    made.compile(folder)
    assert "whole-cache" in found
    assert not found & DAMAGED.keys()
