"""The log of a run: whole lines, strict JSON, rewound to a checkpoint."""

import json
import resource

import pytest

from flax_asr import errors
from flax_asr.record import runlog


def lines(run) -> list[str]:
    return (run / runlog.FILE).read_text(encoding="utf-8").splitlines()


def test_events_come_back_in_order(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    events = [{"step": 1, "loss": 0.1}, {"step": 2, "eval_cer": 1 / 3, "note": "é\u2028x"}]
    for event in events:
        log.append(event)
    log.close()
    assert runlog.read(tmp_path) == events


def test_a_run_without_a_log_has_no_events(tmp_path):
    assert runlog.read(tmp_path) == []


def test_events_after_those_of_the_checkpoint_are_dropped(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    for step in (2, 4, 4, 6):
        log.append({"step": step})
    assert len(log.events) == 4
    resumed = runlog.RunLog(tmp_path, 3, after=4)
    resumed.append({"step": 5})
    assert len(resumed.events) == 4
    assert [event["step"] for event in runlog.read(tmp_path)] == [2, 4, 4, 5]


@pytest.mark.parametrize("line", ["1", "[2]", '"x"', "null", '{"loss": 1}', "[" * 100_000])
def test_a_line_that_is_no_event_ends_the_log(tmp_path, line):
    (tmp_path / runlog.FILE).write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    assert runlog.read(tmp_path) == [{"step": 1}]


def test_events_that_a_checkpoint_had_and_the_log_has_not_are_told_of(tmp_path, caplog):
    (tmp_path / runlog.FILE).write_text('{"step": 1}\n')
    runlog.RunLog(tmp_path, 1, after=1).close()
    assert caplog.text == ""
    runlog.RunLog(tmp_path, 3, after=1).close()
    assert "log.jsonl has 1 of the 3 events that were there" in caplog.text


def test_a_line_cut_by_a_kill_ends_the_log_and_is_mended(tmp_path):
    path = tmp_path / runlog.FILE
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xc3')
    assert runlog.read(tmp_path) == [{"step": 1}]
    log = runlog.RunLog(tmp_path, 9, after=2)
    log.append({"step": 2})
    log.close()
    assert [json.loads(line) for line in lines(tmp_path)] == [{"step": 1}, {"step": 2}]


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "padding": 0.5})
    assert lines(tmp_path) == ['{"step": 1, "padding": 0.5}']


def test_a_full_disk_is_one_clear_error(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    log.append({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(errors.CheckpointError, match=r"cannot write .*log\.jsonl"):
            log.append({"step": 2, "note": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert runlog.read(tmp_path) == [{"step": 1}]


def test_tensorboard_shows_no_step_twice(tmp_path):
    pytest.importorskip("tensorboardX")
    log = runlog.RunLog(tmp_path, 0, after=0)
    for step in (2, 4):
        log.append({"step": step, "loss": 1.0 / step, "note": "text"})
    log.close()
    log = runlog.RunLog(tmp_path, 1, after=2)
    log.append({"step": 4, "loss": 0.25})
    log.close()
    scalars, purges = [], []
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        for event in events_of(path.read_bytes()):
            if event.HasField("session_log"):
                purges.append(event.step)
                scalars = [entry for entry in scalars if entry[1] < event.step]
            scalars += [(value.tag, event.step) for value in event.summary.value]
    # A reader drops what came before a purge, from its step on.
    assert purges == [1, 3]
    assert scalars == [("loss", 2), ("loss", 4)]


def events_of(content: bytes):
    """Records of a TensorBoard file: length, checksum, bytes, checksum."""
    from tensorboardX.proto import event_pb2

    place = 0
    while place < len(content):
        length = int.from_bytes(content[place : place + 8], "little")
        event = event_pb2.Event()
        event.ParseFromString(content[place + 12 : place + 12 + length])
        yield event
        place += 16 + length


def test_scores_are_found_in_the_log(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    log.append({"step": 2, "loss": 1.0})
    log.append({"step": 2, "eval_clips": 3, "eval_cer": 0.5})
    log.append({"step": 4, "eval_clips": 3, "eval_cer": 0.25})
    log.append({"step": 4, "best_step": 4, "test_cer": 0.125})
    assert log.evaluated(2)
    assert not log.evaluated(3)
    assert log.best("eval_cer") == 0.25
    assert log.best("eval_wer") == float("inf")


def test_a_log_that_is_not_written_remembers_the_same(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    log.append({"step": 1, "eval_cer": 0.5})
    other = runlog.RunLog(tmp_path, 1, after=1, writes=False)
    log.append({"step": 2, "eval_cer": 0.25, "loss": float("nan")})
    other.append({"step": 2, "eval_cer": 0.25, "loss": float("nan")})
    assert other.events == log.events
    assert len(lines(tmp_path)) == 2


def test_what_could_not_be_written_comes_with_the_next_event(tmp_path):
    log = runlog.RunLog(tmp_path, 0, after=0)
    log.append({"step": 1})
    away = tmp_path.rename(tmp_path.with_name("away"))
    for step in (2, 3):
        with pytest.raises(errors.CheckpointError, match=r"cannot write .*log\.jsonl"):
            log.append({"step": step})
    away.rename(tmp_path)
    assert len(log.events) == 3
    log.flush()
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3]
    (tmp_path / runlog.FILE).unlink()
    log.append({"step": 4})
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".unfinished"] == []


def test_a_board_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    board = pytest.importorskip("tensorboardX.event_file_writer")

    def full(writer, event):
        raise OSError(28, "No space left on device")

    log = runlog.RunLog(tmp_path, 0, after=0)
    monkeypatch.setattr(board.EventsWriter, "write_event", full)
    for step in range(40):
        log.append({"step": step, "loss": 1.0})
    log.close()
    assert len(log.events) == 40
    assert len(lines(tmp_path)) == 40
