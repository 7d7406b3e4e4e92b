"""Scoring within a run: eval splits while it trains, test splits at the end."""

from typing import Any

from flax_asr import assembly, comparison, evaluate, parallel, scoring, step
from flax_asr.data import buckets
from flax_asr.hosts import multihost


class BrokenOff(Exception):
    """The process was asked to stop during an evaluation; the next start repeats it."""


def score(
    which: str,
    made: assembly.Assembly,
    programs: assembly.Programs,
    params: step.Parameters,
    stop: multihost.SharedStop,
) -> tuple[scoring.Scores, list[dict[str, Any]]]:
    """The `eval` or `test` scores of these parameters, and the predictions they come from.

    Args:
        which: `eval` or `test`.
        made: the run.
        programs: its compiled programs.
        params: the parameters to score, placed on its devices.
        stop: checked before each batch.

    Raises:
        BrokenOff: the process was asked to stop.
    """
    data, shapes = made.corpus.scored()[which], made.eval_shapes
    padded = made.semantics.padded_scores
    per_device = made.cfg.train.per_device_eval_batch_size
    forward = parallel.forward(programs, params, made.devices, per_device)
    plan, predictions = buckets.InOrder if padded else buckets.EvalPlan, []

    def unless_asked(batch):
        if stop.asked:
            raise BrokenOff
        scored = forward(batch)
        stop.passed()
        return scored

    scores = evaluate.score(
        unless_asked,
        data,
        plan(data.samples, shapes.samples, made.devices.count * per_device),
        comparison.Comparison(
            made.corpus.vocabulary, made.cfg.data.language, made.corpus.normalizer.spec
        ),
        seed=made.cfg.seed,
        tokens=shapes.tokens,
        predictions=predictions,
        padded=padded,
    )
    return scores, predictions
