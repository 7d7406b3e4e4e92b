"""Joining other hosts: what the environment says, and when JAX is asked to look by itself."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from flax_asr import errors
from flax_asr.hosts import cluster

ROOT = pathlib.Path(__file__).parents[2]
NAMED = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "3"}


@pytest.fixture
def joined(monkeypatch):
    """`joined(environment)`: what JAX is asked, or None where it is not."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: calls.append(how))
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)

    def join(environment):
        for name in list(os.environ):
            if name.startswith(("JAX_CO", "JAX_NUM", "JAX_PRO", "SLURM_", "OMPI_", "KUBERNETES_")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        cluster.join()
        return calls.pop() if calls else None

    return join


def test_what_the_environment_names_is_passed_on(joined):
    asked = joined(NAMED)
    assert asked["coordinator_address"] == "10.0.0.1:8476"
    assert (asked["num_processes"], asked["process_id"]) == (4, 3)


@pytest.mark.parametrize(
    ("environment", "asks"),
    [
        ({"SLURM_NTASKS": "1"}, False),
        (SLURM, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({}, False),
    ],
)
def test_jax_looks_for_others_only_where_there_may_be_some(joined, environment, asks):
    assert (joined(environment) is not None) == asks


def test_jax_looks_for_the_other_hosts_of_a_pod(joined, monkeypatch):
    monkeypatch.setattr(jax._src.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert joined({}) is not None


def test_the_only_task_of_a_node_gets_all_its_gpus(joined):
    assert joined(SLURM)["local_device_ids"] == [0, 1, 2]
    assert joined(SLURM | {"SLURM_NTASKS": "6"})["local_device_ids"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES without"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID '4' is not a number from 0 to one below"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES 'two'"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "'10.0.0.1' is not HOST:PORT"),
    ],
)
def test_a_wrong_environment_is_refused(joined, change, message):
    environment = {name: value for name, value in (NAMED | change).items() if value is not None}
    with pytest.raises(errors.ConfigError) as refusal:
        joined(environment)
    assert message in str(refusal.value)


def _alone(environment: dict[str, str]) -> subprocess.CompletedProcess:
    code = (
        "from flax_asr.hosts import cluster; cluster.JOINING_SECONDS = 2; cluster.join();"
        "import jax; print(jax.distributed.is_initialized(), jax.process_count())"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_host_by_itself_joins_nothing():
    done = _alone({})
    assert done.stdout.split() == ["False", "1"], done.stderr


def test_hosts_that_never_come_are_not_waited_for_without_end():
    done = _alone(NAMED | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"})
    assert done.returncode == 75
    assert "not all hosts have joined within 2 seconds" in done.stderr


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_is_heard_while_other_hosts_are_waited_for(number):
    code = (
        "import jax; from flax_asr.hosts import cluster, stopping;"
        " real = jax.distributed.initialize;"
        " jax.distributed.initialize = lambda **how: (print('joining', flush=True), real(**how));"
        " stopping.Stop().__enter__(); cluster.join()"
    )
    named = NAMED | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | named | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "joining\n"
            time.sleep(1)
            process.send_signal(getattr(signal, number))
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 75
    assert f"{number}: stopped. Run the same command to go on." in said


@pytest.mark.parametrize("given", [None, "--xla_tpu_detect_nan=true"])
def test_libtpu_gets_more_threads_than_there_are_cores(joined, monkeypatch, given):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    if given:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    joined({})
    joined({})
    name = "fibers_default_domain_concurrency"
    ours = [f"--undefok={name}", f"--{name}=8"]
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [*ours, *([given] if given else [])]


def test_a_command_that_joins_nobody_gives_libtpu_its_threads_too(monkeypatch):
    """`transcribe` compiles for one device of this host, whoever else there is."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    cluster.devices()
    assert "--fibers_default_domain_concurrency=" in os.environ["LIBTPU_INIT_ARGS"]


@pytest.mark.parametrize("given", ["--fibers_default_domain_concurrency=3", "--undefok=a --a=1"])
def test_what_the_user_asks_of_libtpu_stays(joined, monkeypatch, given):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    joined({})
    assert os.environ["LIBTPU_INIT_ARGS"] == given
