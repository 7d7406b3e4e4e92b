"""What does the log say of a run that learns, of one too timid and of one too bold?

    python benchmarks/learning.py [--updates 300] [--json FILE]

A tiny model learns a language of eight tones, which takes a healthy run a few hundred updates, at
five learning rates. Printed for each: the phases that the log names, with the update where each
began, the last training loss and the character error rate on the dev split.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

RATES = {"healthy": 3e-3, "too small": 1e-5, "small": 1e-4, "large": 0.03, "too large": 0.3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--json", metavar="FILE", help="also write one object a run there")
    arguments = parser.parse_args()

    # Decoding processes import this file again: not with all of this.
    import small_tones
    import small_training

    from flax_asr import __main__
    from flax_asr.record import runlog

    folder = pathlib.Path(tempfile.mkdtemp(prefix="flax-asr-learning-"))
    source = small_tones.corpus(folder)
    small_training.share_compiled(str(folder / "compiled"))
    small_training.without_torch()
    results = []
    for name, rate in RATES.items():
        run = folder / name.replace(" ", "-")
        more = {"optim__learning_rate": rate, "train__max_steps": arguments.updates}
        status = __main__.main(small_tones.command(source, run, **more))
        results.append(
            {"run": name, "learning_rate": rate, "status": status, **_seen(runlog.read(run))}
        )
    expected = runlog.read(folder / "healthy")[0]
    print(
        f"expected: first loss {expected['expected_first_loss']}, plateau"
        f" {expected['plateau_loss']}, unigram entropy {expected['unigram_entropy']}"
    )
    for result in results:
        phases = " > ".join(f"{phase} ({step})" for phase, step in result["phases"])
        print(
            f"{result['run']:<10} {result['learning_rate']:<8} {phases}; loss {result['loss']},"
            f" CER {result['cer']}"
        )
    if arguments.json:
        lines = [json.dumps(result, ensure_ascii=False) for result in results]
        pathlib.Path(arguments.json).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _seen(events: list[dict]) -> dict:
    told = [(event["phase"], event["step"]) for event in events if "phase" in event]
    groups = itertools.groupby(told, key=lambda pair: pair[0])
    losses = [event["loss"] for event in events if "loss" in event]
    rates = [round(event["eval_cer"], 3) for event in events if "eval_cer" in event]
    return {
        "phases": [(phase, next(steps)[1]) for phase, steps in groups],
        "loss": losses[-1] if losses else None,
        "cer": rates[-1] if rates else None,
    }


if __name__ == "__main__":
    sys.exit(main())
