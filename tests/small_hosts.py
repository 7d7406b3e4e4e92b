"""Two hosts of one run, as processes of this machine with one device each."""

import pathlib
import socket
import time

import small_training

SECONDS = 900
"""After so long a test has failed, and its processes are killed; they need a tenth of it."""


class Pair:
    """The same command on two hosts, which see each other at a port of their own.

    Args:
        place: where the corpus and the compiled programs are.
        arguments: of the command line, one list for each host.
        lost_seconds: when a host counts as lost.
        environments: further variables of each host.
    """

    def __init__(
        self, place, arguments, output: pathlib.Path, lost_seconds: float = 120, environments=None
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.hosts = [
            small_training.Process(
                words,
                output.with_name(f"{output.name}-{index}.txt"),
                place.cache,
                devices=1,
                environment={
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(len(arguments)),
                    "JAX_PROCESS_ID": str(index),
                }
                | (environments[index] if environments else {}),
                lost_seconds=lost_seconds,
            )
            for index, words in enumerate(arguments)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for host in self.hosts:
            host.kill()

    def end(self, seconds: float = SECONDS) -> list[int]:
        """The exit status of each; none may hang."""
        limit = time.monotonic() + seconds
        while any(host.alive for host in self.hosts) and time.monotonic() < limit:
            time.sleep(0.02)
        assert not any(host.alive for host in self.hosts), self.output
        return [host.end(0) for host in self.hosts]

    @property
    def output(self) -> str:
        return "".join(f"\n--- host {i} ---\n{h.output}" for i, h in enumerate(self.hosts))


def finish(pair) -> str:
    with pair:
        assert pair.end() == [0, 0], pair.output
        return pair.output
