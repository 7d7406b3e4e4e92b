"""A process that dies or hangs costs one task; order, memory and ends are under control."""

import contextlib
import itertools
import os
import pathlib
import signal
import sys
import time

import pytest

from flax_asr import errors
from flax_asr.data import pool
from flax_asr.data.pool import Failure, run_ordered


def work(task):
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "exit":
        os._exit(7)
    if task == "hang":
        time.sleep(60)
    if task == "raise":
        raise RuntimeError("no good")
    if task == "modules":
        return {name for name in ("jax", "torch", "transformers", "librosa") if name in sys.modules}
    if isinstance(task, bytes):
        return task * 2
    if isinstance(task, float):
        time.sleep(task)
    return task


def run(tasks, workers=2, limit_seconds=20.0, batch=1):
    return run_ordered(
        work, enumerate(tasks), workers=workers, limit_seconds=limit_seconds, batch=batch
    )


def children() -> set[int]:
    """Processes of this one, by Linux's process table."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended in the meantime
            after_name = path.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("batch", [1, 4])
def test_results_come_in_order_with_their_items(batch):
    tasks = [0.05 if i % 3 == 0 else i for i in range(42)]
    tasks[5] = None
    assert list(run(tasks, batch=batch)) == list(enumerate(tasks))
    assert list(run([])) == []
    assert list(run([None])) == [(0, None)]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_dead_process_costs_one_task(batch, monkeypatch):
    starts, start = itertools.count(), pool.worker.start

    def counted(function):
        assert next(starts) < 40, "what kills its process is tried again without end"
        return start(function)

    monkeypatch.setattr(pool.worker, "start", counted)
    tasks = [1, "die", 2, 3, "exit", 4, "die", "die", 5]
    found = list(run(tasks, batch=batch))
    assert [item for item, _ in found] == list(range(9))
    for (_, result), task in zip(found, tasks, strict=True):
        if task == "die":
            assert result == Failure("crashed", "exit code -9")
        elif task == "exit":
            assert result == Failure("crashed", "exit code 7")
        else:
            assert result == task


@pytest.mark.parametrize("batch", [1, 4])
def test_a_hanging_process_costs_one_task_and_the_limit(batch):
    start = time.monotonic()
    found = list(run([1, "hang", 2, 3, 4], limit_seconds=1.0, batch=batch))
    assert time.monotonic() - start < 20
    assert [r for _, r in found] == [1, Failure("timeout", "more than 1 s"), 2, 3, 4]


def test_what_the_function_raises_is_the_result_of_its_task():
    found = [result for _, result in run([1, "raise", 2], workers=1)]
    assert found == [1, Failure("failed", "RuntimeError: no good"), 2]


def test_large_tasks_and_results_do_not_block_each_other():
    tasks = [bytes([i]) * 2_000_000 for i in range(12)]
    start = time.monotonic()
    assert [result for _, result in run(tasks)] == [task * 2 for task in tasks]
    assert time.monotonic() - start < 30


def test_the_source_is_read_only_so_far_ahead():
    taken = []

    def tasks():
        for i in range(1000):
            taken.append(i)
            yield i, i

    results = run_ordered(work, tasks(), workers=2, limit_seconds=20)
    list(itertools.islice(results, 50))
    assert len(taken) <= 50 + 2 * 8 + 1
    results.close()


def test_processes_end_with_the_iterator():
    before = children()
    results = run([1.0] * 50)
    next(results)
    assert len(children() - before) == 2
    results.close()
    assert children() <= before


def test_workers_import_no_heavy_packages():
    assert [result for _, result in run(["modules"])] == [set()]


class Unloadable:
    """Its process cannot even read what it is to do."""

    def __call__(self, task):
        return task

    def __reduce__(self):
        return os._exit, (3,)


def test_processes_that_cannot_start_stop_the_run():
    with pytest.raises(errors.DataError, match=r"cannot start .crashed, exit code 3"):
        list(run_ordered(Unloadable(), [(1, 1)], workers=2, limit_seconds=5))
    assert pool.available_cores() >= 1
