"""Strict YAML 1.2: `no` is a string, a duplicate key is an error, files are small."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_asr import errors

_MOST_CHARACTERS = 2**18
_DEEPEST = 32


def read(path: str | os.PathLike) -> Mapping[str, Any]:
    """The mapping in a YAML 1.2 file; an empty file gives an empty mapping.

    Raises:
        ConfigError: the file is unreadable, not YAML or not a mapping, or has a duplicate key.
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
        raise errors.ConfigError(f"{path}: expected `section:` lines, found {kind(values)}.")
    return values


def scalar(option: str, text: str) -> Any:
    """The value of an option, parsed from one line: a number, a list, null, ...

    Args:
        option: the name of the option, for messages.
        text: its value, on one line.

    Raises:
        ConfigError: it is not YAML.
    """
    from ruamel.yaml.error import YAMLError

    try:
        return _yaml().load(text)
    except YAMLError as error:
        raise errors.ConfigError(f"{option} {text}: {_first_lines(error)}") from error


def dump(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read` reads back equal."""
    out = io.StringIO()
    yaml = _yaml()

    class Representer(yaml.Representer):
        """Writes invisible characters as escapes: U+0085 would be read as a space."""

        def represent_text(self, text: str):
            style = None if text.isprintable() else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Representer.add_representer(str, Representer.represent_text)
    yaml.Representer = Representer
    yaml.dump(values, out)
    return out.getvalue()


def plain(value: Any) -> Any:
    """The value with tuples replaced by lists, as in YAML and JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def kind(value: Any) -> str:
    """The kind of a value, for a message that expected another."""
    return {list: "a list", str: f"the text {value!r}"}.get(type(value), repr(value))


def _yaml():
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _check_form(path: str | os.PathLike, text: str) -> None:
    """Refuses constructs with which a few lines could take all memory, or days, to read."""
    from ruamel.yaml import tokens

    if len(text) > _MOST_CHARACTERS:
        raise errors.ConfigError(
            f"{path}: {len(text)} characters are too many for a configuration."
        )
    depth = 0
    for token in _yaml().scan(text):
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if isinstance(token, tokens.AliasToken):
            raise errors.ConfigError(f"{path} has aliases (*name): write the values out.")
        if depth > _DEEPEST:
            raise errors.ConfigError(
                f"{path} is not a configuration: its values are nested too deeply."
            )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("To suppress", "http", "#")))
