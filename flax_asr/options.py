"""Parsing of options: `--section.key value`, typed values, and the nearest name for unknown ones.

The options are defined in config.py; here they are dotted names with types.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flax_asr import errors, trainer_names, yaml_file


def sections(cls: type, within: str = "") -> dict[str, type]:
    """Sections by their dotted names, nested ones after their parents."""
    found: dict[str, type] = {}
    for key, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            name = f"{within}.{key}" if within else key
            found |= {name: kind, **sections(kind, name)}
    return found


def kinds(cls: type) -> dict[str, Any]:
    """Every field of a dataclass and of its sections, as a dotted name, with its type."""
    found: dict[str, Any] = {}
    for section, part in {"": cls, **sections(cls)}.items():
        for key, kind in typing.get_type_hints(part).items():
            if not dataclasses.is_dataclass(kind):
                found[f"{section}.{key}" if section else key] = kind
    return found


def construct(cls: type, values: Mapping[str, Any], within: str = "") -> Any:
    """A section with its nested sections, from values by their dotted names."""
    given: dict[str, Any] = {}
    for key, kind in typing.get_type_hints(cls).items():
        name = f"{within}.{key}" if within else key
        if dataclasses.is_dataclass(kind):
            given[key] = construct(kind, values, name)
        elif name in values:
            given[key] = values[name]
    return cls(**given)


def flatten(
    values: Mapping[str, Any], kinds: Mapping[str, Any], where: str = "", section: str = ""
) -> dict[str, Any]:
    """Nested values by their dotted names; an empty section means its defaults.

    Args:
        values: sections of keys, as a file has them.
        kinds: every option's type by its dotted name.
        where: prefix of error messages.
        section: the dotted name of the section that holds the values.

    Raises:
        ConfigError: a key does not exist, or a section is not a mapping.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{section}.{key}" if section else str(key)
        if name in kinds:
            flat[name] = value
        elif not any(known.startswith(f"{name}.") for known in kinds):
            raise errors.ConfigError(where + unknown_name(name, kinds))
        elif isinstance(value, Mapping):
            flat |= flatten(value, kinds, where, name)
        elif value is not None:
            found = yaml_file.kind(value)
            raise errors.ConfigError(
                f"{where}{name} is a section: expected keys below it, found {found}."
            )
    return flat


def unknown_name(name: str, kinds: Mapping[str, Any]) -> str:
    """The message for an unknown option, with the nearest known name."""
    last = name.rpartition(".")[2].replace("-", "_")
    names = list(kinds)
    same = [known for known in names if known.rpartition(".")[2] == last]
    if same:
        return f"there is no option {name}: it is {' or '.join(same)}."
    if last in trainer_names.OURS:
        return f"there is no option {name}: here it is {trainer_names.OURS[last]}."
    lasts = {known.rpartition(".")[2]: known for known in names}
    near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)
    if near:
        return f"there is no option {name}: did you mean {lasts[near[0]]}?"
    return f"there is no option {name}. `flax-asr train --help` lists all."


def _is_inside_mapping(name: str, kinds: Mapping[str, Any]) -> bool:
    return kinds.get(name.rpartition(".")[0]) == dict[str, Any]


def parse(arguments: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """`--section.key value` or `--section.key=value` -> dotted names and YAML 1.2 values.

    Raises:
        ConfigError: an option does not exist, lacks its value or is given twice.
    """
    names = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [
        n for n in dict.fromkeys(names) if n not in kinds and not _is_inside_mapping(n, kinds)
    ]
    if unknown:
        # Reports all at once, as a command line for another program has many.
        raise errors.ConfigError("\n".join(unknown_name(name, kinds) for name in unknown))
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise errors.ConfigError(
                f"unexpected argument {word}: options are --section.key value."
            )
        name, equals, value = word[2:].partition("=")
        inside_mapping = _is_inside_mapping(name, kinds)
        if not equals:
            if not rest or rest[0].startswith("--"):
                wanted = "" if inside_mapping else _wanted(kinds[name])
                raise errors.ConfigError(f"--{name} needs a value{wanted and f': {wanted}'}.")
            value = rest.pop(0)
        if name in found:
            raise errors.ConfigError(f"--{name} is given twice.")
        if inside_mapping:
            found[name] = yaml_file.scalar(f"--{name}", value)
        else:
            found[name] = _option_value(name, value, kinds[name])
    return found


def merged(
    values: Mapping[str, Any], given: Mapping[str, Any], kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """Values of a file overridden by options; both by dotted names.

    A single key of a mapping, such as `model.config.layerdrop`, leaves its other keys as they are.
    """
    found = {**values, **{name: value for name, value in given.items() if name in kinds}}
    for name in given:  # keeps their order, unlike a set
        if name in kinds:
            continue
        parent, _, key = name.rpartition(".")
        before = {} if parent not in found or found[parent] is None else found[parent]
        if isinstance(before, Mapping):  # else `typed` raises an error
            found[parent] = {**before, key: given[name]}
    return found


def _option_value(name: str, text: str, kind: Any) -> Any:
    members = _members(kind)
    lists = [m for m in members if typing.get_origin(m) is tuple]
    if text == "null" and (types.NoneType in members or lists):
        return None
    if lists and float in typing.get_args(lists[0]) and not text.startswith("["):
        return yaml_file.scalar(f"--{name}", f"[{text}]")
    if lists and not text.startswith("["):
        return _separated(text) if str not in members or "," in text else text
    if str in members and not lists:
        return text
    return yaml_file.scalar(f"--{name}", text)


def _separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _members(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return typing.get_args(kind)
    return (kind,)


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the option's type: integers are accepted as floats, `a,b` as a list of strings.

    Raises:
        ConfigError: the type is wrong, a number is not finite, or a string contains NUL.
    """
    import msgspec

    if isinstance(value, str) and typing.get_args(kind) == (str, ...):
        value = _separated(value)
    try:
        typed = msgspec.convert(value, kind, strict=True)
        if isinstance(typed, float) and not math.isfinite(typed):
            raise errors.ConfigError(f"{name} is {value}: it must be finite.")
        if isinstance(typed, str) and "\0" in typed:
            raise errors.ConfigError(
                f"{name} is {value!r}: a string must not contain the character NUL."
            )
        return typed
    except msgspec.ValidationError as error:
        wanted = _wanted(kind) or str(error).replace("`", "").rstrip(".")
        raise errors.ConfigError(f"{name} is {value!r}: {wanted}.") from error


def _wanted(kind: Any) -> str:
    """A hint at the values of this type, if it is a list or has few values; else ""."""
    if any(typing.get_args(member) == (str, ...) for member in _members(kind)):
        return "write a list such as [train,dev], or [] for none"
    found = ("true", "false") if bool in _members(kind) else choices(kind)
    return f"one of {', '.join(found)}" if found else ""


def choices(kind: Any) -> tuple[str, ...]:
    """The values that an option of this type is limited to; empty if it is not."""
    named = (m for m in _members(kind) if typing.get_origin(m) is Literal)
    return tuple(choice for member in named for choice in typing.get_args(member))


def spelt(value: Any) -> str:
    """A value as written on a command line."""
    return "null" if value is None else json.dumps(value).replace('"', "")
