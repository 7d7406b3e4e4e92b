"""Gradient accumulation: runs the micro-batches of an update and applies their sum."""

from collections.abc import Sequence

from flax_asr import assembly, step
from flax_asr.data import loader


class Accumulation:
    """Runs the updates of a run on its devices.

    Args:
        made: the run.
        programs: its compiled programs.
        begin: the index of the first update, from 0.
        trainable: the parameters that get a gradient.
    """

    def __init__(
        self,
        made: assembly.Assembly,
        programs: assembly.Programs,
        begin: int,
        trainable: step.Parameters,
    ):
        self._made, self._programs = made, programs
        self._per_device = made.cfg.train.per_device_train_batch_size
        at_once = made.train_function(begin) == "update_from"
        # A program that does a whole update needs no sums outside it.
        self._sums = None if at_once else made.devices.zero_sums(trainable)

    def update(
        self, number: int, state: step.TrainState, groups: Sequence[loader.Planned]
    ) -> tuple[step.TrainState, step.Metrics]:
        """Dispatches an update; returns the state and the metrics, before they are computed.

        Args:
            number: the index of the update, from 0.
            state: the state before the update; its arrays are donated.
            groups: for each group, this host's rows of it and the group.
        """
        function, shapes = self._made.train_function(number), self._made.plan.shapes
        for batch, group in groups:
            program = self._programs[function, shapes[group.shape]]
            for micro in self._made.devices.micro_batches(batch, self._per_device):
                if self._sums is None:
                    state, metrics = program(state, micro)
                else:
                    self._sums = program(state, self._sums, micro)
        if self._sums is not None:
            state, self._sums, metrics = self._programs["update", 0](state, self._sums)
        return state, metrics
