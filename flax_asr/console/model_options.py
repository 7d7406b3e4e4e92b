"""Options of the configuration that `evaluate` and `transcribe` take."""

import logging
from collections.abc import Sequence

from flax_asr import config, errors

logger = logging.getLogger(__name__)

_OF_BOTH = ("train.per_device_eval_batch_size", "train.mixed_precision")
_OF_DATA = ("seed", "data.", "text.normalization")
_OF_TRAINING = (
    "data.train_splits",
    "data.eval_splits",
    "data.max_train_clips",
    "data.cache_features",
)


def takes(command: str, name: str) -> bool:
    """Whether an option has an effect in `evaluate` or `transcribe`."""
    of_data = _may_stand(name) and not name.startswith(_OF_TRAINING)
    return name in _OF_BOTH or (of_data and command == "evaluate")


def _may_stand(name: str) -> bool:
    """Whether both commands accept the option, so that one set of options serves both."""
    of_data = name.startswith(_OF_DATA) and not name.startswith("data.augment.")
    return name in _OF_BOTH or of_data


def check(command: str, words: Sequence[str]) -> None:
    """Checks for options that have no effect in `evaluate` or `transcribe`.

    Warns of options of data and text that have an effect in the other command only.

    Args:
        command: "evaluate" or "transcribe".
        words: `--section.key value`, as on a command line.

    Raises:
        ConfigError: options have no meaning for a finished model; names all of them.
    """
    known = config.option_types()
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    idle = [name for name in names if name in known and not takes(command, name)]
    refused = [name for name in idle if not _may_stand(name)]
    if refused:
        raise errors.ConfigError(
            f"{_change_nothing(refused, command)}: leave {'it' if len(refused) == 1 else 'them'}"
            f" out. `flax-asr {command} --help` lists what does."
        )
    if idle:
        hint = ""
        if command == "evaluate" and any(name.endswith("_splits") for name in idle):
            hint = " What is scored are the splits of data.test_splits."
        logger.warning("warning: %s.%s", _change_nothing(idle, command), hint)


def _change_nothing(names: Sequence[str], command: str) -> str:
    named = " and ".join(f"--{name}" for name in names)
    return f"{named} {'changes' if len(names) == 1 else 'change'} nothing in `{command}`"
