"""The lineage of weights: the runs behind an exported folder, oldest first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_asr import errors, json_object

FILE = "flax_asr.json"
"""In every export, beside the weights: language, normalisation, release, split hashes, origin."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Ancestor:
    """An earlier run.

    Attributes:
        started_from: the model that it started from, as it was given; None for random weights.
        revision: the commit of a model on the hub; None for a folder.
        head: "kept" or "fresh, N symbols".
        release, language: what it was trained on.
        updates: number of updates after which its weights were taken.
    """

    started_from: str | None
    revision: str | None
    head: str
    release: str
    language: str
    updates: int


def behind(folder: Path) -> list[dict[str, Any]]:
    """The runs that made the weights in a folder, as plain values; empty if not made by us.

    Raises:
        ModelError: flax_asr.json there is damaged.
    """
    facts = read(folder)
    if "step" not in facts:
        return []
    try:
        own = {
            "started_from": facts["started_from"],
            "revision": facts["revision"],
            "head": facts["head"],
            "release": facts["splits"]["train"]["release"],
            "language": facts["language"],
            "updates": facts["step"],
        }
        before = earlier(facts)
        parse([*before, own])
    except (KeyError, TypeError, errors.ModelError) as error:
        raise errors.ModelError(
            f"{folder / FILE} is damaged ({error}): export the model again, or delete the file"
            " (then the card will not tell where it comes from)."
        ) from error
    return [*before, own]


def parse(values: Sequence[Mapping[str, Any]]) -> list[Ancestor]:
    """Ancestors from plain values.

    Raises:
        ModelError: they are something else.
    """
    import msgspec

    try:
        return msgspec.convert(list(values), list[Ancestor], strict=True)
    except msgspec.ValidationError as error:
        raise errors.ModelError(f"the lineage: {error}") from error


def read(folder: Path) -> dict[str, Any]:
    """The facts in an exported folder; empty for a folder made elsewhere.

    Raises:
        ModelError: the file cannot be read or is not a JSON object.
    """
    return json_object.read(folder / FILE) or {}


def earlier(facts: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The runs before the one whose facts these are, as `behind` gave them."""
    return facts.get("lineage", [])


def hub_model(facts: Mapping[str, Any]) -> str | None:
    """The most recent hub model that the weights derive from; None if there is none."""
    for run in [facts, *reversed(earlier(facts))]:
        name = run["started_from"]
        if run["revision"] is not None and name is not None and _HUB_ID.fullmatch(name):
            return name
    return None
