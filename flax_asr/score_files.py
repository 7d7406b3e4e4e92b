"""Names of prediction files, by what was scored, so that none overwrites another.

In a run folder, `predictions-SPLIT.jsonl` is for the run's own clips, scored with its own
configuration. Differences are added to the name: a named checkpoint; release and hash of other
clips; another normalisation; another precision.
"""

import os
import re
from pathlib import Path

from flax_asr import config, loading, text
from flax_asr.data import examples
from flax_asr.hosts import multihost

# Bytes kept of names of any length, as a file name may have 255.
_MODEL, _RELEASE = slice(-100, None), slice(50)


def named(*parts: str) -> str:
    """The name of a file of predictions."""
    return f"{'-'.join(('predictions', *filter(None, parts)))}.jsonl"


def predictions(
    loaded: loading.LoadedModel,
    cfg: config.Config,
    normalize: text.Normalizer,
    split: str,
    data: examples.Examples,
) -> Path | None:
    """The path of a prediction file: in the run folder, or for other models in the current folder.

    Args:
        loaded: the model that is scored.
        cfg: the configuration of the score.
        normalize: normalises the references.
        split: the name of the split in the source.
        data: the clips.

    Returns:
        None if neither folder can be written.
    """
    manner = _manner(loaded, cfg, normalize)
    if loaded.run is not None and os.access(loaded.run, os.W_OK):
        step = "" if loaded.step is None else f"step-{loaded.step}"
        clips = [] if _is_own(loaded, split, data) else _clips(data)
        return loaded.run / named(split, step, *clips, *manner)
    if os.access(Path(), os.W_OK):
        model = _plain(loaded.name, _MODEL) or _plain(str(Path(loaded.name).resolve()), _MODEL)
        return Path(named(split, model, *_clips(data), *manner))
    return None


def _is_own(loaded: loading.LoadedModel, split: str, data: examples.Examples) -> bool:
    """Whether the run itself scores these clips, as `eval` or `test`.

    Files with these names are its own, which no other split of such a name may overwrite.
    """
    own = {which: recorded["hash"] for which, recorded in loaded.facts["splits"].items()}
    return data.hash in own.values() and own.get(split, data.hash) == data.hash


def _clips(data: examples.Examples) -> list[str]:
    return [_plain(data.release, _RELEASE), data.hash[:8]]


def _manner(
    loaded: loading.LoadedModel, cfg: config.Config, normalize: text.Normalizer
) -> list[str]:
    """Parts of the name for settings that differ from the model's own."""
    usual = loaded.writes_by(normalize) or cfg.text.normalization is None
    rule = "" if usual else f"rule-{multihost.digest(repr(normalize.spec))[:8]}"
    precision = cfg.train.mixed_precision
    own = config.build(loaded.settings).train.mixed_precision
    return [rule, "" if precision == own else precision]


def _plain(name: str, part: slice) -> str:
    """The characters of a name that are safe in a file name."""
    found = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    return found.encode()[part].decode(errors="ignore")
