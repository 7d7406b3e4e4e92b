"""The options of the configuration for `--help`, from the docstrings of its sections."""

import inspect
from collections.abc import Callable

from flax_asr import config, options


def listing(shows: Callable[[str], bool] = lambda name: True, *notes: str) -> str:
    """One line for every option that is shown: its name, meaning, choices and default.

    Args:
        shows: whether the option of a name is shown.
        notes: lines about all options, before the first.
    """
    lines = ["options of the configuration, each as --section.key VALUE:", *notes]
    defaults, kinds = config.flat(config.Config()), config.option_types()
    for section, kind in {"": config.Config, **options.sections(config.Config)}.items():
        documented = inspect.getdoc(kind).partition("Attributes:")[2].replace("\n        ", " ")
        for line in filter(None, map(str.strip, documented.splitlines())):
            key, _, meaning = line.partition(": ")
            name = f"{section}.{key}" if section else key
            if shows(name):
                choices = ", ".join(options.choices(kinds[name]))
                meaning = f"{meaning} One of {choices}." if choices else meaning
                lines.append(f"  --{name}  {meaning} (default {options.spelt(defaults[name])})")
    return "\n".join(lines)
