"""Every script in benchmarks/ runs to its end on tiny work and writes its figures."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
TINY = {
    "cpu_step": "--small --layers 1 --runs 1 --cores 1",
    "ctc": "--runs 1",
    "full_size": "--small",
    "gpu": "--small --updates 1 --rounds 1 --rows 2",
    "kill": "--kills 1",
    "loader": "--runs 1",
    "padding": "",
    "preparation": "--clips 4 --runs 1",
    "scaling": "--runs 1 --points 1 --hours 1",
    "startup": "--runs 1 --updates 2",
    "tpu_plan": "--layers 1 --rows 1 --seconds 2",
}
SHARED = {"sidebyside", "torch_step", "train_step"}


def test_every_script_is_tried_and_named_in_the_results():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == TINY.keys() | SHARED
    results = (REPOSITORY / "RESULTS.md").read_text(encoding="utf-8")
    assert [name for name in TINY if f"benchmarks/{name}.py" not in results] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_script_runs_and_writes_its_figures(name, tmp_path):
    if name == "tpu_plan":
        pytest.importorskip("libtpu")
    figures = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / f"{name}.py", *TINY[name].split(), "--json", figures]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in figures.read_text().splitlines()]
    assert rows
    assert all(isinstance(row, dict) for row in rows)
