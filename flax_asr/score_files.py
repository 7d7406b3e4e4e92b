"""What the files of a score are called: by what was scored, so that none takes another's place.

In the folder of a run `predictions-SPLIT.jsonl` is of the run's own clips, scored as its own
configuration has it. Whatever is otherwise is added to the name: the checkpoint, where one was
named; release and hash of other clips; another normalisation; another precision.
"""

import os
import re
from pathlib import Path

from flax_asr import config, loading, text
from flax_asr.data import examples
from flax_asr.hosts import multihost

# Bytes of names that may have any length, where that of a file may have 255.
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
    """In the run's folder; of other models, which are then named too, in the present one.

    Args:
        loaded: the model that is scored.
        cfg: how it is scored.
        normalize: makes the references.
        split: what the source calls the clips.
        data: the clips.

    Returns:
        None where neither folder can be written.
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
    """Whether a run has scored these clips itself: it recorded them as `eval` or `test`.

    Its own files are called so, and no other split's of such a name may take their place.
    """
    own = {which: recorded["hash"] for which, recorded in loaded.facts["splits"].items()}
    return data.hash in own.values() and own.get(split, data.hash) == data.hash


def _clips(data: examples.Examples) -> list[str]:
    return [_plain(data.release, _RELEASE), data.hash[:8]]


def _manner(
    loaded: loading.LoadedModel, cfg: config.Config, normalize: text.Normalizer
) -> list[str]:
    """How the score is taken, as far as that is not as the model has it."""
    usual = loaded.writes_by(normalize) or cfg.text.normalization is None
    rule = "" if usual else f"rule-{multihost.digest(repr(normalize.spec))[:8]}"
    precision = cfg.train.mixed_precision
    own = config.build(loaded.settings).train.mixed_precision
    return [rule, "" if precision == own else precision]


def _plain(name: str, part: slice) -> str:
    """What of a name any file's name may have."""
    found = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    return found.encode()[part].decode(errors="ignore")
