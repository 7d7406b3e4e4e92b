"""Tests run offline, on the CPU, with two fake devices and every float32 product exact."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
).strip()
# PyTorch's threads wait for each other in loops: on small tensors most of the time is theirs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fcntl
import pathlib

import jax
import pytest
import signatures  # noqa: F401 (before anything that imports the package)
import small_training


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What one module or worker has compiled, the others read: small programs recur in most."""
    small_training.share_compiled(str(shared(tmp_path_factory) / "compiled"))


def shared(tmp_path_factory):
    """The same folder for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_module():
    """Compiled programs of all modules together would fill gigabytes in each test process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose models are tiny: XLA's optimisations cost more than they save there.

    The end-to-end tests have them on.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def done(monkeypatch):
    """What is brought to the disk and what gets another name, in order.

    A machine that is taken away takes what the system has not yet written.
    """
    done = []

    def naming(name):
        original = getattr(pathlib.Path, name)

        def renamed(path, target):
            done.append(f"{path.name} -> {target.name}")
            return original(path, target)

        monkeypatch.setattr(pathlib.Path, name, renamed)

    def synced(file):
        done.append(pathlib.Path(os.readlink(f"/proc/self/fd/{file}")).name)

    naming("rename")
    naming("replace")
    monkeypatch.setattr(os, "fsync", synced)
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same one for all workers of pytest-xdist, with an uninterrupted run in it."""
    folder = shared(tmp_path_factory)
    place = small_training.Place(folder / "place")
    place.folder.mkdir(exist_ok=True)
    with open(folder / "place.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place.folder / "whole").exists():
            small_training.corpus(place.folder)
            output = place.finish(place.folder / "whole", in_pytorch=True)
            assert "logits in PyTorch differ by at most" in output
    return place


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run; not to be changed."""
    return place.folder / "whole"


@pytest.fixture(scope="module")
def emulator():
    """The environment of processes that see an emulated bucket."""
    import small_bucket

    with small_bucket.running() as environment:
        yield environment


@pytest.fixture
def url(emulator, monkeypatch, tmp_path):
    """A place in that bucket where nothing is yet; this process sees it, and waits little."""
    import small_bucket

    small_bucket.hasten(monkeypatch.setattr)
    for name, value in emulator.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"gs://{small_bucket.NAME}/{tmp_path.name}/run"
