"""Time and memory of the CTC loss and its gradient, against optax and torch, on one core.

    python benchmarks/ctc.py [--runs 30] [--json FILE]

Prints a table: medians of processor time over runs that take turns, ratios of these medians, and
the temporary memory that the compiler reports (torch reports none). 8 clips of 499 frames, 40
labels each.
"""

import argparse
import functools
import os
import time

# Before any of the libraries starts its threads.
CORE = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import sidebyside  # noqa: E402
import torch  # noqa: E402

from flax_asr import ctc  # noqa: E402

BATCH, FRAMES, TOKENS = 8, 499, 40
VOCABULARIES = (32, 4000, 9000)
MEMORY_UNIT = BATCH * FRAMES * (TOKENS + 1) * 4  # bytes of one float32 a frame and needed column


def ours(logits, labels):
    logit_lengths = jnp.full(BATCH, FRAMES, jnp.int32)
    label_lengths = jnp.full(BATCH, TOKENS, jnp.int32)
    return ctc.ctc_loss(logits, logit_lengths, labels, label_lengths).sum()


def of_optax(logits, labels):
    return optax.ctc_loss(
        logits, jnp.zeros((BATCH, FRAMES)), labels, jnp.zeros((BATCH, TOKENS))
    ).sum()


def torch_run(logits, labels):
    logits.grad = None
    log_probs = logits.log_softmax(-1).transpose(0, 1)
    lengths = torch.full((BATCH,), FRAMES), torch.full((BATCH,), TOKENS)
    torch.nn.functional.ctc_loss(log_probs, labels, *lengths, reduction="sum").backward()


def jax_run(loss, logits, labels):
    """A function of nothing that runs loss and gradient once, and its temporary bytes."""
    arrays = jnp.asarray(logits), jnp.asarray(labels)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(*arrays)), temporary


def measure(vocab: int, runs: int) -> dict:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((BATCH, FRAMES, vocab), np.float32)
    labels = rng.integers(1, vocab, (BATCH, TOKENS), dtype=np.int32)
    our_run, our_bytes = jax_run(ours, logits, labels)
    optax_run, optax_bytes = jax_run(of_optax, logits, labels)
    candidates = {
        "ours": our_run,
        "optax": optax_run,
        "torch": functools.partial(
            torch_run,
            torch.tensor(logits, requires_grad=True),
            torch.tensor(labels, dtype=torch.int64),
        ),
    }
    median = sidebyside.medians(candidates, runs, clock=time.process_time)
    return {
        "vocab": vocab,
        **{f"{name}_seconds": round(value, 6) for name, value in median.items()},
        "of_optax": round(median["ours"] / median["optax"], 3),
        "of_torch": round(median["ours"] / median["torch"], 3),
        "ours_temporary_bytes": our_bytes,
        "optax_temporary_bytes": optax_bytes,
        "ours_memory_units": round(our_bytes / MEMORY_UNIT, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", metavar="FILE", help="also write one object a vocabulary there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(f"{BATCH} x {FRAMES} frames, {TOKENS} labels, float32, loss + gradient, core {CORE}")
    print(f"jax {jax.__version__}, optax {optax.__version__}, torch {torch.__version__}")
    print("symbols  ours ms  optax ms  torch ms  /optax  /torch  ours MiB  optax MiB  units")
    results = []
    for vocab in VOCABULARIES:
        row = measure(vocab, arguments.runs)
        results.append(row)
        print(
            f"{vocab:7d} {1e3 * row['ours_seconds']:8.2f} {1e3 * row['optax_seconds']:9.2f} "
            f"{1e3 * row['torch_seconds']:9.2f} {row['of_optax']:7.3f} {row['of_torch']:7.3f} "
            f"{row['ours_temporary_bytes'] / 2**20:9.1f} "
            f"{row['optax_temporary_bytes'] / 2**20:10.1f} {row['ours_memory_units']:6.2f}",
            flush=True,
        )
    print(f"units: temporary memory in B*T*(N+1)*4 = {MEMORY_UNIT} bytes; goal at most 10")
    sidebyside.write_json(arguments.json, results)


if __name__ == "__main__":
    main()
