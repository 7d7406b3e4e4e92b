"""Every script in benchmarks/ runs to its end on tiny work and writes its figures."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
TINY = {
    "augment": "--clips 4",
    "cpu_step": "--small --layers 1 --runs 1 --cores 1",
    "ctc": "--runs 1",
    "damage": "--cases 4",
    "doctor": "--clips 60",
    "full_size": "--small --trainable-layers 1 --cached",
    "fuzz_audio": "--files 20 --tables 4",
    "gpu": "--small --updates 1 --rounds 1 --rows 2",
    "kill": "--kills 1",
    "learning": "--updates 4",
    "loader": "--runs 1",
    "padding": "",
    "precision": "--seeds 1 --steps 2",
    "preparation": "--clips 4 --runs 1",
    "resume": "--steps 2 4 --runs 1",
    "same_run": "--updates 1",
    "scaling": "--runs 1 --points 1 --hours 1",
    "startup": "--runs 1 --updates 2",
    "tpu_plan": "--layers 1 --rows 1 --seconds 2",
    "warm_up": "--layers 1 --shapes 1",
}
SHARED = {"sidebyside", "torch_step", "train_step"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({p.stem for p in BENCHMARKS.glob("*.py")} - SHARED))
def test_a_script_runs_and_writes_its_figures(name, tmp_path):
    if name in ("tpu_plan", "warm_up"):
        pytest.importorskip("libtpu")
    figures = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / f"{name}.py", *TINY[name].split(), "--json", figures]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in figures.read_text().splitlines()]
    assert rows
    assert all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize(
    ("room", "most", "rows"),
    [(200, 512, 128), (512, 512, 512), (9, 512, 8), (1, 512, 1), (3, 4, 2)],
)
def test_the_largest_batch_for_a_gpu_is_looked_for_upwards_and_downwards(
    room, most, rows, monkeypatch
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    tried = []

    class Side:
        name = "ours"

        def try_out(self, rows):
            tried.append(rows)
            if rows > room:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    assert gpu.largest(Side(), most) == rows
    assert len(tried) == len(set(tried)) <= 6
    room = 0
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        gpu.largest(Side(), most)
