"""Hosts that are asked to stop do so at the same point, however far one is ahead of the other."""

import numpy as np
import pytest

from flax_asr.hosts import multihost, stopping


class Service:
    """What was said, as in JAX's coordination service: once under each name."""

    def __init__(self):
        self._said = {}

    def key_value_set(self, name, value):
        if name in self._said:
            raise RuntimeError("ALREADY_EXISTS")
        self._said[name] = value

    def key_value_dir_get(self, begin):
        return [pair for pair in self._said.items() if pair[0].startswith(begin)]


class Host:
    """Passes points and looks after each whether to stop there."""

    def __init__(self):
        hosts = multihost.Hosts()
        hosts.count = 2
        self.signals = stopping.Stop()
        self._shared = multihost.SharedStop(hosts, self.signals)
        self.point, self.is_over, self._has_passed = 0, False, False

    def goes_on(self, other: "Host") -> None:
        if not self._has_passed:
            self._shared.passed()
            self.point += 1
            self._has_passed = True
        elif other.point >= self.point - 1:  # else it waits for the other's part of a result
            self.is_over, self._has_passed = self._shared.asked, False


@pytest.mark.parametrize("both", [False, True])
def test_both_hosts_stop_at_the_same_point(both, monkeypatch):
    stopped_at = set()
    for seed in range(300):
        service = Service()
        monkeypatch.setattr(multihost, "_service", lambda service=service: service)
        turns = np.random.default_rng(seed)
        hosts = Host(), Host()
        comes = turns.integers(0, 20, size=2)
        for turn in range(200):
            for host, signal_comes in zip(hosts[: 1 + both], comes, strict=False):
                host.signals.asked |= bool(turn >= signal_comes)
            acting = turns.integers(2)
            if not hosts[acting].is_over:
                hosts[acting].goes_on(hosts[1 - acting])
        assert all(host.is_over for host in hosts), seed
        assert hosts[0].point == hosts[1].point, seed
        stopped_at.add(hosts[0].point)
    assert len(stopped_at) > 5
