"""How the programs of a run are compiled."""

import os
import threading
import time
import types

import jax
import pytest

from flax_asr import compilation


def test_as_many_programs_compile_at_once_as_the_process_may_use_cores(monkeypatch):
    """A container or a job of a cluster may have a few of a machine's cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    lock = threading.Lock()
    running, most = 0, 0

    class Function(compilation.Compilable):
        def compile(self):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05)
            with lock:
                running -= 1
            return self

    names = [f"program {number}" for number in range(9)]
    jobs = {name: (Function(None, None), ()) for name in names}
    compiled = compilation.compile_all(jobs)
    assert list(compiled) == names
    assert most == 3


class Chip:
    def __init__(self, platform: str, device_kind: str = ""):
        self.platform, self.device_kind = platform, device_kind


def test_other_than_tpus_are_compiled_for_by_default():
    assert compilation.options(Chip("cpu")) is None
    assert compilation.options(Chip("gpu", "NVIDIA H100"), forward_only=True) is None


def test_what_only_scores_is_compiled_with_less_effort_than_what_trains():
    target = "xla_jf_convolution_performance_target"
    for kind in ("TPU v4", "TPU v5 lite"):
        trains = compilation.options(Chip("tpu", kind))
        scores = compilation.options(Chip("tpu", kind), forward_only=True)
        assert float(scores[target]) < float(trains[target])
        assert {**trains, target: ""} == {**scores, target: ""}
    assert trains != compilation.options(Chip("tpu", "TPU v4"))


def test_an_option_that_the_compiler_does_not_know_is_left_out_and_told_of_once(caplog):
    options = {"xla_of_another_release": "1", "xla_embed_ir_in_executable": "True"}
    function = compilation.Compilable(jax.jit(lambda x: x + 1), options)
    jobs = {number: (function, (jax.ShapeDtypeStruct((number,), float),)) for number in (1, 2, 3)}
    compiled = compilation.compile_all(jobs)
    assert compiled[2](jax.numpy.ones(2)).tolist() == [2, 2]
    (told,) = caplog.messages
    assert "compiling without xla_of_another_release" in told


def test_what_else_the_compiler_refuses_is_an_error():
    class TooLarge(jax.stages.Lowered):
        def __init__(self):
            pass

        def compile(self, options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: xla_of_the_chip and all memory")

    mapped = types.SimpleNamespace(lower=TooLarge)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compilation.Compilable(mapped, {"xla_of_the_chip": "1"}).compile()


def test_compilations_are_counted_while_a_run_is_at_work_and_no_longer():
    def compiled():
        jax.jit(lambda x: x + 1).lower(1.0).compile()

    with compilation.Compilations() as compilations:
        compiled()
    counted = compilations.count
    compiled()
    assert (counted > 0, compilations.count) == (True, counted)
