"""How the programs of a run are compiled."""

import os
import threading
import time

from flax_asr import parallel


def test_as_many_programs_compile_at_once_as_the_process_may_use_cores(monkeypatch):
    """A container or a job of a cluster may have a few of a machine's cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    lock = threading.Lock()
    running, most = 0, 0

    class Program:
        def __call__(self):
            raise NotImplementedError("it is to be compiled")

        def lower(self):
            return self

        def compile(self, options):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05)
            with lock:
                running -= 1
            return self

    names = [f"program {number}" for number in range(9)]
    jobs = {name: (Program(), ()) for name in names}
    compiled = parallel.compile_all(jobs, parallel.Devices())
    assert list(compiled) == names
    assert most == 3
