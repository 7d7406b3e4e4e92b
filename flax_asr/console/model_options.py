"""The options of the configuration that the commands for a finished model take.

Each changes what the command does: what would change nothing is refused, not passed over.
"""

from collections.abc import Sequence

from flax_asr import config, errors

_OF_BOTH = ("train.per_device_eval_batch_size", "train.mixed_precision")
_OF_EVALUATE = ("seed", "data.", "text.normalization")
_OF_TRAINING = (
    "data.train_splits",
    "data.eval_splits",
    "data.max_train_clips",
    "data.cache_features",
    "data.augment.",
)


def takes(command: str, name: str) -> bool:
    """Whether `evaluate` or `transcribe` takes the option of this name."""
    of_data = name.startswith(_OF_EVALUATE) and not name.startswith(_OF_TRAINING)
    return name in _OF_BOTH or (of_data and command == "evaluate")


def check(command: str, words: Sequence[str]) -> None:
    """Refuses options that change nothing in `evaluate` or `transcribe`.

    Args:
        command: which of the two.
        words: `--section.key value`, as on a command line.

    Raises:
        ConfigError: names all of them.
    """
    known = config.option_types()
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    idle = [name for name in names if name in known and not takes(command, name)]
    if idle:
        named = " and ".join(f"--{name}" for name in idle)
        few = len(idle) == 1
        hint = ""
        if command == "evaluate" and any(name.endswith("_splits") for name in idle):
            hint = " What is scored are the splits of data.test_splits."
        raise errors.ConfigError(
            f"{named} {'changes' if few else 'change'} nothing in `{command}`: leave"
            f" {'it' if few else 'them'} out.{hint} `flax-asr {command} --help` lists what does."
        )
