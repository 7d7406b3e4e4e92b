"""Joining the other hosts of a run: one process on each, with the same command."""

import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import jax

from flax_asr import errors
from flax_asr.console import progress
from flax_asr.hosts import stopping

JOINING_SECONDS = 300
"""How long a host waits for the last one to start."""

LOST_SECONDS = 100
"""If a host is silent for so long, JAX itself ends the others."""

# Values of JAX_PLATFORMS, and the platform of such a device.
_PLATFORMS = {"cuda": "gpu", "rocm": "gpu", "gpu": "gpu", "tpu": "tpu"}

_LIBTPU_ARGUMENTS, _THREADS = "LIBTPU_INIT_ARGS", "fibers_default_domain_concurrency"

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins the other hosts, if there are any; call it before asking JAX for its devices.

    The hosts are given by `JAX_COORDINATOR_ADDRESS` (HOST:PORT of the first host),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Otherwise JAX checks for a TPU pod, a job of Slurm or
    Open MPI with several tasks, or an indexed job of Kubernetes. If it finds none, nothing happens.

    Raises:
        ConfigError: the variables are incomplete, the address cannot be used, or there is no
            device.
    """
    spare_threads_for_libtpu()  # joining may load libtpu
    _join()
    devices()


def spare_threads_for_libtpu() -> None:
    """Gives the TPU compiler more threads than cores; call it before libtpu is loaded.

    By default it has one thread for each core, and a thread that meets a Pallas kernel waits until
    the rest of the queue is compiled: with two cores, one of them is idle. The user's own
    arguments for libtpu are kept.
    """
    given = os.environ.get(_LIBTPU_ARGUMENTS, "")
    if _THREADS in given or "undefok" in given:
        return
    count = 2 * (os.cpu_count() or 1) + 4
    # A libtpu without this flag would end the process, if not for --undefok.
    os.environ[_LIBTPU_ARGUMENTS] = f"--undefok={_THREADS} --{_THREADS}={count} {given}".strip()


def devices() -> list[jax.Device]:
    """The devices of all hosts; the first call loads libtpu if there is a TPU.

    Raises:
        ConfigError: there is no device of the kind asked for, or it is in use.
    """
    spare_threads_for_libtpu()
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        found = jax.devices()
    # JAX fails an assertion if only CUDA is asked for and there is no such device.
    except (RuntimeError, AssertionError) as error:
        raise _no_device(asked, str(error)) from error
    first = (asked or "").split(",")[0]
    # If a GPU is asked for and other devices are allowed too, JAX silently uses those.
    if first in _PLATFORMS and found[0].platform != _PLATFORMS[first]:
        raise _no_device(asked, "")
    return found


def _no_device(asked: str | None, why: str) -> errors.ConfigError:
    first_line = why.strip().splitlines()[:1] or [f"it finds no {asked} on this machine"]
    return errors.ConfigError(
        f"JAX cannot use its devices: {first_line[0].rstrip('.')}. (JAX_PLATFORMS is"
        f" {asked or 'not set'}; check which processes use the device, and which jax is installed.)"
    )


def _join() -> None:
    if jax.distributed.is_initialized():
        return
    named = _named()
    if not named and not _may_have_others():
        return
    # JAX's own time-out is an abort with a page of addresses.
    patience = threading.Timer(JOINING_SECONDS, _give_up)
    patience.daemon = True
    patience.start()
    # JAX's handler of SIGTERM and ours would overwrite each other, and ours handles SIGINT too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        _in_a_thread(
            functools.partial(
                jax.distributed.initialize,
                **named,
                local_device_ids=_all_gpus_of_a_node(),
                initialization_timeout=2 * JOINING_SECONDS,
                heartbeat_timeout_seconds=LOST_SECONDS,
            )
        )
    except ValueError:
        if named:
            raise
        return  # JAX has found no others.
    except RuntimeError as error:
        raise errors.ConfigError(
            f"this host cannot join the others: {str(error).splitlines()[0]}"
        ) from error
    finally:
        patience.cancel()
    if jax.process_index() > 0:
        # The first host reports for all.
        logging.getLogger("flax_asr").setLevel(logging.WARNING)
        progress.hide()


def _in_a_thread(wait: Callable[[], None]) -> None:
    """Calls a function that blocks outside Python, while the main thread handles signals."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            wait()
        except BaseException as error:  # raised again in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _give_up() -> None:
    stopping.say(
        f"not all hosts have joined within {JOINING_SECONDS} seconds: start the same command on all"
        " of them; the first one (process 0) must be reachable from the others."
    )
    os._exit(stopping.STATUS)


def _named() -> dict[str, Any]:
    """The environment's variables as arguments of `jax.distributed.initialize`."""
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not found:
        return {}
    missing = [name for name in _VARIABLES if name not in found]
    if missing:
        raise errors.ConfigError(
            f"{' and '.join(found)} without {' and '.join(missing)}: set all three, or none."
        )
    address, count, index = found.values()
    if not address.rpartition(":")[2].isdecimal():
        raise errors.ConfigError(f"JAX_COORDINATOR_ADDRESS {address!r} is not HOST:PORT.")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise errors.ConfigError(
            f"JAX_PROCESS_ID {index!r} is not a number from 0 to one below JAX_NUM_PROCESSES"
            f" {count!r}."
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def _may_have_others() -> bool:
    """Whether JAX should look for other hosts: not for a single task or a pod without a job."""
    for tasks in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if tasks in os.environ:
            return int(os.environ[tasks]) > 1
    in_a_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    return in_a_job or _on_a_tpu_vm()


def _on_a_tpu_vm() -> bool:
    # Private: true if JAX has found chips and their library.
    return jax._src.cloud_tpu_init.running_in_cloud_tpu_vm


def _all_gpus_of_a_node() -> list[int] | None:
    """All GPUs, for Slurm's only task on its node: JAX would give it only the first one."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_NNODES")
    return list(range(int(gpus))) if alone and gpus.isdecimal() else None
