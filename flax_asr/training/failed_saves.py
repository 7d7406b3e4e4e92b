"""`train.on_save_error`: a failed write stops the run, or is counted and tried again."""

import contextlib
import logging
from collections.abc import Iterator

from flax_asr import errors

logger = logging.getLogger(__name__)


class FailedSaves:
    """Counts the failed writes of a run, or lets the first one stop it.

    Args:
        policy: `stop` or `continue`.
        count: number of failed writes in earlier starts of the run.

    Attributes:
        count: number of failed writes so far.
    """

    def __init__(self, policy: str, count: int):
        self._stops, self.count = policy == "stop", count

    @contextlib.contextmanager
    def counted(self, step: int, must: bool = False) -> Iterator[None]:
        """A context in which a failed write stops the run or is counted.

        Args:
            step: number of updates done.
            must: whether a failure stops the run with either policy.
        """
        try:
            yield
        except (errors.CheckpointError, errors.StoreError) as error:
            if must or self._stops:
                raise
            self.count += 1
            logger.warning(
                "warning: step %d: %s train.on_save_error is continue: the run goes on, and tries"
                " again at the next save.",
                step,
                error,
            )
