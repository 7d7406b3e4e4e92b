"""Damaged checkpoints: is every damage noticed, and is the newest good step used?

    python benchmarks/damage.py [--cases 200] [--orbax] [--json FILE]

Three small checkpoints, as a run leaves them. In each case one or two of the newest are damaged: in
one of their files a bit is flipped (any bit of all is as likely; or any file), or the file is cut,
made longer, emptied or removed. Then the run is asked for its newest sound step, which must be the
newest that was not damaged, and the damaged file must be named. With --orbax, where the damage is
in orbax's files: does orbax alone, asked to restore that step, give wrong values without an error?
"""

import argparse
import collections
import dataclasses
import json
import logging
import pathlib
import shutil
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import small_saved

from flax_asr import checkpoint, config, experiment, inventory, optim, parallel, seals

STEPS = (2, 4, 6)
KINDS = ("flipped bit", "flip by file", "cut", "longer", "empty", "missing")
ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError)


def make_run(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Checkpoints of random states."""
    saved = small_saved.saved()
    cfg = config.build(saved.meta.run)
    optimiser = optim.adamw(cfg.optim, lambda count: 1e-3)
    fresh = experiment.fresh_state(cfg, saved.model_config, saved.params, optimiser)
    folder.mkdir()
    writer = checkpoint.Checkpoints(folder, keep=len(STEPS))
    for step in STEPS:
        state = jax.tree.map(
            lambda leaf: (rng.standard_normal(np.shape(leaf)) * 100).astype(np.asarray(leaf).dtype),
            fresh,
        )
        meta = dataclasses.replace(saved.meta, step=step)
        writer.save(parallel.Devices().replicate(state), meta)
    writer.close()


def damage(path: pathlib.Path, kind: str, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
        return
    if kind.startswith("flip"):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        content = bytes(changed)
    elif kind == "cut":
        content = content[: rng.integers(len(content))]
    elif kind == "longer":
        content += bytes(rng.integers(1, 100))
    else:
        content = b""
    path.write_bytes(content)


def values(folder: pathlib.Path) -> list[bytes]:
    """What orbax restores from a step's folder, as bytes."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((folder / inventory.STATE).absolute())
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def silently_wrong(folder: pathlib.Path, saved: list[bytes]) -> bool:
    try:
        return values(folder) != saved
    except ORBAX_ERRORS:
        return False


class Named(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--orbax", action="store_true", help="also ask orbax alone (slow)")
    parser.add_argument("--json", metavar="FILE", help="also write one object a case there")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    named = Named()
    logging.getLogger("flax_asr").addHandler(named)
    logging.getLogger("flax_asr").propagate = False
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="flax-asr-damage-"))
    whole = scratch / "whole"
    make_run(whole, rng)
    saved = {step: values(whole / inventory.FOLDER / str(step)) for step in STEPS}

    rows = []
    while len(rows) < arguments.cases:
        run = pathlib.Path(shutil.copytree(whole, scratch / "run"))
        kind = KINDS[len(rows) % len(KINDS)]
        hit = sorted(STEPS, reverse=True)[: rng.integers(1, len(STEPS))]
        files = {}
        for step in hit:
            folder = run / inventory.FOLDER / str(step)
            # Orbax's marker that it has committed is empty: it can only be missing.
            there = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            there = [p for p in there if kind == "missing" or p.stat().st_size > 0]
            sizes = np.array([path.stat().st_size for path in there], float)
            likely = sizes / sizes.sum() if kind == "flipped bit" else None
            files[step] = there[rng.choice(len(there), p=likely)]
            damage(files[step], kind, rng)
        in_arrays = inventory.STATE in files[hit[0]].parts
        named.text = ""
        used = inventory.newest_sound(run)
        # Damage to a seal can show in a file that it then speaks wrongly of.
        told = all(
            str(path) in named.text
            or (path.name == seals.FILE and f"step {step} is not used" in named.text)
            for step, path in files.items()
        )
        rows.append(
            {
                "kind": kind,
                "files": [str(path.relative_to(run)) for path in files.values()],
                "noticed": told,
                "newest_good_used": used == max(set(STEPS) - set(hit)),
                "orbax_alone_wrong": silently_wrong(
                    run / inventory.FOLDER / str(hit[0]), saved[hit[0]]
                )
                if in_arrays and arguments.orbax
                else None,
            }
        )
        shutil.rmtree(run)

    print("damage        cases  noticed  newest good used  wrong values from orbax alone")
    for kind in (*KINDS, "all"):
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        alone = collections.Counter(row["orbax_alone_wrong"] for row in of_kind)
        noticed = sum(row["noticed"] for row in of_kind)
        used = sum(row["newest_good_used"] for row in of_kind)
        print(
            f"{kind:<13} {len(of_kind):>5}  {noticed:>7}  {used:>16}"
            f"  {alone[True]} of {alone[True] + alone[False]}"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    shutil.rmtree(scratch)
    return 0 if all(row["noticed"] and row["newest_good_used"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
