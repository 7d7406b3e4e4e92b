"""Hides an installed library from this process, so that other libraries do not import it."""

import sys
from typing import Any


class _Without:
    """A module finder that hides one module from another finder."""

    def __init__(self, finder: Any, hidden: str):
        self._finder = finder
        self._hidden = hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name == self._hidden else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(name: str) -> None:
    """Makes `name` look as if it were not installed, unless it is loaded already.

    Setting sys.modules[name] to None would not do: `datasets` checks whether the name is there, and
    then imports it.
    """
    if name not in sys.modules:
        sys.meta_path[:] = [_Without(finder, name) for finder in sys.meta_path]
