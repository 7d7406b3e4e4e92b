"""The weights a run starts from, and whether it keeps the stored head."""

import dataclasses
import logging

from jaxtyping import PyTree

from flax_asr import config, corpora, errors, origins, vocabulary
from flax_asr.models import pretrained

logger = logging.getLogger(__name__)


def load(
    cfg: config.Config, start: origins.Origin, data: corpora.Corpus
) -> tuple[origins.Origin, PyTree]:
    """The origin with its final configuration, and the parameters to start from.

    Raises:
        ConfigError: `model.trainable_layers` is more than the encoder has.
        ModelError: the weights cannot be read.
    """
    layers = start.model_config.num_hidden_layers
    if (cfg.model.trainable_layers or 0) > layers:
        raise errors.ConfigError(
            f"model.trainable_layers is {cfg.model.trainable_layers}: the encoder has {layers}."
        )
    found = data.vocabulary
    kept, stored = keeps_head(cfg, start, found), False
    model_config = start.sized(found).model_config
    if start.folder is None:
        params = pretrained.fresh(model_config, cfg.seed)
    else:
        loaded = pretrained.load(
            start.folder,
            head_vocab_size=None if kept else found.size,
            config_overrides=origins.overrides(cfg.model)
            | {"vocab_size": found.size, "pad_token_id": found.blank},
            seed=cfg.seed,
        )
        model_config, params = loaded.config, loaded.params
        kept, stored = not loaded.fresh_head, loaded.stored_head
    head = "kept" if kept else f"fresh, {found.size} symbols"
    why = ""
    # An encoder may have a vocabulary, as facebook/wav2vec2-base does, and no head.
    if stored and not kept and start.vocabulary is not None:
        why = f": {_why_fresh(cfg, start.vocabulary, found)}"
    logger.info("weights from %s; head %s%s", start.folder or "random numbers", head, why)
    return (
        dataclasses.replace(start, model_config=model_config, facts={**start.facts, "head": head}),
        params,
    )


def keeps_head(cfg: config.Config, start: origins.Origin, ours: vocabulary.Vocabulary) -> bool:
    """Whether the run keeps the stored head, as it has the run's symbols."""
    return start.folder is not None and start.vocabulary == ours and not cfg.model.reset_head


def _why_fresh(
    cfg: config.Config, theirs: vocabulary.Vocabulary, ours: vocabulary.Vocabulary
) -> str:
    if cfg.model.reset_head:
        return "model.reset_head is set"
    lacking = sorted(ours.characters - theirs.characters)
    source = "text.vocabulary" if cfg.text.vocabulary is not None else "the training text"
    shown = f" ({', '.join(map(repr, lacking[:10]))})" if lacking else ""
    return (
        f"its head writes {theirs.size} symbols, the run needs {ours.size}: it lacks"
        f" {len(lacking)} of them{shown}, and has {len(theirs.characters - ours.characters)} that"
        f" the run does not need. These come from {source}; with text.vocabulary"
        f" {cfg.model.pretrained} the head would be kept"
    )
