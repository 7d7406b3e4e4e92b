"""Pieces of Markdown, and untrusted text escaped for it."""

import html
import re
from collections.abc import Mapping
from typing import Any

from flax_asr.console import terminal

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def escape(value: Any) -> str:
    """Untrusted text for Markdown: on one line, without markup, HTML or control characters."""
    one_line = terminal.plain(" ".join(str(value).split()))
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line, quote=False))


def section(title: str, content: str, level: int = 2) -> str:
    """A heading with its content."""
    return f"{'#' * level} {title}\n\n{content}"


def bullets(items: Mapping[str, Any], separator: str = " ") -> str:
    """A list of names and values, one per line."""
    return "\n".join(f"- {name}{separator}{value}" for name, value in items.items())
