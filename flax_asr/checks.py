"""Checks of option values; each raises a `ConfigError` that names the option."""

from collections.abc import Mapping, Sequence

from flax_asr import errors


def utf8(places: Mapping[str, str | None]) -> None:
    """Raises `ConfigError` if a path is not UTF-8: config.yaml and the log could not contain it."""
    for name, place in places.items():
        if place is not None and any("\ud800" <= character <= "\udfff" for character in place):
            raise errors.ConfigError(
                f"{name} is {place!a}: a name that is not UTF-8; rename it, or make a link to it."
            )


def at_least(name: str, value: float | None, least: float) -> None:
    """Raises `ConfigError` if an option is below its bound; None is accepted."""
    if value is not None and value < least:
        raise errors.ConfigError(f"{name} is {value}: it must be at least {least}.")


def above(name: str, value: float | None, bound: float) -> None:
    """Raises `ConfigError` if an option is not above its bound; None is accepted."""
    if value is not None and value <= bound:
        raise errors.ConfigError(f"{name} is {value}: it must be larger than {bound}.")


def below(name: str, value: float, bound: float) -> None:
    """Raises `ConfigError` if an option is not below its bound."""
    if value >= bound:
        raise errors.ConfigError(f"{name} is {value}: it must be less than {bound}.")


def inside(name: str, bounds: tuple[float, float] | None, least: float, most: float) -> None:
    """Raises `ConfigError` if a range is not ascending or exceeds its bounds; None is accepted."""
    if bounds is not None and not least <= bounds[0] <= bounds[1] <= most:
        raise errors.ConfigError(
            f"{name} is {list(bounds)}: it must be [low, high], in {least:g} to {most:g}."
        )


def splits(name: str, names: Sequence[str]) -> None:
    """Raises `ConfigError` if a split is named twice, or cannot be the name of a folder.

    Its prepared data and, with a suffix, its predictions have its name.
    """
    if len(set(names)) < len(names):
        raise errors.ConfigError(f"{name} is {list(names)}: name every split once.")
    for split in names:
        if not split or split in (".", "..") or "/" in split or "\0" in split:
            raise errors.ConfigError(
                f"{name}: {split!r} cannot be the name of a folder: rename the split in the table."
            )
