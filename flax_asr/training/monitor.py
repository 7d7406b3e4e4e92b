"""The metrics of updates, for log and progress bar; too many non-finite ones stop the run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flax_asr import assembly, step
from flax_asr.data import loader
from flax_asr.record import learning, window


class Monitor:
    """Collects the metrics of every update of a run.

    Args:
        made: the run.
        history: the events in its log so far.

    Attributes:
        window: the metrics since the last line of the log.
        watch: judges whether the model learns.
    """

    def __init__(self, made: assembly.Assembly, history: Sequence[Mapping[str, Any]]):
        self._plan, self._ids = made.plan, made.corpus.train.ids
        self._max_bad_updates = made.cfg.train.max_bad_updates
        self.watch = learning.Watch(made.expected, made.fresh_head, made.updates, history)
        self.window = window.Window(
            {} if made.past is None else made.past.window,
            made.semantics.hides_bad_losses,
            made.semantics.logs_next_rate,
        )

    def count(
        self, number: int, figures: step.Metrics, planned: Sequence[loader.Planned]
    ) -> dict[str, str]:
        """Adds update `number` to the window; returns what the progress bar shows.

        Raises:
            TrainingError: too many updates in a row were not finite.
        """
        metrics = jax.device_get(figures)
        groups = [group for _, group in planned]
        if metrics.bad_in_a_row >= self._max_bad_updates:
            ids = [self._ids[row] for group in groups for row in group.rows if row >= 0]
            raise self.window.too_many_bad(number, int(metrics.bad_in_a_row), ids)
        self.window.add(number, metrics, groups, self._plan.lengths, self._plan.shapes)
        return self.window.facts() | self.watch.facts()

    def line(self, number: int, waited_seconds: float) -> dict[str, Any]:
        """The log's line about the updates since its last line; starts a new window.

        Args:
            number: number of updates done.
            waited_seconds: time that the run has waited for data since this start.
        """
        figures = self.window.close(waited_seconds)
        return figures | self.watch.look(number, figures)
