"""How options are read: strict YAML 1.2, `--section.key value`, and the nearest right name.

What options there are is config.py's part; here they are dotted names with their types.
"""

import dataclasses
import difflib
import io
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flax_asr import errors, trainer_names

_MOST_CHARACTERS = 2**18
_DEEPEST = 32


def _yaml():
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def utf8(places: Mapping[str, str | None]) -> None:
    """Raises `ConfigError` where a place cannot be written down; what it is named after fails."""
    for name, place in places.items():
        if place is not None and any("\ud800" <= character <= "\udfff" for character in place):
            raise errors.ConfigError(
                f"{name} is {place!a}: a name that is not UTF-8; rename it, or make a link to it."
            )


def at_least(name: str, value: float | None, least: float) -> None:
    """Raises `ConfigError` where an option is below its bound; None has none."""
    if value is not None and value < least:
        raise errors.ConfigError(f"{name} is {value}: it must be at least {least}.")


def above(name: str, value: float | None, bound: float) -> None:
    """Raises `ConfigError` where an option is not above its bound; None has none."""
    if value is not None and value <= bound:
        raise errors.ConfigError(f"{name} is {value}: it must be larger than {bound}.")


def below(name: str, value: float, bound: float) -> None:
    """Raises `ConfigError` where an option is not below its bound."""
    if value >= bound:
        raise errors.ConfigError(f"{name} is {value}: it must be less than {bound}.")


def splits(name: str, names: Sequence[str]) -> None:
    """Raises `ConfigError` where a split is named twice, or cannot be the name of a folder.

    Such are the names of its prepared data and, with more behind it, of its predictions.
    """
    if len(set(names)) < len(names):
        raise errors.ConfigError(f"{name} is {list(names)}: name every split once.")
    for split in names:
        if not split or split in (".", "..") or "/" in split or "\0" in split:
            raise errors.ConfigError(
                f"{name}: {split!r} cannot be the name of a folder: call the split otherwise in the"
                " table."
            )


def plain(value: Any) -> Any:
    """The same with lists in place of tuples, as YAML and JSON have it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads back equal."""
    out = io.StringIO()
    yaml = _yaml()

    class Representer(yaml.Representer):
        """Writes characters that cannot be seen as escapes: U+0085 would be read as a space."""

        def represent_text(self, text: str):
            style = None if text.isprintable() else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Representer.add_representer(str, Representer.represent_text)
    yaml.Representer = Representer
    yaml.dump(values, out)
    return out.getvalue()


def read_yaml(path: str | os.PathLike) -> Mapping[str, Any]:
    """The mapping in a YAML 1.2 file; an empty file is an empty one.

    Raises:
        ConfigError: unreadable, not YAML, a key twice, or no mapping.
    """
    from ruamel.yaml.error import YAMLError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise errors.ConfigError(
            f"cannot read the configuration {path}: {errors.why(error)}{errors.seen_from(path)}."
        ) from error
    except UnicodeDecodeError as error:
        raise errors.ConfigError(f"{path} is not a text in UTF-8: {error}.") from error
    try:
        _check_form(path, text)
        values = _yaml().load(text)
    except YAMLError as error:
        raise errors.ConfigError(f"{path} is not valid YAML: {_first_lines(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise errors.ConfigError(f"{path}: expected `section:` lines, found {_kind(values)}.")
    return values


def _check_form(path: str | os.PathLike, text: str) -> None:
    """Refuses what a few lines could take all memory or days with: a stranger's run has a file."""
    from ruamel.yaml import tokens

    if len(text) > _MOST_CHARACTERS:
        raise errors.ConfigError(f"{path}: {len(text)} characters are no configuration.")
    depth = 0
    for token in _yaml().scan(text):
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if isinstance(token, tokens.AliasToken):
            raise errors.ConfigError(f"{path} has aliases (*name): write the values out.")
        if depth > _DEEPEST:
            raise errors.ConfigError(
                f"{path} is no configuration: its values are nested too deeply."
            )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("To suppress", "http", "#")))


def sections(cls: type, within: str = "") -> dict[str, type]:
    """Sections by their dotted names, those inside of others after them."""
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
    """A section, with the sections inside of it, from values by their dotted names."""
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
        where: what an error's message begins with.
        section: the dotted name of what the values are in.

    Raises:
        ConfigError: a key that does not exist, or no keys where a section is.
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
            raise errors.ConfigError(
                f"{where}{name} is a section: expected keys below it, found {_kind(value)}."
            )
    return flat


def unknown_name(name: str, kinds: Mapping[str, Any]) -> str:
    """The message for a name that is not an option, with the nearest one that is."""
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
        ConfigError: an option that does not exist, lacks its value or is given twice.
    """
    names = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [
        n for n in dict.fromkeys(names) if n not in kinds and not _is_inside_mapping(n, kinds)
    ]
    if unknown:
        # All at once: a command line of another program has many.
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
        found[name] = (
            _scalar(name, value) if inside_mapping else _option_value(name, value, kinds[name])
        )
    return found


def merged(
    values: Mapping[str, Any], given: Mapping[str, Any], kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """What a file says, and what options say on top; both by dotted names.

    A single key of a mapping, such as `model.config.layerdrop`, leaves its other keys as they are.
    """
    found = {**values, **{name: value for name, value in given.items() if name in kinds}}
    for name in given:  # in their order, which a set of them would not keep
        if name in kinds:
            continue
        parent, _, key = name.rpartition(".")
        before = {} if parent not in found or found[parent] is None else found[parent]
        if isinstance(before, Mapping):  # else `typed` has something to say about it
            found[parent] = {**before, key: given[name]}
    return found


def _option_value(name: str, text: str, kind: Any) -> Any:
    members = _members(kind)
    lists = [m for m in members if typing.get_origin(m) is tuple]
    if text == "null" and (types.NoneType in members or lists):
        return None
    if lists and float in typing.get_args(lists[0]) and not text.startswith("["):
        return _scalar(name, f"[{text}]")
    if lists and not text.startswith("["):
        return _separated(text) if str not in members or "," in text else text
    if str in members and not lists:
        return text
    return _scalar(name, text)


def _separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _scalar(name: str, text: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return _yaml().load(text)
    except YAMLError as error:
        raise errors.ConfigError(f"--{name} {text}: {_first_lines(error)}") from error


def _members(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return typing.get_args(kind)
    return (kind,)


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the option's type: integers serve as floats, `a,b` as a list of texts.

    Raises:
        ConfigError: another type, a number that is not finite, or a text with NUL.
    """
    import msgspec

    if isinstance(value, str) and typing.get_args(kind) == (str, ...):
        value = _separated(value)
    try:
        typed = msgspec.convert(value, kind, strict=True)
        if isinstance(typed, float) and not math.isfinite(typed):
            raise errors.ConfigError(f"{name} is {value}: it must be finite.")
        if isinstance(typed, str) and "\0" in typed:
            raise errors.ConfigError(f"{name} is {value!r}: no text may hold the character NUL.")
        return typed
    except msgspec.ValidationError as error:
        wanted = _wanted(kind) or str(error).replace("`", "").rstrip(".")
        raise errors.ConfigError(f"{name} is {value!r}: {wanted}.") from error


def _wanted(kind: Any) -> str:
    """What an option of this type may be, where it is a list or these are few; else nothing."""
    if any(typing.get_args(member) == (str, ...) for member in _members(kind)):
        return "write a list such as [train,dev], or [] for none"
    found = ("true", "false") if bool in _members(kind) else choices(kind)
    return f"one of {', '.join(found)}" if found else ""


def choices(kind: Any) -> tuple[str, ...]:
    """The texts that an option of this type may be; none where it may be any."""
    named = (m for m in _members(kind) if typing.get_origin(m) is Literal)
    return tuple(choice for member in named for choice in typing.get_args(member))


def spelt(value: Any) -> str:
    """A value as it is given on a command line."""
    return "null" if value is None else json.dumps(value).replace('"', "")


def _kind(value: Any) -> str:
    return {list: "a list", str: f"the text {value!r}"}.get(type(value), repr(value))
