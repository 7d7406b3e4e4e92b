"""The splits that `flax-asr evaluate` scores: their names, source and examples."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

from flax_asr import common_voice, config, errors, loading, text
from flax_asr.data import examples, prepare, prepared_dir
from flax_asr.hosts import multihost
from flax_asr.models import wav2vec2


def configure(loaded: loading.LoadedModel, overrides: Sequence[str]) -> config.Config:
    """The configuration with the splits that are scored, and no others.

    The `data.prepared_dir` of the model's run is used only if it holds what is scored.

    Args:
        loaded: the model.
        overrides: options of the configuration.

    Raises:
        ConfigError: language, source or splits are not given.
    """
    cfg = loading.configure(loaded, overrides)
    if cfg.data.language is None:
        raise errors.ConfigError(
            f"{loaded.name} does not say which language it writes: give --data.language CODE,"
            " for example zh-HK. It decides how transcripts are normalised and scored."
        )
    if cfg.data.source is None:
        raise errors.ConfigError(
            f"{loaded.name} does not say what it is scored on: give --data.source, a release for"
            " example, and --data.test_splits if it is not test."
        )
    if not cfg.data.test_splits:
        raise errors.ConfigError("no split is named: give --data.test_splits NAME.")
    data = dataclasses.replace(cfg.data, train_splits=(), eval_splits=())
    scored = dataclasses.replace(cfg, data=data)
    if data.prepared_dir is None or any(w.startswith("--data.prepared_dir") for w in overrides):
        return scored
    own = config.build(loaded.settings)
    if prepared_dir.content(cfg) == prepared_dir.content(own) or prepared_dir.fits(scored):
        return scored
    # It holds the run's own splits, which would be mistaken for others of the same name.
    return dataclasses.replace(cfg, data=dataclasses.replace(data, prepared_dir=None))


def prepared(
    loaded: loading.LoadedModel,
    cfg: config.Config,
    normalize: text.Normalizer,
    hosts: multihost.Hosts,
) -> dict[str, examples.Examples]:
    """The examples of the splits to score, by name; splits are prepared if needed.

    Args:
        loaded: the model, whose vocabulary encodes the references.
        cfg: the result of `configure`.
        normalize: normalises the references.
        hosts: the hosts that score together; each disk is prepared once.

    Raises:
        DataError: the source cannot be read, or a split has no clip that can be scored.
    """
    with _telling_whose_source(loaded, cfg):
        hosts.work_ahead(
            prepared_dir.folder(cfg),
            lambda: prepare.prepare(cfg),
            for_all=prepared_dir.is_in_bucket(cfg),
        )
        splits = prepare.prepare(cfg, verify=True)
    return {
        name: examples.build(
            [splits[name]],
            normalize=normalize,
            vocabulary=loaded.vocabulary,
            frame_lengths=functools.partial(wav2vec2.frame_lengths, loaded.config),
            max_clips=cfg.data.max_eval_clips,
            seed=cfg.seed,
        )
        for name in cfg.data.test_splits
    }


@contextlib.contextmanager
def _telling_whose_source(loaded: loading.LoadedModel, cfg: config.Config) -> Iterator[None]:
    """Adds to an error about `data.source` that it comes from the model's run, if so."""
    source = cfg.data.source
    try:
        yield
    except errors.DataError as error:
        given = source != loaded.settings.get("data", {}).get("source")
        if given or not common_voice.is_path(source) or os.path.exists(os.path.expanduser(source)):
            raise
        raise errors.DataError(
            f"{error}. It is what {loaded.name} was trained on, seen from the folder where that was"
            " begun: give --data.source."
        ) from error
