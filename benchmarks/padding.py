"""Share of real samples in padded batches, by number of shapes and by way of choosing them.

    python benchmarks/padding.py [--json FILE]

12 000 clips between 1 and 10.5 s with the mean of Common Voice zh-HK 25.0 (4.15 s), groups of 8.
No audio is read: lengths decide.
"""

import argparse

import numpy as np
import sidebyside

from flax_asr.data import buckets

CLIPS, GROUP_ROWS, GROUPS_PER_UPDATE = 12_000, 8, 4


def lengths() -> np.ndarray:
    seconds = np.random.default_rng(0).gamma(9.0, 4.15 / 9.0, CLIPS)
    return (np.clip(seconds, 1.0, 10.5) * 16_000).astype(np.int32)


def quantile_shapes(samples: np.ndarray, num_buckets: int) -> tuple[int, ...]:
    edges = np.quantile(samples, np.arange(1, num_buckets + 1) / num_buckets)
    block = buckets.smallest_samples(16)
    return tuple(
        sorted({buckets.smallest_samples(16 * -(-int(e - 80) // (block - 80))) for e in edges})
    )


def random_efficiency(samples: np.ndarray) -> float:
    """Random batches, each padded to its longest clip: as many shapes as batches."""
    groups = np.random.default_rng(1).permutation(samples).reshape(-1, GROUP_ROWS)
    return samples.sum() / (groups.max(axis=1).sum() * GROUP_ROWS)


def planned_efficiency(samples: np.ndarray, shapes: tuple[int, ...]) -> float:
    return 1 - buckets.TrainPlan(samples, shapes, GROUP_ROWS, GROUPS_PER_UPDATE, seed=0).padding


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write one object a row there")
    arguments = parser.parse_args()
    samples = lengths()
    rows = [{"way": "random", "shapes": None, "efficiency": random_efficiency(samples)}]
    for count in (1, 4, 8, 10, 12, 16, 24):
        exact = buckets.choose_shapes(samples, count)
        for way, shapes in (("quantiles", quantile_shapes(samples, count)), ("exact", exact)):
            efficiency = planned_efficiency(samples, shapes)
            rows.append({"way": way, "shapes": len(shapes), "efficiency": efficiency})
    print("edges      shapes  real samples")
    for row in rows:
        row["efficiency"] = round(float(row["efficiency"]), 4)
        print(f"{row['way']:10s} {row['shapes'] or 'any':>6}  {row['efficiency']:12.4f}")
    sidebyside.write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
