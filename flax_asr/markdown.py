"""Pieces of Markdown, and text from data that is harmless inside of it."""

import html
import re
from collections.abc import Mapping
from typing import Any

from flax_asr.console import terminal

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def escape(value: Any) -> str:
    """Text from data, harmless inside of Markdown: no markup, no HTML, no control, one line."""
    one_line = terminal.plain(" ".join(str(value).split()))
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line, quote=False))


def section(title: str, content: str, level: int = 2) -> str:
    """A heading and what stands below it."""
    return f"{'#' * level} {title}\n\n{content}"


def bullets(items: Mapping[str, Any], separator: str = " ") -> str:
    """A list of names and values, one a line."""
    return "\n".join(f"- {name}{separator}{value}" for name, value in items.items())
